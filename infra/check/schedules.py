"""infra/cron and infra/systemd: a real cron daemon labels a date; systemd accepts the units, and what they start works.

The cron daemon comes from its Debian package, unpacked, not installed, and sees an empty /etc/cron.d and spool, so that
nothing of this machine's own is run. systemd isn't started: it has to be process 1.
"""

from __future__ import annotations

import configparser
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from batchq.config import ClusterConfig
from batchq.errors import ExitCode
from infra.check import dates
from infra.check.airflow import exit_codes
from infra.check.check import ROOT, TOOLS, Check, How, Missing, said

CRON = ROOT / "infra/cron"
SYSTEMD = ROOT / "infra/systemd"
PATIENCE_S = 120.0
BUSY = 75  # nightly.sh: another one is still at it

# The daemon's own view of the files it reads; $1 is the daemon, $2 a crontab.
ALONE = """set -e
mount -t tmpfs tmpfs /var/spool
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /etc/cron.d
[ ! -e /etc/crontab ] || mount --bind /dev/null /etc/crontab
mkdir -p /var/spool/cron/crontabs
install -m 600 "$2" /var/spool/cron/crontabs/root
exec "$1" -f
"""


class Night:
    """A folder with a job, its settings as /etc/batchq/tickets.env would be, and input for some dates."""

    def __init__(self, work: Path, options: str = dates.OPTIONS) -> None:
        self.work, self.logs = work, work / "logs"
        dates.make_job(work)
        job = work / "conf/job/tickets.yaml"
        paths = f'input: {{path: "{work}/in/ds={{date}}"}}\noutput: {{path: "{work}/out/ds={{date}}", '
        job.write_text(job.read_text().replace("output: {", paths))
        self.settings = work / "tickets.env"
        text = (CRON / "example.env").read_text()
        values = {
            "PYTHON": sys.executable,
            "CONF": f"{work}/conf",
            "OPTIONS": f'"{options}"',
            "CACHE": f"{work}/cache",
            "LOGS": str(self.logs),
        }
        for name, value in values.items():
            text, found = re.subn(rf"^BATCHQ_{name}=.*$", f"BATCHQ_{name}={value}", text, flags=re.M)
            assert found == 1, f"example.env has no BATCHQ_{name}"
        self.settings.write_text(text)
        self.logs.mkdir()

    def give(self, date: str) -> None:
        folder = self.work / f"in/ds={date}"
        folder.mkdir(parents=True)
        (folder / "rows.jsonl").write_bytes(dates.lines(date))

    def written(self, date: str) -> dict[str, int]:
        """Data objects of a date's output, and when each was written."""
        return {each.name: each.stat().st_mtime_ns for each in (self.work / f"out/ds={date}/data").glob("*.parquet")}

    def require_once(self, date: str) -> None:
        dates.require_once(date, f"{self.work}/out/ds={date}")

    def kept(self, date: str, kind: str) -> str:
        """What nightly.sh keeps of a date: its `log` or its exit `code`; empty if nothing."""
        path = self.logs / f"tickets-{date}.{kind}"
        return path.read_text() if path.exists() else ""

    def nightly(self, date: str) -> int:
        """The exit code of another start."""
        command = [str(CRON / "nightly.sh"), str(self.settings), date]
        return subprocess.run(command, timeout=PATIENCE_S, stdin=subprocess.DEVNULL).returncode

    def here(self, text: str) -> str:
        """A crontab or a unit, with the places it names as they are in this folder."""
        return text.replace("/opt/batchq/", f"{ROOT}/").replace("/etc/batchq/", f"{self.work}/")


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} didn't come within {PATIENCE_S:.0f} s"
        time.sleep(0.05)


def unit(kind: str) -> configparser.ConfigParser:
    parsed = configparser.ConfigParser(interpolation=None, strict=False)
    parsed.optionxform = str  # type: ignore[assignment,method-assign]
    parsed.read(SYSTEMD / f"batchq@.{kind}")
    return parsed


# ---- quick ----


def agree(_: Path) -> str:
    """Scripts are shell; cron and systemd try again after the same exit codes as Airflow."""
    scripts = sorted(CRON.glob("*.sh"))
    for script in scripts:
        said(["sh", "-n", script])
        assert os.access(script, os.X_OK), f"{script.name} can't be executed"
    no_retry = exit_codes()[1]
    service = unit("service")["Service"]
    assert {int(code) for code in service["RestartPreventExitStatus"].split()} == no_retry
    (given_up,) = re.findall(r"case .* in ([\d |]+)\) exit 0", (CRON / "nightly.sh").read_text())
    # Input that came late is worth a look, which costs seconds.
    assert {int(code) for code in given_up.split("|")} == no_retry - {ExitCode.USER_ERROR}
    assert int(service["SuccessExitStatus"]) == int(service["RestartForceExitStatus"]) == ExitCode.STOPPED
    assert float(service["TimeoutStopSec"]) > ClusterConfig().grace_seconds
    return f"{len(scripts)} scripts"


# ---- cron ----


def cron() -> Path:
    """The cron daemon, out of Debian's package."""
    daemon = TOOLS / "cron/usr/sbin/cron"
    if not daemon.exists():
        folder = TOOLS / "cron"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(["apt-get", "download", "cron"], cwd=folder, check=True, capture_output=True, timeout=120)
            said(["dpkg", "-x", next(folder.glob("cron_*.deb")), folder])
        except (OSError, subprocess.CalledProcessError) as error:
            raise Missing(f"no cron from apt-get: {error}") from error
    return daemon


@contextmanager
def daemon(crontab: Path) -> Iterator[None]:
    """A cron daemon of our own, with that crontab of root's, until the block ends. Raises Missing without root."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        raise Missing("a cron daemon of its own takes root and unshare")
    process = subprocess.Popen(["unshare", "--mount", "sh", "-c", ALONE, "sh", str(cron()), str(crontab)])
    try:
        yield
        assert process.poll() is None, f"cron ended in exit code {process.returncode}"
    finally:
        process.terminate()
        process.wait()


def by_cron(work: Path) -> str:
    """The crontab that is shipped, each minute: it labels yesterday. Started again by hand: locked, done, given up."""
    night = Night(work)
    date = f"{datetime.now(UTC) - timedelta(days=1):%Y-%m-%d}"
    night.give(date)
    crontab = night.here((CRON / "crontab").read_text())
    crontab, lines = re.subn(r"^0 2-6 \* \* \* ", "* * * * * ", crontab, flags=re.M)
    assert lines == 1
    (work / "crontab").write_text(crontab)
    with daemon(work / "crontab"):
        wait_for(night.logs / f"tickets-{date}.code")
    assert night.kept(date, "code") == "0\n", night.kept(date, "log")[-2000:]
    night.require_once(date)

    before = night.written(date)
    assert night.nightly(date) == ExitCode.COMPLETE
    assert "all is committed; nothing to do" in night.kept(date, "log")
    assert night.written(date) == before

    with (night.logs / "tickets.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        log = night.kept(date, "log")
        assert night.nightly(date) == BUSY
        assert night.kept(date, "log") == log and night.kept(date, "code") == "0\n"

    (night.logs / f"tickets-{date}.code").write_text("5\n")
    assert night.nightly(date) == 0 and night.kept(date, "log") == log, "it was tried again after exit code 5"

    assert night.nightly("1999-12-31") == ExitCode.USER_ERROR == int(night.kept("1999-12-31", "code"))
    return f"{dates.ROWS} rows, each once; locked: {BUSY}; again: nothing to do; without input: 2"


# ---- systemd ----


def analyze() -> str:
    if (found := shutil.which("systemd-analyze")) is None:
        raise Missing("no systemd-analyze")
    return found


def verified(work: Path, spoil: tuple[str, str] | None = None) -> str:
    """What systemd-analyze says of the units, nothing if all is well. It ends in 0 for keys that it doesn't know."""
    for path in SYSTEMD.glob("batchq@.*"):
        text = path.read_text().replace("/opt/batchq/", f"{ROOT}/")
        (work / path.name).write_text(re.sub(*spoil, text) if spoil else text)
    command = [analyze(), "verify", "--man=no", *(str(path) for path in work.glob("batchq@.*"))]
    return subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout


def units_verify(work: Path) -> str:
    """systemd reads the units without a word, and has words for a spoilt one."""
    assert (words := verified(work)) == "", words
    assert "RestartSecs" in verified(work, ("RestartSec=", "RestartSecs="))
    assert "gone.sh" in verified(work, (r"label\.sh", "gone.sh"))
    timer = unit("timer")["Timer"]
    said([analyze(), "calendar", "--iterations=2", timer["OnCalendar"]])
    return f"{timer['OnCalendar']}"


def by_systemd(work: Path) -> str:
    """What the service starts, as a process: a SIGTERM ends it as the unit says, and another start does the rest."""
    night = Night(work, dates.SLOW)
    date = f"{datetime.now(UTC) - timedelta(days=1):%Y-%m-%d}"
    night.give(date)
    service = unit("service")["Service"]
    command = night.here(service["ExecStart"]).replace("%i", "tickets").split()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + PATIENCE_S
        while len(night.written(date)) < 3:
            assert process.poll() is None and time.monotonic() < deadline, "it didn't get so far"
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(float(service["TimeoutStopSec"])) == ExitCode.STOPPED
    before = night.written(date)
    assert len(before) < dates.SHARDS
    said(command)
    assert before.items() <= night.written(date).items(), "another start wrote what was committed"
    night.require_once(date)
    return f"{dates.ROWS} rows, each once; stopped after {len(before)} of {dates.SHARDS} shards"


CHECKS = [
    Check("cron", "scripts are shell; exit codes as in Airflow", How.SCHEMA, agree, quick=True),
    Check("cron", "a cron daemon labels yesterday; flock, logs, exit codes", How.RAN, by_cron),
    Check("systemd", "systemd-analyze verify and calendar", How.SCHEMA, units_verify),
    Check("systemd", "what the service starts: stopped by SIGTERM, started again", How.RAN, by_systemd),
]
