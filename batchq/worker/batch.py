"""A shard's rows -> batches: read, columns under the frozen schema, prompts rendered and tokenised, answers that are
known already. Runs in threads, a batch ahead of the engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from batchq import input
from batchq.account.usage import timed
from batchq.engine.protocol import Prompt
from batchq.errors import InputError, RowError
from batchq.machine.digests import digest_of
from batchq.records import END, Answer, Failure, Plan, Row, Shard
from batchq.task.task import Task
from batchq.worker.columns import Columns, raw_of
from batchq.worker.reuse import Reuse

BATCH = 256  # rows read, rendered and tokenised at a time
BATCH_BYTES = 4 * 1024 * 1024  # of their values; a batch ends with the row that reaches it
ROW_BYTES = 2048  # that a row counts beside its values: its ids, its key and its answer, as Python holds them
BYTES_PER_TOKEN = 4  # of generated text, about

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
    size: int  # bytes, as parts are cut by them
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
        self.columns = Columns(plan, task.config)
        answers = [plan.checkpoint, plan.ingredients["engine"], plan.ingredients["quantization"]]
        self.answerer = digest_of(answers)  # what else than the prompt decides an answer
        written = BYTES_PER_TOKEN * task.space.max_output_tokens if task.space.decodes else 0
        self.row_bytes = ROW_BYTES + written

    def of(self, shard: Shard, part: int, skip: int, known: Known) -> Iterator[Batch]:
        """The shard's rows in batches; none straddles two parts.

        Where a part ends follows from the plan and its own rows alone: whoever labels the shard cuts it in the same
        places, wherever an earlier attempt was ended.
        """
        rows = self._readable_rows(shard, skip)
        most_rows = self.plan.rows_per_part if shard.range.unit == "stream" else END
        while True:
            left, room = most_rows, self.plan.bytes_per_part or END
            while left > 0 and room > 0:
                batch = self._batch(part, rows, (min(BATCH, left), min(BATCH_BYTES, room)), known)
                if batch is None:
                    return
                yield batch
                left -= len(batch.ids)
                room -= batch.size
            part += 1

    def _readable_rows(self, shard: Shard, skip: int) -> Iterator[Row]:
        """The shard's rows, up to where its input can't be read on; read twice there before it is believed.

        Raises InputError, unless such input is to be quarantined.
        """
        columns = None if self.columns.unknown else self.plan.columns  # where unknown keys are kept, all are read
        failed_at = -1
        while True:
            try:
                for row in input.rows_of(self.plan, shard, columns, skip):
                    after = row.position + 1
                    yield row
                    skip = after
                    del row  # it may have megabytes, and so may the next one
                return
            except InputError as error:
                if failed_at != skip:
                    failed_at = skip  # it may have been damaged on its way
                elif self.quarantine and not shard.more:  # with others, the rest of the shard isn't this file's
                    self.quarantined[shard.index] = str(error)
                    return
                else:
                    raise

    def _batch(self, part: int, rows: Iterator[Row], most: tuple[int, int], known: Known) -> Batch | None:
        """The next rows, None without any. `most`: rows, and bytes after which no other is taken."""
        with timed(self.cpu, "read"):
            taken, size = input.take(rows, *most, self.row_bytes)
        if not taken:
            return None
        with timed(self.cpu, "render"):
            inputs, outcomes = self.columns.of(taken)
            unread = [o for o in outcomes if o is not None]  # their columns can't be in the table
            messages: list[str] = []
            asked: list[int] = []
            for i, row in enumerate(taken):
                if outcomes[i] is None:
                    try:
                        message = self.task.render(row.columns)
                        if self.task.exceeds(message, self.max_prompt_tokens):
                            outcomes[i] = too_long(None, self.max_prompt_tokens)
                        else:
                            messages.append(message)
                            asked.append(i)
                    except RowError as error:
                        outcomes[i] = Failure(error.code, error.message)
        prompts: list[Prompt | None] = [None] * len(taken)
        keys: list[str | None] = [None] * len(taken)
        from_spill = 0
        from_reuse: set[int] = set()
        with timed(self.cpu, "tokenize"):
            encoded = self.task.encode(messages, [taken[i].id for i in asked]) if messages else []
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
        return Batch(
            part=part,
            ids=[row.id for row in taken],
            positions=[row.position for row in taken],
            inputs=inputs,
            prompts=prompts,
            keys=keys,
            outcomes=outcomes,
            raws=[raw_of(row) if o in unread else None for row, o in zip(taken, outcomes, strict=True)],
            golds=[self.task.gold.of(row.columns) for row in taken],
            size=size,
            from_spill=from_spill,
            from_reuse=frozenset(from_reuse),
        )


def too_long(tokens: int | None, most: int) -> Failure:
    """What becomes of a row whose prompt is too long. `tokens`: None if it is so long that nobody counted them."""
    counted = f"more than {most}" if tokens is None else f"{tokens}"
    return Failure("too_long", f"{counted} prompt tokens; engine.max_model_len leaves {most} for the prompt")
