"""Input listing + what is already committed -> a frozen, stored Plan.

A resume obeys the stored plan. What decides an answer is named in `Plan.ingredients`; a run whose
ingredients differ from the stored ones is refused, and the difference is named.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import uuid
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from batchq import failpoint, read, storage, write
from batchq.config import Config, KvCache, Scheme, Unreadable
from batchq.errors import AlreadyExists, Changed, ConfigError, InputError, NotFound, OutputTaken, StorageError
from batchq.records import InputObject, Plan, Receipt, Shard, sealed, unsealed
from batchq.scheme import FACTS
from batchq.task import task
from batchq.task.prompt import prompt_columns

NAME = "meta/plan.json"
TAPERED = 8  # shards at the end of a large plan that are cut smaller

# Of vLLM's engine arguments, those that change what a model answers; the others may differ on a resume.
ANSWER_OPTIONS = {"dtype", "hf_overrides", "kv_cache_dtype", "load_format", "quantization", "tokenizer"}

# What a person changed when this ingredient differs.
FIELDS = {
    "model": "model.path (or the model's files)",
    "engine": "engine.kind or engine.options",
    "quantization": "quantization (its scheme, calibration, group_size, ignore or kv_cache)",
    "prompt": "task.prompt or task.system",
    "labels": "task.labels, task.kind, task.codes or task.name",
    "sampling": "task.max_tokens, task.temperature, task.stop or task.seed",
    "template": "model.chat_template",
    "length": "engine.max_model_len",
    "columns": "input.columns, output.columns, input.format or task.gold",
    "inputs": "input.path or input.limit",
    "reuse": "output.reuse",
}
KEYED = ("model", "engine", "quantization", "prompt", "labels", "sampling")  # with another, no batchq_key is the same


def ingredients(config: Config, model: str, scheme: Scheme) -> dict[str, str]:
    """All that decides an answer but the input objects, by name, each as text. `model`: its digest."""
    quantization = config.quantization
    recipe: list[Any] = [scheme.value]
    options = {k: v for k, v in config.engine.options.items() if k in ANSWER_OPTIONS}
    if quantization.kv_cache is not KvCache.auto:
        recipe += [quantization.kv_cache.value]
    if scheme not in (Scheme.none, Scheme.auto):
        recipe += [quantization.ignore, quantization.group_size]
        if FACTS[scheme].calibrated:
            recipe += [quantization.samples, quantization.max_tokens, quantization.seed, quantization.calibration]
            recipe += [quantization.smoothing, quantization.dampening]
    return {
        "model": model,
        "engine": json.dumps([config.engine.kind.value, options], sort_keys=True, default=str),
        "quantization": json.dumps(recipe),
        **task.ingredients(config.task),
        "template": json.dumps(config.model.chat_template, sort_keys=True),
        "length": str(config.engine.max_model_len),
        "columns": json.dumps(
            [config.input.columns, config.output.columns, config.input.format.value, config.task.gold]
        ),
        "inputs": json.dumps([config.input.path, config.input.limit]),
        **({"reuse": storage.normalize(config.output.reuse)} if config.output.reuse else {}),
    }


def fingerprint(parts: dict[str, str], objects: Iterable[InputObject]) -> str:
    """sha256 over the ingredients and every input object's name, size and etag."""
    listing = [[o.name, o.size, o.etag] for o in objects]
    return hashlib.sha256(json.dumps([parts, listing], sort_keys=True).encode()).hexdigest()


def make(config: Config, model: str, scheme: Scheme, checkpoint: str) -> Plan:
    """Plan a new run. `model` and `checkpoint` are digests of what is named and of what is served.

    Raises InputError for an input that is missing or empty, ConfigError for columns that clash.
    """
    objects = read.list_input(config.input)
    format = read.format_of(objects[0].name, config.input.format)
    unreadable: dict[str, str] = {}
    if config.input.unreadable is Unreadable.quarantine:
        unreadable = read.unreadable(objects, format)
        objects = [each for each in objects if each.name not in unreadable]
        if not objects:
            raise InputError(f"not one input file can be read; the first: {next(iter(unreadable.values()))}")
    schema = read.infer_schema(objects, format, config.input.columns)
    prompt_columns(config.task.prompt, schema.names)
    for field, name in {"task.gold": config.task.gold, "input.id": config.input.id}.items():
        if name is not None and name not in schema.names:
            raise InputError(f"{field}={name}: no such column; columns are {', '.join(schema.names)}")
    chosen = list(schema.names) if config.output.columns is None else config.output.columns
    if unknown := sorted(set(chosen) - set(schema.names)):
        raise InputError(
            f"output.columns names {unknown[0]}, which is no column; columns are {', '.join(schema.names)}"
        )
    everything = config.input.columns is None and config.output.columns is None
    output = write.output_schema(_subset(schema, chosen), config.task, extra=format == "jsonl" and everything)
    parts = ingredients(config, model, scheme)
    return Plan(
        fingerprint=fingerprint(parts, objects),
        ingredients=parts,
        job=config.job.name,
        objects=tuple(objects),
        shards=tuple(_shards(config, objects, format)),
        format=format,
        schema=write.schema_to_text(output),
        columns=tuple(schema.names),
        rows_per_part=config.output.rows_per_shard,
        quantization=scheme.value,
        model=model,
        unreadable=unreadable,
        checkpoint=checkpoint,
        reuse=parts.get("reuse", ""),
    )


def _subset(schema: Any, names: list[str]) -> Any:
    import pyarrow as pa

    return pa.schema([schema.field(name) for name in names])


def _shards(config: Config, objects: list[InputObject], format: str) -> list[Shard]:
    cut = functools.partial(read.split, format=format, rows_per_shard=config.output.rows_per_shard)
    with ThreadPoolExecutor(read.OPENED_AT_ONCE) as threads:  # each is a request to the store
        ranges = [(number, *each) for number, cuts in enumerate(threads.map(cut, objects)) for each in cuts]
    if len(ranges) > 4 * TAPERED:
        ranges = read.taper(ranges, TAPERED)
    if config.input.limit is not None:
        ranges = list(_limited(ranges, objects, format, config.input.limit))
    return [Shard(index, *place) for index, place in enumerate(ranges)]


def expected_rows(plan: Plan, limit: int | None) -> int | None:
    """About how many rows the shards hold, of which there are `limit` at most; None where only reading would tell: of a
    CSV or a compressed file."""
    if limit is not None:
        return limit
    if any(shard.unit == "stream" for shard in plan.shards):
        return None
    return sum(s.stop - s.start if s.unit == "rows" else plan.rows_per_part for s in plan.shards)


def _limited(
    ranges: list[tuple[int, str, int, int]], objects: list[InputObject], format: str, limit: int
) -> Iterable[tuple[int, str, int, int]]:
    """The first `limit` rows. Byte ranges and streams are read up to there, because only rows can be counted."""
    left = limit
    for number, unit, start, stop in ranges:
        if not left:
            return
        if unit == "rows":
            stop = min(stop, start + left)
            left -= stop - start
        else:
            last = None
            for row in read.read_rows(objects[number], format, unit, start, stop, columns=None):
                last, left = row.position, left - 1
                if not left:
                    stop = last + 1
                    break
        yield number, unit, start, stop


# -- stored -----------------------------------------------------------------------------------


def load(output: str) -> Plan | None:
    """The plan that stands at this output, if any. Raises StorageError if it is damaged."""
    uri = storage.join(output, NAME)
    try:
        fields = storage.read_checked(uri, unsealed)
        objects = tuple(InputObject(*o) for o in fields.pop("objects"))
        shards = tuple(Shard(i, *s) for i, s in enumerate(fields.pop("shards")))
        return Plan(**{**fields, "objects": objects, "shards": shards, "columns": tuple(fields["columns"])})
    except NotFound:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise StorageError(f"{uri}: damaged; choose another output.path") from error


def store(plan: Plan, output: str) -> Plan:
    """Put the plan where no other stands; returns the one that stands now, which may be another driver's.

    Raises NoConditionalWrites for a store that would let the last writer win.
    """
    uri = storage.join(output, NAME)
    fields = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan)}
    fields["objects"] = [[o.uri, o.name, o.size, o.etag] for o in plan.objects]
    fields["shards"] = [[s.object, s.unit, s.start, s.stop] for s in plan.shards]
    data, staging = sealed(fields), storage.join(output, "meta/tmp")
    # Asked before the plan stands: afterwards every later run would take the store for a good one.
    probe = storage.join(output, f"meta/probe-{uuid.uuid4().hex}")
    with contextlib.suppress(AlreadyExists):  # nobody else has this name: the reply was lost
        storage.create(probe, b"", staging=staging)
    failpoint.reach("plan.store.probe_made")
    try:
        storage.require_create_only(probe, b"")
    finally:
        storage.delete(probe)
    failpoint.reach("plan.store.before_put")
    with contextlib.suppress(AlreadyExists):
        storage.create(uri, data, staging=staging)
    failpoint.reach("plan.store.after_put")
    standing = load(output)
    if standing is None:
        raise StorageError(f"{uri}: vanished after it was written")
    return standing


def reused(config: Config) -> Plan | None:
    """The plan of the run that output.reuse names, None if it names none.

    Raises ConfigError unless it is another output than this run's, and complete.
    """
    if not config.output.reuse:
        return None
    reuse = storage.normalize(config.output.reuse)
    if reuse == storage.normalize(config.output.path):
        raise ConfigError(f"output.reuse={reuse}: is output.path itself; what is reused goes to a new output.path")
    found = load(reuse)
    if found is None:
        raise ConfigError(
            f"output.reuse={reuse}: no run has been planned there; name the output.path of a finished one"
        )
    if left := len(standing(found, reuse).remaining):
        raise ConfigError(
            f"output.reuse={reuse}: {left} of its {len(found.shards)} shards are to go; finish that run first"
        )
    return found


def differing(plan: Plan, parts: dict[str, str], names: Iterable[str] = tuple(FIELDS)) -> str:
    """The fields in which these ingredients differ from a plan's, in a person's words; empty if they don't."""
    return "; ".join(FIELDS[name] for name in names if plan.ingredients.get(name) != parts.get(name))


def refuse_drift(plan: Plan, parts: dict[str, str], output: str) -> None:
    """Raises OutputTaken naming what differs between the stored plan and this run."""
    if changed := differing(plan, parts):
        raise OutputTaken(
            f"{output}: holds a run of job {plan.job} with another {changed}. "
            "Choose a new output.path, or go back to the old setting to resume it"
        )


def refuse_other(standing: Plan, draft: Plan, checkpoint: str, output: str) -> None:
    """Raises OutputTaken if another driver's plan won the race for this output, or if quantizing again, with other
    library versions say, made another checkpoint than the one that answered so far."""
    refuse_drift(standing, draft.ingredients, output)
    if standing.fingerprint != draft.fingerprint:
        raise OutputTaken(f"{output}: another run planned other input files there just now; choose a new output.path")
    if standing.checkpoint != checkpoint:
        raise OutputTaken(
            f"{output}: its rows were answered by checkpoint {standing.checkpoint[:12]}, but quantizing now gives "
            f"{checkpoint[:12]} (llm-compressor or compressed-tensors changed?); go back to those versions, "
            "or choose a new output.path"
        )


def check_inputs(plan: Plan, config: Config) -> list[str]:
    """Compare the inputs with the plan's; returns the names that appeared since (they are not part of this run).

    Raises Changed if a planned object is gone or is another one now.
    """
    now = {o.uri: o for o in read.list_input(config.input)}
    for planned in plan.objects:
        found = now.pop(planned.uri, None)
        if found is None:
            raise Changed(f"{planned.uri}: was planned and is gone; put it back, or choose a new output.path")
        if (found.size, found.etag) != (planned.size, planned.etag):
            raise Changed(f"{planned.uri}: is not the file that was planned; put it back, or choose a new output.path")
    return sorted(o.name for o in now.values() if o.name not in plan.unreadable)


@dataclass(frozen=True, slots=True)
class Standing:
    """What is committed of a plan."""

    receipts: tuple[Receipt, ...]
    remaining: tuple[Shard, ...]


def standing(plan: Plan, output: str) -> Standing:
    """Read all receipts; a shard is done when its last part stands, and all before it: a stream's parts are committed
    side by side, so a kill may leave the last one standing alone.

    Raises StorageError if a committed object belongs to another plan.
    """
    receipts = write.read_receipts(output)
    for receipt in receipts:
        if receipt.fingerprint != plan.fingerprint:
            raise StorageError(f"{output}/data: part of shard {receipt.shard} belongs to another run; move it away")
    parts = Counter(r.shard for r in receipts)
    done = {r.shard for r in receipts if r.last and parts[r.shard] == r.part + 1}
    return Standing(tuple(receipts), tuple(s for s in plan.shards if s.index not in done))
