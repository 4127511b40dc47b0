"""Which scheme is served: chosen for the hardware, and judged on the job's own rows, rung by rung."""

from __future__ import annotations

import threading

from batchq.account.events import Kind
from batchq.config import Config, EngineKind, KvCache, Scheme
from batchq.errors import ConfigError, GateRefused
from batchq.job.gate import evaluate_gate
from batchq.job.served import Served, ensure_checkpoint, serve
from batchq.job.session import Session, open_session
from batchq.machine.words import gib
from batchq.model.scheme import SCHEMES
from batchq.model.source import Model, resolve_for
from batchq.model.tensors import read_tensors, stored_bytes
from batchq.plan.draft import make_plan, with_scheme
from batchq.quantize.card import read_card
from batchq.quantize.verdict import Verdict
from batchq.records import Plan
from batchq.sizing.fit import Choice, Fit, require_memory


def choose_scheme(session: Session, model: Model) -> Choice:
    """The scheme of a new run, why, and what is tried after it.

    Raises ConfigError if the model can't be served in that scheme, or doesn't fit.
    """
    config = session.config
    if config.engine.kind is EngineKind.fake and config.quantization.scheme is Scheme.auto:
        return Choice(Scheme.none, "the fake engine reads no weights", ())
    hardware = session.hardware
    if config.quantization.kv_cache is KvCache.fp8 and (hardware.capability or (0, 0)) < SCHEMES[Scheme.fp8].since:
        raise ConfigError("quantization.kv_cache=fp8: takes a GPU that computes in FP8; choose auto")
    fit = Fit(model, hardware, config)
    choice = fit.choose()
    if config.engine.kind is EngineKind.vllm:
        require_memory(fit.memory(choice.scheme), choice.scheme, hardware, config)
    return choice


def choose_checkpoint(
    session: Session, drafted: Plan, model: Model, choice: Choice
) -> tuple[Plan, Served, list[Verdict]]:
    """Quantize and judge, rung by rung, until the gate accepts one or has nothing to judge by: (plan, what is served,
    all verdicts).

    Raises GateRefused when no rung passes.
    """
    verdicts: list[Verdict] = []
    why = choice.why
    for scheme in (choice.scheme, *choice.fallback):
        if scheme is not choice.scheme:
            drafted = with_scheme(drafted, session.config, scheme)
        objects, shards = len(drafted.objects), len(drafted.shards)
        session.progress.step(f"{objects} input objects in {shards} shards · {scheme.value}: {why}")
        served = serve(session, drafted, model, scheme)
        with session.traces.phase("gate"):
            verdict = evaluate_gate(session, drafted, served)
        if verdict is None:
            return drafted, served, verdicts
        verdicts.append(verdict)
        session.progress.step(f"gate: {verdict.words()}")
        session.events.emit(
            Kind.gated,
            scheme=verdict.scheme,
            verdict=verdict.verdict,
            measure=verdict.measure,
            recovery=verdict.recovery,
            accepted=verdict.accepts(session.config.gate.strict),
        )
        if verdict.accepts(session.config.gate.strict):
            return drafted, served, verdicts
        session.pool.release()  # the engine that answered for it
        unsure = verdict.verdict == "undecided"
        why = f"too few rows tell about {scheme.value}" if unsure else f"{scheme.value} costs too much quality"
    raise GateRefused(
        f"no scheme that fits reaches gate.recovery={session.config.gate.recovery}: "
        f"{'; '.join(map(_refused, verdicts))}. Lower it, name others in gate.fallback, or use a larger machine"
    )


def _refused(verdict: Verdict) -> str:
    words = f"{verdict.scheme} keeps {verdict.recovery:.1%} of {verdict.measure}"
    if verdict.verdict == "undecided":
        words += ", undecided under gate.strict"
        words += f" (about {verdict.needs:,} rows would decide)" if verdict.needs else ""
    return words


def quantize_only(config: Config, stop: threading.Event | None = None) -> str:
    """`batchq quantize`: make the checkpoint or find it; returns lines that say where it is."""
    with open_session(config, "quantize", stop) as session:
        model = resolve_for(config)
        choice = choose_scheme(session, model)
        drafted = make_plan(config, model.digest, choice.scheme, checkpoint="")
        made = ensure_checkpoint(session, drafted, model, choice.scheme)
    before, after = stored_bytes(read_tensors(model.path)), made.bytes
    how = "from the cache" if made.cached else f"made in {made.seconds:.0f} s"
    if choice.scheme is Scheme.none:
        how = "as it is"
    elif peaks := read_card(made.path).get("peak_bytes"):
        how += ", at most " + " and ".join(f"{gib(n)} of {where} memory" for where, n in peaks.items())
    sizes = f"{before / 1e6:,.1f} MB -> {after / 1e6:,.1f} MB"
    return f"{choice.scheme.value}: {choice.why}\n{model.name}: {sizes}, {how}\n{made.path}"
