"""The plan of an output: stored create-only, obeyed by every resume; a run that differs from it is refused."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable
from typing import Any

from batchq import storage
from batchq.errors import AlreadyExists, NotFound, OutputTaken, StorageError
from batchq.output import layout
from batchq.records import Dialect, InputObject, Plan, Range, Shard, sealed, unsealed, values
from batchq.storage import failpoint

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
    "columns": "input.columns, output.columns, input.format, input.csv or task.gold",
    "inputs": "input.path, input.limit or input.version",
    "reuse": "output.reuse or output.incremental",
}
KEYED = ("model", "engine", "quantization", "prompt", "labels", "sampling")  # with another, no batchq_key is the same


def load_plan(output: str) -> Plan | None:
    """The plan stored at this output, if any. Raises StorageError if it is damaged."""
    uri = layout.plan(output)
    try:
        fields = storage.read_checked(uri, unsealed)
        objects = tuple(_object(*o) for o in fields.pop("objects"))
        shards = tuple(_shard(index, *cut) for index, cut in enumerate(fields.pop("shards")))
        lists = {name: tuple(fields.pop(name, ())) for name in ("columns", "verdicts")}
        return Plan(**{**fields, **lists, "objects": objects, "shards": shards})
    except NotFound:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise StorageError(f"{uri}: damaged; choose another output.path") from error


def _shard(index: int, *first_and_more: Any) -> Shard:
    (object, *cut), more = first_and_more[:4], first_and_more[4:]
    return Shard(index, object, Range.from_json(*cut), tuple((each, Range.from_json(*rest)) for each, *rest in more))


def _object(uri: str, name: str, size: int, etag: str, dialect: list[Any] | None = None) -> InputObject:
    return InputObject(uri, name, size, etag, None if dialect is None else Dialect(*dialect))


def store_plan(plan: Plan, output: str) -> Plan:
    """Put the plan where there is none yet; returns the one that is there now, which may be another driver's.

    Raises NoConditionalWrites for a store that would let the last writer win.
    """
    uri = layout.plan(output)
    fields = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan)}
    fields["objects"] = [
        [o.uri, o.name, o.size, o.etag, *([values(o.dialect)] if o.dialect else ())] for o in plan.objects
    ]
    fields["shards"] = [
        [s.object, *s.range.to_json(), *([each, *cut.to_json()] for each, cut in s.more)] for s in plan.shards
    ]
    data, staging = sealed(fields), layout.staging(output)
    # Probed before the plan is written: afterwards every later run would take the store for a good one.
    probe = layout.probe(output)
    with contextlib.suppress(AlreadyExists):  # nobody else has this name: the reply was lost
        storage.create(probe, b"", staging=staging)
    failpoint.reach("plan.store.probe_made")
    try:
        storage.require_create_only(probe, b"", staging)
    finally:
        storage.delete(probe)
    failpoint.reach("plan.store.before_put")
    with contextlib.suppress(AlreadyExists):
        storage.create(uri, data, staging=staging)
    failpoint.reach("plan.store.after_put")
    winner = load_plan(output)
    if winner is None:
        raise StorageError(f"{uri}: vanished after it was written")
    return winner


def differing(plan: Plan, parts: dict[str, str], names: Iterable[str] = tuple(FIELDS)) -> str:
    """The fields in which these ingredients differ from a plan's, in a person's words; empty if they don't."""
    return "; ".join(FIELDS[name] for name in names if plan.ingredients.get(name) != parts.get(name))


def refuse_drift(plan: Plan, parts: dict[str, str], output: str) -> None:
    """Raises OutputTaken naming what differs between the stored plan and this run."""
    if changed := differing(plan, parts):
        raise OutputTaken(
            f"{output}: holds a run of job {plan.job} with another {changed}. "
            "Go back to the old setting to resume it (ingredients in meta/plan.json), or choose a new output.path, "
            "where all rows are asked anew"
        )


def refuse_other(stored: Plan, draft: Plan, checkpoint: str, output: str) -> None:
    """Raises OutputTaken if another driver's plan won the race for this output, or if quantizing again, with other
    library versions say, made another checkpoint than the one that answered so far."""
    refuse_drift(stored, draft.ingredients, output)
    if stored.fingerprint != draft.fingerprint:
        raise OutputTaken(f"{output}: another run planned other input files there just now; choose a new output.path")
    if stored.checkpoint != checkpoint:
        raise OutputTaken(
            f"{output}: its rows were answered by checkpoint {stored.checkpoint[:12]}, but quantizing now gives "
            f"{checkpoint[:12]} (llm-compressor or compressed-tensors changed?); go back to those versions, "
            "or choose a new output.path"
        )
