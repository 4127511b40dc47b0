"""OpenLineage: what a run reads and writes, and how it ended, where the environment says who wants to know.

Its own client sends the events, configured by OPENLINEAGE_URL or OPENLINEAGE_CONFIG as everywhere else; a thread of its
own waits for it, so that the run neither waits nor fails.
"""

from __future__ import annotations

import logging
import os
import queue
import re
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from batchq import storage
from batchq.account.events import Event, Kind
from batchq.config import Config
from batchq.storage.names import split

if TYPE_CHECKING:
    from openlineage.client.event_v2 import RunEvent

CLOSE_SECONDS = 5.0  # what isn't delivered yet is given at the end
PARENT = "OPENLINEAGE_PARENT_ID"  # namespace/job/run id of what started this, as other integrations name it
PRODUCER = "urn:python:batchq"  # who tells it, as a URI
STATES = {
    Kind.started: "RUNNING",
    Kind.completed: "COMPLETE",
    Kind.failed: "FAIL",
    Kind.stopped: "ABORT",
}


def asked(environment: Mapping[str, str]) -> str | None:
    """The variable that asks for events, if one does."""
    if environment.get("OPENLINEAGE_DISABLED", "").strip().lower() == "true":
        return None
    names = (n for n in sorted(environment) if n in ("OPENLINEAGE_URL", "OPENLINEAGE_CONFIG"))
    transport = (n for n in sorted(environment) if n.startswith("OPENLINEAGE__TRANSPORT"))
    return next((name for name in (*names, *transport) if environment[name]), None)


def open_lineage(config: Config, output: str, warn: Callable[[str], None]) -> Lineage | None:
    """A listener of a run's events, if the environment asks for one. One warning if its client isn't installed, or
    can't be made of what the environment says."""
    variable = asked(os.environ)
    if variable is None:
        return None
    try:
        from openlineage.client import OpenLineageClient
    except ImportError:
        warn(f"{variable} is set, but openlineage-python isn't installed: pip install 'batchq[lineage]'; none is told")
        return None
    logging.getLogger("openlineage").setLevel(logging.CRITICAL)  # it says no more than what is warned of here
    try:
        client = OpenLineageClient()
    except Exception as error:  # whatever its configuration may lack
        warn(f"{variable}: OpenLineage's client can't be made of it: {type(error).__name__}")
        return None
    return Lineage(config, output, client.emit, warn)


class Lineage:
    """One run in OpenLineage's words: START at once, then what the events say. A listener of those."""

    def __init__(
        self, config: Config, output: str, send: Callable[[RunEvent], Any], warn: Callable[[str], None]
    ) -> None:
        from openlineage.client.uuid import generate_new_uuid

        self._send, self._warn = send, warn
        self._job = config.job.name
        self._id = str(generate_new_uuid())
        entries = filter(None, (part.strip() for part in config.input.path.split(",")))
        self._inputs = [_dataset(folder_of(storage.normalize(entry))) for entry in entries]
        self._output = _dataset(storage.join(output, "data"))
        self._waiting: queue.SimpleQueue[RunEvent | None] = queue.SimpleQueue()
        self._failed: list[str] = []
        self._thread = threading.Thread(target=self._deliver, name="batchq-lineage", daemon=True)
        self._thread.start()
        self._tell("START", {})

    def __call__(self, event: Event) -> None:
        if state := STATES.get(event.kind):
            self._tell(state, event.data)

    def close(self) -> None:
        """Wait for what isn't delivered yet, CLOSE_SECONDS at most; warn if something wasn't."""
        self._waiting.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._warn("OpenLineage: not all events were delivered in time")
        elif self._failed:
            self._warn(f"OpenLineage: {len(self._failed)} events couldn't be delivered: {self._failed[-1]}")

    def _deliver(self) -> None:
        while (event := self._waiting.get()) is not None:
            try:
                self._send(event)
            except Exception as error:  # of any transport
                response = getattr(error, "response", None)
                status = getattr(response, "status_code", None)
                self._failed.append(f"HTTP {status}" if status else type(error).__name__)

    def _tell(self, state: str, data: Mapping[str, Any]) -> None:
        from openlineage.client import event_v2 as ol
        from openlineage.client.facet_v2 import error_message_run, output_statistics_output_dataset, parent_run

        facets: dict[str, Any] = {}
        # A namespace may hold slashes, as a URL does; the job's name and the run's id don't.
        if len(parent := os.environ.get(PARENT, "").rsplit("/", 2)) == 3:
            namespace, job, run = parent
            facets["parent"] = parent_run.ParentRunFacet(
                run=parent_run.Run(runId=run), job=parent_run.Job(namespace=namespace, name=job)
            )
        if data.get("reason"):
            facets["errorMessage"] = error_message_run.ErrorMessageRunFacet(data["reason"], "Python")
        counted: dict[str, Any] = {}
        if (rows := data.get("rows")) is not None:
            facet = output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet(rowCount=rows)
            counted["outputStatistics"] = facet
        self._waiting.put(
            ol.RunEvent(
                eventType=ol.RunState(state),
                eventTime=datetime.now(UTC).isoformat(),
                run=ol.Run(runId=self._id, facets=facets),
                job=ol.Job(namespace=os.environ.get("OPENLINEAGE_NAMESPACE") or "default", name=self._job),
                inputs=[ol.InputDataset(namespace=namespace, name=name) for namespace, name in self._inputs],
                outputs=[ol.OutputDataset(*self._output, outputFacets=counted)],
                producer=PRODUCER,
            )
        )


def folder_of(uri: str) -> str:
    """What a pattern is below; anything else is itself."""
    before = re.split(r"[*?\[]", uri, maxsplit=1)[0]
    return uri if before == uri else before.rpartition("/")[0] or "/"


def _dataset(uri: str) -> tuple[str, str]:
    """Namespace and name by OpenLineage's rules."""
    from openlineage.client.naming import dataset as naming

    if not storage.is_remote(uri):
        of_file = naming.LocalFileSystem(uri)
        return of_file.get_namespace(), of_file.get_name()
    scheme, bucket, key = split(uri)
    if scheme == "az":
        account = os.environ.get("AZURE_STORAGE_ACCOUNT_NAME") or "unknown"
        of_azure = naming.ABFSS(bucket, account, key or "/")
        return of_azure.get_namespace(), of_azure.get_name()
    of_bucket = (naming.S3 if scheme == "s3" else naming.GCS)(bucket, key or "/")
    return of_bucket.get_namespace(), of_bucket.get_name()
