"""`batchq plan job=NAME`: what would happen, how long and for how much; starts no engine, writes nothing."""

from __future__ import annotations

from datetime import UTC, datetime

from batchq import input
from batchq.config import Config, Scheme
from batchq.job.run import find_resume, find_source
from batchq.job.scheme import choose_scheme
from batchq.job.session import open_session
from batchq.machine.hardware import Hardware
from batchq.model.source import Model, resolve_for
from batchq.model.tensors import read_tensors, stored_bytes
from batchq.plan import sample, warnings
from batchq.plan.draft import make_plan
from batchq.plan.inputs import left_out_words
from batchq.plan.sample import Lengths
from batchq.plan.source import Source
from batchq.records import Plan
from batchq.sizing import estimate, forecast
from batchq.sizing.fit import Fit
from batchq.sizing.lengths import too_long
from batchq.sizing.settings import Weights, resolve_settings


def describe(config: Config) -> str:
    """`batchq plan`: inputs, shards, scheme, limits and an estimate of tokens; starts no engine, writes nothing."""
    with open_session(config, "plan") as session:
        model = resolve_for(config)
        resume = find_resume(session, model)
        source = None
        if not resume:
            session, source = find_source(session, model, resume)
            config = session.config
        hardware, output = session.hardware, session.output
        if resume:
            scheme, why = Scheme(resume.plan.quantization), "as this run was planned"
        else:
            choice = choose_scheme(session, model)
            scheme, why = choice.scheme, choice.why
    drafted = resume.plan if resume else make_plan(config, model.digest, scheme, "")
    fit = Fit(model, hardware, config)
    looked = sample.look(config, drafted, model.path)
    lengths = looked.lengths()
    remaining = len(resume.committed.remaining if resume else drafted.shards)
    weights = fit.memory(scheme).weights * config.cluster.tensor_parallel_size
    reasons = resolve_settings(config, drafted, Weights(model.path, weights), hardware, lengths).reasons
    left = remaining / max(1, len(drafted.shards))
    left_out = left_out_words(drafted)
    lines = [
        f"batchq · plan of {config.job.name}" + (f" · {config.input.date}" if config.input.date else ""),
        f"  hardware   {hardware_words(hardware)}",
        f"  model      {model.name} · {weights_words(model)}",
        f"  scheme     {scheme.value}: {why}",
        f"  input      {input_words(drafted)}",
        *([f"  csv        {dialect}"] if (dialect := input.dialect_words(drafted.objects)) else ()),
        *([f"  left out   {left_out}"] if left_out else []),
        f"  shards     {len(drafted.shards)}, about {drafted.rows_per_part:,} rows each",
        f"  prompt     {tokens(drafted, lengths, config.input.limit)}",
        f"  output     {state(drafted, remaining, output) if resume else new_output(output, config, source)}",
        f"  estimate   {estimate.words(config, drafted, fit, scheme, lengths, left)}",
    ]
    if config.run.deadline is not None:
        expected = estimate.labelling(config, drafted, fit, scheme, lengths, left)
        lines.append(f"  deadline   {estimate.deadline_words(config, expected, datetime.now(UTC))}")
    if whole := sum(shard.range.unit == "stream" and not shard.more for shard in drafted.shards):
        lines.append(
            f"  note       {whole} of the shards are whole files, since a CSV or a compressed file can't be split: "
            "one engine reads each"
        )
    if looked.task.strips:
        lines.append("  note       the model's chat template takes the spaces from around a message")
    doubts = [too_long(config, model.path, lengths), *warnings.of_job(config, drafted, looked)]
    lines += [f"  warning    {doubt}" for doubt in doubts if doubt]
    lines += [f"  {'engine' if i == 0 else '':<11}{r.name:<23}{r.value:>9}  {r.why}" for i, r in enumerate(reasons)]
    if not model.quantized:
        lines += [f"  {'schemes' if i == 0 else '':<11}{line}" for i, line in enumerate(forecast.of_job(fit, config))]
    if resume and (new := resume.new_inputs):
        lines.append(
            f"  note       {len(new)} input files appeared since the plan and are not part of it: {', '.join(new[:3])}"
        )
    return "\n".join(lines)


def hardware_words(hardware: Hardware) -> str:
    if hardware.gpus:
        kinds = {
            f"{g.name} ({g.memory / 2**30:.0f} GiB, capability {g.capability[0]}.{g.capability[1]})"
            for g in hardware.gpus
        }
        memory = f"{hardware.memory / 2**30:.0f} GiB"
        return f"{len(hardware.gpus)} x {', '.join(sorted(kinds))} · {len(hardware.cores)} cores · {memory}"
    return f"no GPU · {len(hardware.cores)} cores of {hardware.cpu} · {hardware.memory / 2**30:.1f} GiB free"


def weights_words(model: Model) -> str:
    size = stored_bytes(read_tensors(model.path))
    return f"{size / 1e9:.2f} GB of weights" + (f", {model.quantized}" if model.quantized else "")


def input_words(draft: Plan) -> str:
    size = sum(o.size for o in draft.objects)
    article = "an" if draft.snapshot.startswith("I") else "a"
    of = f" of {article} {draft.snapshot}" if draft.snapshot else ""
    return f"{len(draft.objects)} objects, {size:,} bytes, {draft.format}{of} · columns {', '.join(draft.columns)}"


def tokens(draft: Plan, lengths: Lengths, limit: int | None) -> str:
    """How long the prompts are, in a sample, and what that makes for the corpus where rows can be counted."""
    if not lengths.tokens:
        return "none of the sampled rows can be asked; see `preview`"
    rows, mean = sample.expected_rows(draft, limit), lengths.mean
    whole = "how many rows there are, only reading them tells"
    if rows is not None:
        counted = limit is not None or all(range.unit == "rows" for shard in draft.shards for _, range in shard.pieces)
        whole = f"about {mean * rows:,.0f} for {'up to' if counted else 'about'} {rows:,} rows"
    return (
        f"{mean:,.0f} tokens per row, median {lengths.median:,}, p99 {lengths.percentile(99):,}, "
        f"longest {lengths.longest:,} ({len(lengths.tokens):,} sampled); {whole}"
    )


def new_output(output: str, config: Config, source: Source | None) -> str:
    if source:
        return f"{output} · new, with what can be reused of {source.output}, {source.answers:,} answers"
    return f"{output} · new" + (", with nothing to take over" if config.output.incremental else "")


def state(plan: Plan, remaining: int, output: str) -> str:
    shards = len(plan.shards)
    return f"{output} · {shards - remaining} of {shards} shards committed; a run resumes"
