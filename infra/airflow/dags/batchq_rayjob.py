"""Label each date's input in a Ray cluster of its own, as your RayJob or RayCronJob has it.

Its variables are those of batchq_command.py beside it, and

    batchq_rayjob_manifest    a file that `kubectl kustomize` wrote, as batchq_kubernetes.py says

batchq_rayjob_options has to say at least cluster=ray cluster.replicas=4 cluster.wait_s=1800, with your number. The
connection kubernetes_default says which cluster.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pendulum
from airflow.sdk import DAG, Asset, CronDataIntervalTimetable
from batchq_command import Command
from batchq_kubernetes import BatchqPodOperator, BatchqRayJobOperator

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
    label = BatchqRayJobOperator(
        task_id="label",
        command=COMMAND,
        outlets=[Asset(COMMAND.dag_id)],
        max_active_tis_per_dag=1,  # of a backfill too, which counts its runs apart
        execution_timeout=timedelta(hours=12),
    )
    find_input >> label
