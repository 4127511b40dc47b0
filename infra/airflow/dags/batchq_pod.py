"""Label each date's input in one pod, as your CronJob has it.

Its variables are those of batchq_command.py beside it, and

    batchq_pod_manifest    a file that `kubectl kustomize` wrote, as batchq_kubernetes.py says

The connection kubernetes_default says which cluster.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pendulum
from airflow.sdk import DAG, Asset, CronDataIntervalTimetable
from batchq_command import Command
from batchq_kubernetes import BatchqPodOperator

COMMAND = Command(Path(__file__).stem)

with DAG(
    COMMAND.dag_id,
    schedule=CronDataIntervalTimetable(os.environ.get("BATCHQ_SCHEDULE", "0 2 * * *"), timezone="UTC"),
    start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
    catchup=False,
    max_active_runs=1,
    default_args={"retries": 3},
    doc_md=__doc__,
    tags=["batchq"],
):
    find_input = BatchqPodOperator(task_id="find_input", command=COMMAND, look=True)
    label = BatchqPodOperator(
        task_id="label",
        command=COMMAND,
        outlets=[Asset(COMMAND.dag_id)],
        max_active_tis_per_dag=1,  # of a backfill too, which counts its runs apart
        execution_timeout=timedelta(hours=12),
    )
    find_input >> label
