"""OpenTelemetry: a run as a trace, a span for each of its phases, where the environment says who wants it.

The SDK's own variables say where to: OTEL_EXPORTER_OTLP_ENDPOINT and the like. What started the run may hand its trace
on as TRACEPARENT.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from batchq.errors import exit_code_of, words_of

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
GRPC_PORT = 4317  # what collectors listen on for gRPC, where no protocol is said
CLOSE_SECONDS = 5.0  # what isn't delivered yet is given at the end
NEEDS = "opentelemetry-sdk and opentelemetry-exporter-otlp"


def asked(environment: Mapping[str, str]) -> str | None:
    """The variable that asks for traces, if one does."""
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    if exporter := environment.get("OTEL_TRACES_EXPORTER", ""):
        return None if exporter == "none" else "OTEL_TRACES_EXPORTER"
    return next((name for name in ENDPOINTS if environment.get(name)), None)


class Traces:
    """The spans of one run; without a tracer, none."""

    def __init__(self, provider: Any = None) -> None:
        """`provider`: the SDK's TracerProvider."""
        self._provider = provider
        self._tracer = provider and provider.get_tracer("batchq")

    @contextmanager
    def run(self, **attributes: str) -> Iterator[None]:
        """The trace's own span, around all phases; an error that ends the run is its status. Afterwards all is sent."""
        if self._tracer is None:
            yield
            return
        from opentelemetry.propagate import extract
        from opentelemetry.trace import Status, StatusCode

        carrier = {name.lower(): os.environ[name] for name in ("TRACEPARENT", "TRACESTATE") if name in os.environ}
        known = {f"batchq.{name}": value for name, value in attributes.items()}
        quiet = {"record_exception": False, "set_status_on_exception": False}  # a stack's words may quote a row
        try:
            with self._tracer.start_as_current_span("run", extract(carrier), attributes=known, **quiet) as span:
                try:
                    yield
                except BaseException as error:
                    span.set_attribute("batchq.exit_code", int(exit_code_of(error)))
                    span.set_status(Status(StatusCode.ERROR, words_of(error)))
                    raise
        finally:
            sending = threading.Thread(target=self._provider.shutdown, name="batchq-traces", daemon=True)
            sending.start()
            sending.join(CLOSE_SECONDS)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self._tracer is None:
            yield
            return
        from opentelemetry.trace import Status, StatusCode

        with self._tracer.start_as_current_span(name, record_exception=False, set_status_on_exception=False) as span:
            try:
                yield
            except BaseException as error:
                span.set_status(Status(StatusCode.ERROR, words_of(error)))
                raise

    def past(self, name: str, began: float, ended: float) -> None:
        """A phase that is over; both times are on time.monotonic()'s clock."""
        if self._tracer is not None:
            zero = time.time_ns() - int(time.monotonic() * 1e9)
            self._tracer.start_span(name, start_time=zero + int(began * 1e9)).end(zero + int(ended * 1e9))


def open_traces(warn: Callable[[str], None]) -> Traces:
    """Traces as the environment asks for. One warning if what it takes isn't installed."""
    variable = asked(os.environ)
    if variable is None:
        return Traces()
    try:
        exporter = _exporter(os.environ)
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        warn(f"{variable} is set, but {NEEDS} aren't installed: pip install 'batchq[traces]'; no trace is sent")
        return Traces()
    except ValueError as error:
        warn(f"{variable}: no trace is sent: {error}")
        return Traces()
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # it says no more than what is warned of here
    name = os.environ.get("OTEL_SERVICE_NAME") or "batchq"
    provider = TracerProvider(resource=Resource.create({"service.name": name}), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(_told(exporter, warn)))
    return Traces(provider)


def _exporter(environment: Mapping[str, str]) -> SpanExporter:
    """Raises ValueError for a name that isn't known here."""
    kind = environment.get("OTEL_TRACES_EXPORTER") or "otlp"
    if kind == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter(out=sys.stderr)  # standard output has the report
    if kind != "otlp":
        raise ValueError(f"OTEL_TRACES_EXPORTER={kind}: otlp, console or none")
    endpoint = next((environment[name] for name in ENDPOINTS if environment.get(name)), "")
    by_port = "grpc" if urlsplit(endpoint).port == GRPC_PORT else "http/protobuf"
    if next((environment[name] for name in PROTOCOLS if environment.get(name)), by_port) == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc import trace_exporter as grpc

        return grpc.OTLPSpanExporter()
    from opentelemetry.exporter.otlp.proto.http import trace_exporter as http

    return http.OTLPSpanExporter()


def _told(exporter: SpanExporter, warn: Callable[[str], None]) -> SpanExporter:
    """The same exporter; the first spans that can't be delivered are a warning."""
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    class Told(SpanExporter):
        warned = False

        def export(self, spans: Sequence[Any]) -> SpanExportResult:
            result = exporter.export(spans)
            if result is not SpanExportResult.SUCCESS and not self.warned:
                self.warned = True
                warn("OpenTelemetry: spans couldn't be delivered; the run goes on without them")
            return result

        def shutdown(self) -> None:
            exporter.shutdown()

    return Told()
