"""Input listing -> a plan: objects, shards, one schema, and the fingerprint of all that decides an answer."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

from batchq import input, storage
from batchq.config import Config, KvCache, Scheme, TableFormat, Unreadable, suggest
from batchq.errors import ConfigError, InputError
from batchq.model.scheme import SCHEMES
from batchq.model.source import name_of
from batchq.output import delta
from batchq.output.parts import PART_BYTES
from batchq.output.schema import output_schema, schema_to_text
from batchq.plan.inputs import list_inputs
from batchq.records import InputObject, Plan, Range, Shard
from batchq.task import task
from batchq.task.prompt import check_prompt, columns_in, prompt_columns, required_columns

TAPERED = 8  # shards at the end of a large plan that are cut smaller

# Of vLLM's engine arguments, those that change what a model answers; the others may differ on a resume.
ANSWER_OPTIONS = {"dtype", "hf_overrides", "kv_cache_dtype", "load_format", "quantization", "tokenizer"}


def ingredients(config: Config, model: str, scheme: Scheme) -> dict[str, str]:
    """All that decides an answer but the input objects, by name, each as text. `model`: its digest."""
    quantization = config.quantization
    recipe: list[Any] = [scheme.value]
    options = {k: v for k, v in config.engine.options.items() if k in ANSWER_OPTIONS}
    if quantization.kv_cache is not KvCache.auto:
        recipe += [quantization.kv_cache.value]
    if scheme not in (Scheme.none, Scheme.auto):
        recipe += [quantization.ignore, quantization.group_size]
        if SCHEMES[scheme].calibrated:
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
            [config.input.columns, config.output.columns, config.input.format.value, config.task.gold, *_csv(config)]
        ),
        "inputs": json.dumps(
            [config.input.path, config.input.limit, *([] if config.input.version is None else [config.input.version])]
        ),
        **({"reuse": storage.normalize(config.output.reuse)} if config.output.reuse else {}),
    }


def _csv(config: Config) -> list[dict[str, Any]]:
    """What is said of CSV files; nothing where nothing is, as in plans from before it could be."""
    said = {name: value for name, value in dataclasses.asdict(config.input.csv).items() if value is not None}
    return [said] if said else []


def fingerprint(parts: dict[str, str], objects: Iterable[InputObject]) -> str:
    """sha256 over the ingredients and every input object's name, size and etag."""
    listing = [[o.name, o.size, o.etag] for o in objects]
    return hashlib.sha256(json.dumps([parts, listing], sort_keys=True).encode()).hexdigest()


def make_plan(config: Config, model: str, scheme: Scheme, checkpoint: str) -> Plan:
    """Plan a new run. `model` and `checkpoint` are digests of what is named and of what is served.

    Raises InputError for an input that is missing or empty, ConfigError for columns that clash.
    """
    inputs = list_inputs(config)
    objects, unreadable = inputs.objects, dict(inputs.unreadable)
    format = input.format_of(objects[0].name, config.input.format)
    required = required_columns(config.task.prompt)
    if format != "csv" and (said := _csv(config)):
        raise ConfigError(f"input.csv.{next(iter(said[0]))}: goes with CSV files; {objects[0].name} is {format}")
    objects, refused = input.with_dialects(objects, format, config.input.csv)
    if refused and config.input.unreadable is Unreadable.stop:
        raise InputError(next(iter(refused.values())))
    unreadable |= refused
    if config.input.unreadable is Unreadable.quarantine:
        unreadable |= input.unreadable(objects, format, required)
        objects = [each for each in objects if each.name not in unreadable]
        if not objects:
            raise InputError(f"not one input file can be read; the first: {next(iter(unreadable.values()))}")
    partitions = inputs.snapshot.partitions if inputs.snapshot else input.partition_types(o.name for o in objects)
    schema = input.infer_schema(objects, format, config.input.columns, required, partitions=partitions)
    if inputs.snapshot and (strange := sorted(set(schema.names) - inputs.snapshot.columns)):
        raise InputError(
            f"input.path={config.input.path}: files of it have a column {strange[0]}, which the table hasn't; "
            "write the table anew, or say which columns are read with input.columns"
        )
    if format == "csv":
        _refuse_headless(config, objects[0], schema.names)
    check_prompt(config.task.prompt, schema.names, config.task.constant_prompt)
    for field, name in {"task.gold": config.task.gold, "input.id": config.input.id}.items():
        if name is not None and name not in schema.names:
            near = suggest.did_you_mean(name, schema.names)
            raise InputError(f"{field}={name}: no such column; columns are {', '.join(schema.names)}{near}")
    _refuse_zones(schema, {*prompt_columns(config.task.prompt, schema.names), config.task.gold})
    chosen = list(schema.names) if config.output.columns is None else config.output.columns
    if unknown := sorted(set(chosen) - set(schema.names)):
        raise InputError(
            f"output.columns names {unknown[0]}, which is no column; columns are {', '.join(schema.names)}"
            + suggest.did_you_mean(unknown[0], schema.names)
        )
    output = output_schema(_subset(schema, chosen), config.task)
    if config.output.table is TableFormat.delta:
        delta.check(output)
        delta.require_free(storage.normalize(config.output.path))
    parts = ingredients(config, model, scheme)
    return Plan(
        fingerprint=fingerprint(parts, objects),
        ingredients=parts,
        job=config.job.name,
        objects=tuple(objects),
        shards=tuple(_shards(config, objects, format)),
        format=format,
        schema=schema_to_text(output),
        columns=tuple(schema.names),
        rows_per_part=config.output.rows_per_shard,
        bytes_per_part=PART_BYTES,
        quantization=scheme.value,
        model=model,
        model_name=name_of(config.model.path),
        model_revision=config.model.revision or "",
        unreadable=unreadable,
        left_out=inputs.left_out,
        snapshot=inputs.snapshot.words if inputs.snapshot else "",
        partitions=partitions,
        unknown=format == "jsonl" and config.input.columns is None and config.output.columns is None,
        checkpoint=checkpoint,
        reuse=parts.get("reuse", ""),
        date=datetime.now().isoformat(timespec="seconds"),
    )


def _refuse_zones(schema: Any, read: set[str | None]) -> None:
    """Raises InputError for a column that is read and has times of a zone that this machine doesn't know."""
    import pyarrow as pa

    for field in schema:
        if field.name in read and pa.types.is_timestamp(field.type) and field.type.tz:
            try:
                pa.scalar(0, field.type).as_py()
            except (ValueError, KeyError) as error:
                raise InputError(
                    f"column {field.name}: its time zone {field.type.tz} isn't known here, as UTC, +02:00 or "
                    "Europe/Berlin are; write the column in another, or leave it out of task.prompt and task.gold"
                ) from error


def _refuse_headless(config: Config, first: InputObject, columns: list[str]) -> None:
    """Raises InputError where a CSV file's first line names nothing that is asked for; it may be a row, so it isn't
    quoted."""
    wanted = columns_in(config.task.prompt)
    names = ", ".join(sorted(wanted))
    if wanted and wanted.isdisjoint(columns) and (first.dialect is None or first.dialect.header):
        raise InputError(
            f"{first.uri}: task.prompt uses {names}, of which its first line names nothing; if that is no header, say "
            "input.csv.header=false, and its columns are called c0, c1, ...; or say input.csv.delimiter"
        )


def with_scheme(draft: Plan, config: Config, scheme: Scheme) -> Plan:
    """The same inputs and shards under another scheme, without listing and sampling them again."""
    parts = ingredients(config, draft.model, scheme)
    return dataclasses.replace(
        draft,
        ingredients=parts,
        fingerprint=fingerprint(parts, draft.objects),
        quantization=scheme.value,
        checkpoint="",
    )


def without_reuse(draft: Plan) -> Plan:
    """The same run, which asks all."""
    parts = {name: value for name, value in draft.ingredients.items() if name != "reuse"}
    return dataclasses.replace(draft, ingredients=parts, fingerprint=fingerprint(parts, draft.objects), reuse="")


def _subset(schema: Any, names: list[str]) -> Any:
    import pyarrow as pa

    return pa.schema([schema.field(name) for name in names])


def _shards(config: Config, objects: list[InputObject], format: str) -> list[Shard]:
    cut = functools.partial(input.split, format=format, rows_per_shard=config.output.rows_per_shard)
    with ThreadPoolExecutor(input.OPENED_AT_ONCE) as threads:  # each is a request to the store
        ranges = [(number, each) for number, cuts in enumerate(threads.map(cut, objects)) for each in cuts]
    if config.input.limit is not None:
        ranges = list(_limited(ranges, objects, format, config.input.limit))
    groups = [[place] for place in ranges]
    if config.input.unreadable is Unreadable.stop:  # else a shard ends where its file can't be read on
        groups = input.join_small(ranges, objects, format, rows_per_shard=config.output.rows_per_shard)
    if len(groups) > 4 * TAPERED:
        groups = input.taper(groups, TAPERED)
    return [Shard(index, *first, tuple(more)) for index, (first, *more) in enumerate(groups)]


def _limited(
    ranges: list[tuple[int, Range]], objects: list[InputObject], format: str, limit: int
) -> Iterable[tuple[int, Range]]:
    """The first `limit` rows. Byte ranges and streams are read up to there, because only rows can be counted."""
    left = limit
    for number, whole in ranges:
        if not left:
            return
        stop = whole.stop
        if whole.unit == "rows":
            stop = min(stop, whole.start + left)
            left -= stop - whole.start
        else:
            for row in input.read_rows(objects[number], format, whole, columns=None):
                left -= 1
                if not left:
                    stop = row.position + 1
                    break
        yield number, dataclasses.replace(whole, stop=stop)
