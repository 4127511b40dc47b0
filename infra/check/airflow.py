"""infra/airflow: three dates by a real Airflow on a real S3 server: killed, stopped, run again, and without input."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import obstore
import psutil
from obstore.store import S3Store
from pyarrow.fs import S3FileSystem

from batchq.errors import ExitCode
from infra.check import dates
from infra.check.check import ROOT, TOOLS, Check, How, installed, said
from tests.s3 import S3, s3_server

DAGS = ROOT / "infra/airflow/dags"
LOCK = ROOT / "infra/airflow/requirements.txt"
PATIENCE_S = 180.0


def airflow(program: str = "airflow") -> Path:
    """A program of Airflow's own environment, .infra/airflow, which is made anew when the lock has changed."""
    made_from = TOOLS / "airflow/made-from.txt"
    if not made_from.exists() or made_from.read_bytes() != LOCK.read_bytes():
        shutil.rmtree(TOOLS / "airflow", ignore_errors=True)
    path = installed("airflow", program, "--no-deps", "--require-hashes", "-r", str(LOCK))
    shutil.copy(LOCK, made_from)
    return path


def home(work: Path) -> dict[str, str]:
    """The environment of an Airflow whose database and logs are under `work`."""
    return {
        **os.environ,
        "AIRFLOW_HOME": str(work / "airflow"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(DAGS),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__DEFAULT_TASK_RETRY_DELAY": "1",
        "NO_COLOR": "1",
    }


# ---- quick: what the files say ----


def exit_codes() -> tuple[set[int], set[int]]:
    """Exit codes after which the DAGs try again, and those after which they don't."""
    found: dict[str, set[int]] = {}
    for node in ast.parse((DAGS / "batchq_command.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and "RETRY" in node.targets[0].id:
            found[node.targets[0].id] = set(ast.literal_eval(node.value))
    return found["RETRY"], found["NO_RETRY"]


def names_every_exit_code(_: Path) -> str:
    """Every DAG compiles, and each exit code of batchq's is in one of the two tables."""
    files = sorted(DAGS.glob("*.py"))
    for path in files:
        compile(path.read_text(), str(path), "exec")
    retry, no_retry = exit_codes()
    assert not retry & no_retry
    assert set(ExitCode) - {ExitCode.COMPLETE} <= retry | no_retry, "an exit code of batchq's is in neither table"
    assert {ExitCode.FAILED, ExitCode.STOPPED} <= retry
    assert {ExitCode.USER_ERROR, ExitCode.TOO_MANY_FAILURES, ExitCode.GATE_REFUSED} <= no_retry
    return f"{len(files)} files, {len(retry | no_retry)} exit codes"


# ---- as Airflow reads them ----

READ = """
import json
from pathlib import Path
from airflow.dag_processing.dagbag import BundleDagBag
bag = BundleDagBag(FOLDER, bundle_path=Path(FOLDER), bundle_name="dags-folder")
dags = {
    dag.dag_id: {
        "max_active_runs": dag.max_active_runs,
        "catchup": dag.catchup,
        "timetable": type(dag.timetable).__name__,
        "tasks": {
            task.task_id: [task.retries, task.max_active_tis_per_dag, [asset.name for asset in task.outlets]]
            for task in dag.tasks
        },
    }
    for dag in bag.dags.values()
}
import batchq_command
def verdict(code):
    try:
        batchq_command.judge(code)
    except Exception as error:
        return type(error).__name__
verdicts = {code: verdict(code) for code in (*range(8), 99, 137)}
print("\\n" + json.dumps({"errors": bag.import_errors, "dags": dags, "verdicts": verdicts}))
"""


def read_by_airflow(work: Path) -> str:
    """Airflow imports every DAG; each tries again, publishes its asset, and labels one date at a time."""
    env = home(work)
    said([airflow(), "db", "migrate"], env=env)
    printed = said([airflow("python"), "-c", READ.replace("FOLDER", repr(str(DAGS)))], env=env)
    found = json.loads(printed.splitlines()[-1])
    assert found["errors"] == {}, found["errors"]
    for name, dag in found["dags"].items():
        assert (dag["max_active_runs"], dag["catchup"]) == (1, False), name
        assert dag["timetable"] == "CronDataIntervalTimetable", f"{name} would label a day that isn't over"
        assert dag["tasks"] == {"find_input": [3, None, []], "label": [3, 1, [name]]}, (name, dag["tasks"])
    assert sorted(found["dags"]) == ["batchq_daily", "batchq_pod", "batchq_rayjob"]
    again, failed = "AirflowException", "AirflowFailException"
    verdicts = {"0": None, "1": again, "2": failed, "3": again, "4": failed, "5": failed, "6": failed, "7": again}
    assert found["verdicts"] == {**verdicts, "99": "AirflowSkipException", "137": again}, found["verdicts"]

    said([airflow(), "dags", "reserialize"], env=env)
    backfill = "backfill create --dry-run --dag-id batchq_daily --from-date 2026-11-21 --to-date 2026-11-23T02:00"
    printed = said([airflow(), *backfill.split()], env=env)
    assert re.findall(r"\| (2026-11-\d\d) 02:00", printed) == ["2026-11-21", "2026-11-22", "2026-11-23"], printed
    return f"{', '.join(sorted(found['dags']))}; a backfill of three dates"


# ---- three dates ----


@dataclass
class Nights:
    """An Airflow, a bucket with a folder of input for each date, and a job on it."""

    work: Path
    s3: S3
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        dates.make_job(self.work)
        self.s3.make_bucket("corpus")
        self.env = {
            **home(self.work),
            **self.s3.env,
            "BATCHQ_CACHE": str(self.work / "cache"),
            "HF_HUB_OFFLINE": "1",
            "AIRFLOW_VAR_BATCHQ_DAILY_PYTHON": sys.executable,
            "AIRFLOW_VAR_BATCHQ_DAILY_FOLDER": str(self.work),
            "AIRFLOW_VAR_BATCHQ_DAILY_JOB": "tickets",
            "AIRFLOW_VAR_BATCHQ_DAILY_INPUT": "s3://corpus/in/ds=%Y-%m-%d",
            "AIRFLOW_VAR_BATCHQ_DAILY_OUTPUT": "s3://corpus/out/ds=%Y-%m-%d",
            "AIRFLOW_VAR_BATCHQ_DAILY_OPTIONS": dates.SLOW,
        }
        self.store = S3Store(
            "corpus",
            endpoint=self.env["AWS_ENDPOINT_URL"],
            access_key_id=self.env["AWS_ACCESS_KEY_ID"],
            secret_access_key=self.env["AWS_SECRET_ACCESS_KEY"],
            region=self.env["AWS_REGION"],
            client_options={"allow_http": True},
        )
        self.reader = S3FileSystem(
            access_key=self.env["AWS_ACCESS_KEY_ID"],
            secret_key=self.env["AWS_SECRET_ACCESS_KEY"],
            region=self.env["AWS_REGION"],
            endpoint_override=self.env["AWS_ENDPOINT_URL"].removeprefix("http://"),
            scheme="http",
        )
        said([airflow(), "db", "migrate"], env=self.env)

    def give(self, date: str) -> None:
        obstore.put(self.store, f"in/ds={date}/rows.jsonl", dates.lines(date))

    def written(self, date: str) -> dict[str, object]:
        """Data objects of a date's output, and when each was written."""
        found = obstore.list(self.store, f"out/ds={date}/data/").collect()
        return {each["path"]: (each["last_modified"], each["e_tag"]) for each in found}

    def start(self, date: str, **variables: str) -> subprocess.Popen[str]:
        return dags_test("batchq_daily", date, {**self.env, **variables})

    def run(self, date: str, **variables: str) -> str:
        return ended(self.start(date, **variables))

    def require_once(self, date: str) -> None:
        dates.require_once(date, f"corpus/out/ds={date}", self.reader)


def dags_test(dag: str, date: str, env: dict[str, str]) -> subprocess.Popen[str]:
    """Airflow begins a date's run, in a process of its own; no scheduler is needed for that."""
    command = [str(airflow()), "dags", "test", dag, date]
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def ended(process: subprocess.Popen[str], code: int = 0) -> str:
    """What an Airflow printed; raises AssertionError unless its run succeeded, or failed where `code` is 1."""
    said, _ = process.communicate(timeout=PATIENCE_S)
    last = "\n".join(said.splitlines()[-15:])
    assert process.returncode == code, f"airflow dags test ended in exit code {process.returncode}:\n{last}"
    return said


def wait_for(process: subprocess.Popen[str], what: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert process.poll() is None, f"airflow ended before that:\n{process.communicate()[0][-2000:]}"
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.05)


def driver(process: subprocess.Popen[str]) -> psutil.Process:
    """The batchq that a task of that Airflow started."""
    (found,) = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "job=tickets" in child.cmdline() and child.cmdline()[1:3] == ["-m", "batchq"]
    ]
    return found


@contextmanager
def nights(work: Path) -> Iterator[Nights]:
    with s3_server(work / "store") as s3:
        yield Nights(work, s3)


def three_dates(work: Path) -> str:
    """One is killed in mid-run, one gets a SIGTERM, one has no input; whatever happens, every row is there once."""
    with nights(work) as run:
        killed, stopped, plain, none = "2026-11-21", "2026-11-22", "2026-11-23", "2026-11-24"
        for date in (killed, stopped, plain):
            run.give(date)

        process = run.start(killed)
        wait_for(process, lambda: len(run.written(killed)) >= 3)
        before = run.written(killed)
        driver(process).send_signal(signal.SIGKILL)
        out = ended(process)
        assert "batchq ended in exit code 137: it was killed; another try goes on" in out
        assert len(before) < dates.SHARDS == len(run.written(killed))
        assert before.items() <= run.written(killed).items(), "another try wrote what was committed"
        run.require_once(killed)

        process = run.start(stopped)
        wait_for(process, lambda: len(run.written(stopped)) >= 3)
        process.send_signal(signal.SIGTERM)
        out = ended(process)
        assert "batchq ended in exit code 3: a signal stopped it; another try goes on" in out
        run.require_once(stopped)

        obstore.put(run.store, f"in/ds={plain}/_SUCCESS", b"")
        ready = "s3://corpus/in/ds=%Y-%m-%d/_SUCCESS"
        assert "labelling 15 of 15 shards" in run.run(plain, AIRFLOW_VAR_BATCHQ_DAILY_READY=ready)
        run.require_once(plain)
        out = run.run(killed)
        assert "all is committed; nothing to do" in out and "labelling" not in out
        run.require_once(killed)

        out = run.run(none)
        assert f"nothing is there yet: s3://corpus/in/ds={none}" in out and "Skipping task" in out
        assert not run.written(none)
    return f"{3 * dates.ROWS} rows of three dates, each once; a killed and a stopped driver were tried again"


CHECKS = [
    Check("airflow", "DAGs compile and name every exit code", How.SCHEMA, names_every_exit_code, quick=True),
    Check("airflow", "imports, retries, outlets, verdicts, backfill", How.RAN, read_by_airflow),
    Check("airflow", "three dates on S3: killed, stopped, run again, without input", How.RAN, three_dates),
]
