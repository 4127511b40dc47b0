"""A shard's rows -> batches: read, columns under the frozen schema, prompts rendered and tokenised, answers that are
known already. Runs in threads, a batch ahead of the engine."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from batchq import input
from batchq.account.usage import timed
from batchq.engine.protocol import Prompt
from batchq.errors import InputError, RowError
from batchq.machine.digests import digest_of
from batchq.output.parts import as_gold
from batchq.output.schema import EXTRA, input_columns, schema_from_text
from batchq.records import Answer, Failure, Plan, Row, Shard
from batchq.task.task import Task
from batchq.worker.reuse import Reuse

BATCH = 256  # rows read, rendered and tokenised at a time
_TEXT = frozenset({str, type(None)})  # anything else in a column planned as text is written as JSON

Known = dict[str, tuple[str | None, Answer]]  # answers that earlier attempts spilled: see output.spills


@dataclass(slots=True)
class Batch:
    """Rows on their way: columns already in Arrow, prompts already tokenised.

    A row is in flight when both its prompt and its outcome are None.
    """

    part: int
    ids: list[str]
    positions: list[int]
    inputs: pa.RecordBatch
    prompts: list[Prompt | None]  # None: asked, failed, or answered by an earlier attempt
    keys: list[str | None]
    outcomes: list[Answer | Failure | None]
    raws: list[str | None]
    golds: list[str | None]
    from_spill: int = 0  # rows answered by an earlier attempt
    from_reuse: frozenset[int] = frozenset()  # rows whose answer is another run's


class Batches:
    """Makes the batches of one plan's shards. Shards may be read side by side, each by one thread at a time."""

    def __init__(
        self, plan: Plan, task: Task, max_model_len: int, reuse: Reuse | None, quarantine: bool, cpu: dict[str, float]
    ) -> None:
        """`cpu`: where the seconds are added. With `quarantine` a shard whose input can't be read on ends there."""
        self.plan = plan
        self.task = task
        self.max_prompt_tokens = max_model_len - task.sampling.max_tokens
        self.reuse = reuse
        self.quarantine = quarantine
        self.cpu = cpu
        self.quarantined: dict[int, str] = {}  # shard -> why its input can't be read to its end
        schema = schema_from_text(plan.schema)
        self.columns = input_columns(schema, task.config)
        self.extra = EXTRA.name in schema.names
        answers = [plan.checkpoint, plan.ingredients["engine"], plan.ingredients["quantization"]]
        self.answerer = digest_of(answers)  # what else than the prompt decides an answer

    def of(self, shard: Shard, part: int, skip: int, known: Known) -> Iterator[Batch]:
        """The shard's rows in batches; none straddles two parts."""
        rows = self._readable_rows(shard, skip)
        if shard.range.unit == "stream":
            size = self.plan.rows_per_part
            while True:
                left = size
                while left:
                    batch = self._batch(part, rows, min(BATCH, left), known)
                    if batch is None:
                        return
                    yield batch
                    left -= len(batch.ids)
                part += 1
        while (batch := self._batch(part, rows, BATCH, known)) is not None:
            yield batch

    def _readable_rows(self, shard: Shard, skip: int) -> Iterator[Row]:
        """The shard's rows, up to where its input can't be read on; read twice there before it is believed.

        Raises InputError, unless such input is to be quarantined.
        """
        columns = None if self.extra else self.plan.columns  # where unknown keys go to batchq_extra, all are read
        failed_at = -1
        while True:
            try:
                for row in input.rows_of(self.plan, shard, columns, skip):
                    yield row
                    skip = row.position + 1
                return
            except InputError as error:
                if failed_at != skip:
                    failed_at = skip  # it may have been damaged on its way
                elif self.quarantine:
                    self.quarantined[shard.index] = str(error)
                    return
                else:
                    raise

    def _batch(self, part: int, rows: Iterator[Row], size: int, known: Known) -> Batch | None:
        with timed(self.cpu, "read"):
            taken = list(itertools.islice(rows, size))
        if not taken:
            return None
        with timed(self.cpu, "render"):
            inputs, outcomes = self._columns(taken)
            unread = [o for o in outcomes if o is not None]  # their columns can't be in the table
            messages: list[str] = []
            asked: list[int] = []
            for i, row in enumerate(taken):
                if outcomes[i] is None:
                    try:
                        messages.append(self.task.render(row.columns))
                        asked.append(i)
                    except RowError as error:
                        outcomes[i] = Failure(error.code, error.message)
        prompts: list[Prompt | None] = [None] * len(taken)
        keys: list[str | None] = [None] * len(taken)
        from_spill = 0
        from_reuse: set[int] = set()
        with timed(self.cpu, "tokenize"):
            encoded = self.task.encode(messages) if messages else []
        for i, prompt in zip(asked, encoded, strict=True):
            if len(prompt) > self.max_prompt_tokens:
                outcomes[i] = too_long(len(prompt), self.max_prompt_tokens)
                continue
            keys[i] = self.task.key(prompt, self.answerer)
            spilled = known.get(taken[i].id)
            if spilled is not None and spilled[0] == keys[i]:
                outcomes[i] = spilled[1]
                from_spill += 1
            else:
                prompts[i] = prompt
        if self.reuse:
            with timed(self.cpu, "read"):
                earlier = self.reuse.find([key for key, prompt in zip(keys, prompts, strict=True) if key and prompt])
            for i, key in enumerate(keys):
                if prompts[i] and key in earlier:
                    outcomes[i], prompts[i] = earlier[key], None
                    from_reuse.add(i)
        gold = self.task.config.gold
        return Batch(
            part=part,
            ids=[row.id for row in taken],
            positions=[row.position for row in taken],
            inputs=inputs,
            prompts=prompts,
            keys=keys,
            outcomes=outcomes,
            raws=[_raw(row) if o in unread else None for row, o in zip(taken, outcomes, strict=True)],
            golds=[as_gold(row.columns.get(gold)) if gold else None for row in taken],
            from_spill=from_spill,
            from_reuse=frozenset(from_reuse),
        )

    def _columns(self, rows: list[Row]) -> tuple[pa.RecordBatch, list[Answer | Failure | None]]:
        """The rows' columns under the frozen schema; a row whose value won't cast fails, its columns null."""
        outcomes: list[Answer | Failure | None] = [Failure(*row.error) if row.error else None for row in rows]
        arrays: dict[str, pa.Array] = {}
        values: dict[str, list[Any]] = {}
        for column in self.columns:
            name = column.name
            raw = [row.columns.get(name) for row in rows]
            if pa.types.is_string(column.type) and not _TEXT.issuperset(map(type, raw)):
                raw = [value if value is None else input.as_text(value) for value in raw]
            values[name] = raw
            try:
                arrays[name] = pa.array(raw, column.type)
            except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError, ValueError, TypeError):
                for i, value in enumerate(raw):
                    if not _casts(value, column.type):
                        outcomes[i] = Failure("schema", f"column {name}: not {column.type}")
        failed = [isinstance(o, Failure) for o in outcomes]
        for column in self.columns:
            if column.name not in arrays:
                cleared = [None if f else v for v, f in zip(values[column.name], failed, strict=True)]
                arrays[column.name] = pa.array(cleared, column.type)
        if self.extra:
            known = set(self.columns.names)
            extras = [
                None if row.columns.keys() <= known else {k: v for k, v in row.columns.items() if k not in known}
                for row in rows
            ]
            texts = [None if e is None else json.dumps(e, ensure_ascii=False) for e in extras]
            arrays[EXTRA.name] = pa.array(texts, pa.string())
        if not arrays:
            return pa.RecordBatch.from_pylist([{} for _ in rows], schema=pa.schema([])), outcomes
        return pa.RecordBatch.from_pydict(arrays), outcomes


def _casts(value: Any, kind: pa.DataType) -> bool:
    try:
        pa.array([value], kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError, ValueError, TypeError):
        return False
    return True


def _raw(row: Row) -> str | None:
    """A failed row's text, so that nothing is lost: as it was, or its columns as JSON."""
    if row.raw is not None:
        return row.raw
    return json.dumps(row.columns, ensure_ascii=False, default=str) if row.columns else None


def too_long(tokens: int, most: int) -> Failure:
    """What becomes of a row whose prompt is too long."""
    return Failure("too_long", f"{tokens} prompt tokens; engine.max_model_len leaves {most} for the prompt")
