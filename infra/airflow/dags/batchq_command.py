"""batchq's command line for a date, and what Airflow is to do about its exit code. The DAGs beside this file share it.

A DAG is set up by Airflow variables that begin with its id, or by environment variables with AIRFLOW_VAR_ before the
same name in capitals. Those of batchq_daily:

    batchq_daily_job       as in `job=NAME`
    batchq_daily_input     where a date's input is, as strftime writes it: s3://corpus/tickets/ds=%Y-%m-%d
    batchq_daily_output    where its labels go: s3://corpus/labelled/ds=%Y-%m-%d. Each date needs a place of its own
    batchq_daily_ready     optional: what has to be there before a date is labelled, such as .../ds=%Y-%m-%d/_SUCCESS;
                           without it, any input
    batchq_daily_options   optional: more of batchq's command line: pricing.budget=20 'run.deadline=06:00 UTC'

A place is a folder, a file, a pattern, or one of them in s3://, az:// or gs://; batchq's own process looks for it, so
Airflow needs no credentials for it.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from datetime import datetime

from airflow.sdk import Variable
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException

# What batchq ends in; docs/decisions.md has the table.
RETRY = {
    1: "it failed",
    3: "a signal stopped it",
    7: "another driver is at work on this output",
}
NO_RETRY = {
    2: "bad configuration or input",
    4: "complete, but with too many failures; the output is there",
    5: "the gate refused every scheme",
    6: "the budget or the time for it is used up",
}
NOT_THERE = 99
LOOK = f"""
import sys
from batchq import errors, storage
try:
    there = storage.glob(sys.argv[1]).found
except errors.NotFound:
    there = []
except errors.BatchqError as error:
    sys.exit(f"batchq: {{error}}")
if not there:
    print(f"nothing is there yet: {{sys.argv[1]}}")
    sys.exit({NOT_THERE})
"""


@dataclass(frozen=True)
class Command:
    """Arguments of a Python that has batchq, by the variables of a DAG."""

    dag_id: str

    def setting(self, name: str, default: str | None = None) -> str:
        """Raises AirflowFailException, which isn't tried again, where it has to be set and isn't."""
        value = Variable.get(f"{self.dag_id}_{name}", default=default)
        if value is None:
            raise AirflowFailException(f"the Airflow variable {self.dag_id}_{name} isn't set")
        return str(value)

    def place(self, name: str, date: datetime | None) -> str:
        """The setting of that name, for a date."""
        if date is None:
            raise AirflowFailException("this run has no date: trigger it with a logical date")
        return date.strftime(self.setting(name))

    def look(self, date: datetime | None) -> list[str]:
        """Look whether there is anything to label; ends in NOT_THERE if not."""
        name = "ready" if self.setting("ready", "") else "input"
        return ["-c", LOOK, self.place(name, date)]

    def label(self, date: datetime | None) -> list[str]:
        # Quoted: to Hydra a comma, a brace and more mean something else.
        paths = [f'{name}.path="{self.place(name, date)}"' for name in ("input", "output")]
        return ["-m", "batchq", f"job={self.setting('job')}", *paths, *shlex.split(self.setting("options", ""))]


def judge(code: int) -> None:
    """Raise what an exit code means to Airflow: skip, fail, or try again, which goes on from where it ended."""
    if code == NOT_THERE:
        raise AirflowSkipException("there is nothing to label yet")
    if code in NO_RETRY:
        raise AirflowFailException(f"batchq ended in exit code {code}: {NO_RETRY[code]}")
    if code:
        raise AirflowException(
            f"batchq ended in exit code {code}: {RETRY.get(code, 'it was killed')}; another try goes on"
        )
