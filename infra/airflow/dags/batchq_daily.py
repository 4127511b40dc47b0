"""Label each date's input with batchq on an Airflow worker.

Its variables are those of batchq_command.py beside it, and

    batchq_daily_python    an interpreter that has batchq; never Airflow's own
    batchq_daily_folder    optional: the folder that holds the job's conf/, from which relative paths start

A copy of this file under another name is another DAG, with variables that begin with that name. BATCHQ_SCHEDULE in
the environment says when it runs, by default at 02:00 UTC for the day before.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pendulum
from airflow.sdk import DAG, Asset, CronDataIntervalTimetable, Metadata, task
from batchq_command import Command, judge

COMMAND = Command(Path(__file__).stem)
LABELLED = Asset(COMMAND.dag_id)  # a DAG with schedule=[Asset("batchq_daily")] runs once a date is labelled
GRACE_S = 40  # batchq ends within cluster.grace_seconds (25) of a SIGTERM


def run(arguments: list[str]) -> int:
    """Run batchq's interpreter to its end: its exit code. A SIGTERM that comes meanwhile is passed on."""
    command = [COMMAND.setting("python"), *arguments]
    # Airflow kills a task outright 5 s after a SIGTERM, and the system may at any time: batchq gets a SIGTERM then.
    if setpriv := shutil.which("setpriv"):
        command = [setpriv, "--pdeathsig", "TERM", *command]
    folder = COMMAND.setting("folder", ".")
    # A session of its own: a signal to the task's whole group would reach batchq's replicas before it can save.
    child = subprocess.Popen(command, cwd=folder, stderr=subprocess.STDOUT, start_new_session=True)
    former = signal.signal(signal.SIGTERM, lambda number, frame: child.send_signal(number))
    try:
        code = child.wait()
        return code if code >= 0 else 128 - code  # as a shell has it: 137 is a SIGKILL
    except BaseException:  # such as the end of execution_timeout
        child.terminate()
        child.wait(GRACE_S)
        raise
    finally:
        signal.signal(signal.SIGTERM, former)


with DAG(
    COMMAND.dag_id,
    schedule=CronDataIntervalTimetable(os.environ.get("BATCHQ_SCHEDULE", "0 2 * * *"), timezone="UTC"),
    start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
    catchup=False,
    max_active_runs=1,  # dates would share the same devices; a backfill counts apart, hence the same of the task
    default_args={"retries": 3},  # each after [core] default_task_retry_delay, 5 minutes
    doc_md=__doc__,
    tags=["batchq"],
):

    @task
    def find_input(logical_date: datetime | None) -> None:
        judge(run(COMMAND.look(logical_date)))

    @task(outlets=[LABELLED], max_active_tis_per_dag=1, execution_timeout=timedelta(hours=12))
    def label(logical_date: datetime | None) -> Iterator[Metadata]:
        judge(run(COMMAND.label(logical_date)))
        yield Metadata(LABELLED, {"output": COMMAND.place("output", logical_date)})

    find_input() >> label()
