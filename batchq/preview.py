"""What would happen: the plan in words, and the first rows with their prompts and answers."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from batchq import capacity, estimate, forecast, models, plan, read, sample, storage, tune
from batchq.batch import too_long
from batchq.config import Config, Scheme, check
from batchq.errors import EngineError, RowError
from batchq.fit import Fit
from batchq.hardware import Hardware, detect
from batchq.models import Model
from batchq.pool import Pool
from batchq.progress import Progress
from batchq.quantize import quantize
from batchq.records import Failure, Plan, Row
from batchq.run import choose, limited, resumable, worker_spec
from batchq.sample import Lengths
from batchq.scheme import FACTS
from batchq.worker import Worker

ROWS = 5  # previewed unless input.limit says otherwise


def describe(config: Config) -> str:
    """`batchq plan`: inputs, shards, scheme, limits and an estimate of tokens; starts no engine, writes nothing."""
    check(config)
    output = storage.normalize(config.output.path)
    stored = plan.load(output)
    if not stored:
        plan.reused(config)
    model = models.resolve(config.model)
    new = resumable(stored, config, model, output) if stored else []
    with Pool(config.cluster, config.engine, models.cache_dir() / "logs") as pool:
        here = pool.hardware()
    choice = choose(config, stored, model, here)
    scheme, why = choice.scheme, choice.why
    draft = stored or plan.make(config, model.digest, scheme, "")
    fit = Fit(model, here, config)
    lengths = sample.lengths(config, draft, model.path)
    remaining = len(plan.standing(stored, output).remaining) if stored else len(draft.shards)
    stores = fit.memory(scheme).weights * config.cluster.tensor_parallel_size
    _, reasons = tune.settled(config, draft, model.path, stores, here, lengths)
    lines = [
        f"batchq · plan of {config.job.name}",
        f"  hardware   {hardware_words(here)}",
        f"  model      {model.name} · {weights(model)}",
        f"  scheme     {scheme.value}: {why}",
        f"  input      {len(draft.objects)} objects, {sum(o.size for o in draft.objects):,} bytes, {draft.format} · "
        f"columns {', '.join(draft.columns)}",
        f"  shards     {len(draft.shards)}, about {draft.rows_per_part:,} rows each",
        f"  prompt     {tokens(draft, lengths, config.input.limit)}",
        f"  output     {state(draft, remaining, output) if stored else new_output(draft, output)}",
        f"  estimate   {estimate.words(config, draft, fit, scheme, lengths, remaining / max(1, len(draft.shards)))}",
    ]
    if whole := sum(shard.unit == "stream" for shard in draft.shards):
        lines.append(
            f"  note       {whole} of the shards are whole files, since a CSV or a compressed file can't be split: "
            "one engine reads each"
        )
    warnings = tune.too_long(config, model.path, lengths), sample.strange(config, sample.golds(config, draft))
    lines += [f"  warning    {warning}" for warning in warnings if warning]
    lines += [f"  {'engine' if i == 0 else '':<11}{r.name:<23}{r.value:>9}  {r.why}" for i, r in enumerate(reasons)]
    if not model.quantized:
        lines += [f"  {'schemes' if i == 0 else '':<11}{line}" for i, line in enumerate(forecast.of_job(fit, config))]
    if new:
        lines.append(
            f"  note       {len(new)} input files appeared since the plan and are not part of it: {', '.join(new[:3])}"
        )
    return "\n".join(lines)


def hardware_words(here: Hardware) -> str:
    if here.gpus:
        kinds = {
            f"{g.name} ({g.memory / 2**30:.0f} GiB, capability {g.capability[0]}.{g.capability[1]})" for g in here.gpus
        }
        return (
            f"{len(here.gpus)} x {', '.join(sorted(kinds))} · {len(here.cores)} cores · {here.memory / 2**30:.0f} GiB"
        )
    return f"no GPU · {len(here.cores)} cores of {here.cpu} · {here.memory / 2**30:.1f} GiB free"


def weights(model: Model) -> str:
    size = capacity.stored_bytes(capacity.read_tensors(model.path))
    return f"{size / 1e9:.2f} GB of weights" + (f", {model.quantized}" if model.quantized else "")


def tokens(draft: Plan, lengths: Lengths, limit: int | None) -> str:
    """How long the prompts are, in a sample, and what that makes for the corpus where rows can be counted."""
    if not lengths.tokens:
        return "none of the sampled rows can be asked; see `preview`"
    rows, mean = sample.expected_rows(draft, limit), lengths.mean
    whole = "how many rows there are, only reading them tells"
    if rows is not None:
        counted = limit is not None or all(shard.unit != "stream" for shard in draft.shards)
        whole = f"about {mean * rows:,.0f} for {'up to' if counted else 'about'} {rows:,} rows"
    return (
        f"{mean:,.0f} tokens a row, median {lengths.median:,}, p99 {lengths.at(0.99):,}, longest {lengths.longest:,} "
        f"({len(lengths.tokens):,} sampled); {whole}"
    )


def new_output(draft: Plan, output: str) -> str:
    return f"{output} · new" + (f", with what can be reused of {draft.reuse}" if draft.reuse else "")


def state(stored: Plan, remaining: int, output: str) -> str:
    shards = len(stored.shards)
    return f"{output} · {shards - remaining} of {shards} shards committed; a run resumes"


def preview(config: Config) -> str:
    """The first rows, prompt and answer side by side, on the real engine; commits nothing.

    Shows row text, because that is what was asked for.
    """
    check(config)
    config = limited(config, config.input.limit or ROWS)
    model, here = models.resolve(config.model), detect()
    scheme = choose(config, None, model, here).scheme
    draft = plan.make(config, model.digest, scheme, "")
    log = models.cache_dir() / "logs" / config.job.name / "preview.log"
    checkpoint = quantize(
        model,
        Scheme.none if FACTS[scheme].calibrated else scheme,  # a look at the prompt isn't worth minutes of calibration
        config.quantization,
        lambda: [],
        log,
        on_progress=lambda _: None,
    )
    spec = worker_spec(config, draft, checkpoint, here)
    note = f"\n\nfrom the unquantized model; the run quantizes to {scheme.value}" if FACTS[scheme].calibrated else ""
    Progress().step(f"the engine starts (log: {log})")
    try:
        with _chatter_to(log):
            return asyncio.run(_answers(config, draft, Worker(spec))) + note
    except EngineError as error:
        raise EngineError(f"{error}; log: {log}") from error


@contextmanager
def _chatter_to(log: Path) -> Iterator[None]:
    """What this process and those that it starts print goes to the log, so that the rows stand alone."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [(stream, os.dup(stream)) for stream in (1, 2)]
    with log.open("ab") as file:
        for stream, _ in kept:
            os.dup2(file.fileno(), stream)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, copy in kept:
            os.dup2(copy, stream)
            os.close(copy)


async def _answers(config: Config, draft: Plan, worker: Worker) -> str:
    await worker.start()
    try:
        return "\n\n".join([await _answered(worker, row) for row in _rows(draft)])
    finally:
        await worker.close()


def _rows(draft: Plan) -> list[Row]:
    found = []
    for shard in draft.shards:
        source = draft.objects[shard.object]
        rows = read.read_rows(
            source, draft.format, shard.unit, shard.start, shard.stop or 2**62, columns=list(draft.columns)
        )
        found += [row for row in rows if shard.unit != "stream" or not shard.stop or row.position < shard.stop]
    return found


async def _answered(worker: Worker, row: Row) -> str:
    head = f"── {row.id} " + "─" * max(3, 76 - len(row.id))
    try:
        if row.error:
            raise RowError(*row.error)
        message = worker.task.render(row.columns)
        prompt = worker.task.encode([message])[0]
        if len(prompt) > (room := worker.batches.room):
            return _unanswered(head, too_long(len(prompt), room))
        answer: Any = worker.task.answer(await worker.engine.ask(prompt, worker.task.sampling))
    except RowError as error:
        return _unanswered(head, Failure(error.code, error.message))
    shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in answer.columns.items()}
    words = json.dumps(shown, ensure_ascii=False, default=lambda v: v)
    return f"{head}\n{worker.task.framed(message)}\n── answer ({len(prompt)} prompt tokens)\n{words}"


def _unanswered(head: str, failure: Failure) -> str:
    return f"{head}\n── no answer ({failure.code})\n{failure.message}"
