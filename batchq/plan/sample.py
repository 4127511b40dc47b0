"""Rows sampled from the corpus: prompts to calibrate on, and prompts to judge by; no row is ever both."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from batchq import input
from batchq.config import Config, Scheme
from batchq.engine.protocol import Prompt
from batchq.errors import ConfigError, InputError, RowError, StorageError
from batchq.machine.digests import digest_of
from batchq.model.scheme import SCHEMES
from batchq.plan.inputs import list_inputs
from batchq.records import Plan, Range, Row, Shard
from batchq.task.task import Task, open_task

Taken = TypeVar("Taken")

HEADS = 8  # files whose first rows are counted, where rows can only be counted by reading
MEASURED = 512  # prompts that lengths are taken from
LOOKED_AT = 64 * 1024  # characters of a message: 512 of them take seconds to tokenise


@dataclass(frozen=True, slots=True)
class Sample:
    """What both models are asked: prompts, and the gold label of each, if it has one."""

    prompts: list[Prompt] = field(default_factory=list)
    golds: list[str | None] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long sampled prompts are: tokens of each, ascending."""

    tokens: tuple[int, ...]

    @staticmethod
    def of(prompts: Iterable[Prompt]) -> Lengths:
        return Lengths(tuple(sorted(map(len, prompts))))

    def percentile(self, q: float) -> int:
        """The length that `q` of 100 prompts don't exceed; 0 without any."""
        return self.tokens[max(0, math.ceil(q / 100 * len(self.tokens)) - 1)] if self.tokens else 0

    @property
    def median(self) -> int:
        return self.percentile(50)

    @property
    def longest(self) -> int:
        return self.percentile(100)

    @property
    def mean(self) -> float:
        return sum(self.tokens) / max(1, len(self.tokens))

    def above(self, limit: int) -> int:
        """How many are longer."""
        return sum(count > limit for count in self.tokens)


@dataclass(frozen=True, slots=True)
class Look:
    """Rows from all over the corpus, as the task asks them; those that can't be asked are left out."""

    task: Task
    messages: list[str]  # of long ones the first LOOKED_AT characters
    characters: list[int]  # of each whole message
    golds: list[str | None]  # as task.gold reads them

    def lengths(self) -> Lengths:
        """How long their prompts are; of a long message about, by its beginning."""
        pairs = zip(self.messages, self.characters, strict=True)
        return Lengths(tuple(sorted(self._tokens(head, characters) for head, characters in pairs)))

    def _tokens(self, head: str, characters: int) -> int:
        return round(len(self.task.encode([head])[0]) * characters / max(1, len(head)))


def look(config: Config, draft: Plan, path: str, rows: int = MEASURED) -> Look:
    """About `rows` rows of this job, with the tokenizer at `path`."""
    looked = Look(open_task(config, path, draft), [], [], [])
    for message, row in itertools.islice(spread(draft, rows, lambda some: rendered(looked.task, some)), rows):
        looked.messages.append(message[:LOOKED_AT])
        looked.characters.append(len(message))
        looked.golds.append(looked.task.gold.of(row.columns))
    return looked


def split_of(message: str, seed: int) -> str:
    """The split that a row of the corpus belongs to, "gate" or "calibration". Its message alone decides: rows that ask
    the same are in the same split, whichever files they are in."""
    return "gate" if int(digest_of([message, seed])[:8], 16) % 2 else "calibration"


def calibration(config: Config, draft: Plan, task: Task) -> list[list[int]]:
    """Prompts to calibrate on, tokenised and cut: rows of quantization.calibration, or of the corpus that the gate
    never judges by."""
    limit = config.quantization.max_tokens
    messages = _calibration_messages(config, draft, task)
    return [task.encode([task.head(message, limit)])[0].token_ids[:limit] for message in messages]


def judging(config: Config, draft: Plan, task: Task) -> Sample:
    """Prompts to judge by, with gold labels: rows of gate.input, or of the corpus. Never what was calibrated on,
    whatever inputs are named: rows that ask the same as one of the calibration's are passed over.

    Raises ConfigError if no row is left.
    """
    settings, calibrated = config.gate, set[str]()
    if SCHEMES[Scheme(draft.quantization)].calibrated and (settings.input or config.quantization.calibration):
        calibrated = {digest_of(message) for message in _calibration_messages(config, draft, task)}
    asked = _sample_rows(config, draft, task, settings.input, settings.rows, "gate")
    chosen = itertools.islice((pair for pair in asked if digest_of(pair[0]) not in calibrated), settings.rows)
    sample = Sample()
    for prompt, row in fitting(task, chosen, config.engine.max_model_len):
        sample.prompts.append(prompt)
        sample.golds.append(task.gold.of(row.columns))
    if not sample.prompts:
        why = f" but the {len(calibrated):,} that were calibrated on" if calibrated else ""
        raise ConfigError(
            f"gate: there is no row to judge by{why}; name others in gate.input, or set gate.enabled=false"
        )
    return sample


def fitting(task: Task, asked: Iterable[tuple[str, Row]], max_model_len: int) -> Iterator[tuple[Prompt, Row]]:
    """The prompts that an engine takes, and their rows, one at a time: a row may have megabytes."""
    most = max_model_len - task.sampling.max_tokens
    for message, row in asked:
        if not task.exceeds(message, most) and len(prompt := task.encode([message])[0]) <= most:
            yield prompt, row


def _calibration_messages(config: Config, draft: Plan, task: Task) -> Iterator[str]:
    settings = config.quantization
    asked = _sample_rows(config, draft, task, settings.calibration, settings.samples, "calibration")
    return (message for message, _ in itertools.islice(asked, settings.samples))


def _sample_rows(
    config: Config, draft: Plan, task: Task, path: str | None, wanted: int, split: str
) -> Iterator[tuple[str, Row]]:
    """About `wanted` rows with their messages: all of another input, or of the corpus those of one split."""
    if path is not None:
        return rendered(task, _rows_of_input(config, draft, path))
    seed = config.gate.seed
    return spread(
        draft, wanted, lambda rows: (pair for pair in rendered(task, rows) if split_of(pair[0], seed) == split)
    )


def _rows_of_input(config: Config, draft: Plan, path: str) -> Iterator[Row]:
    objects = list_inputs(config, path).objects
    format = input.format_of(objects[0].name, config.input.format)
    objects, refused = input.with_dialects(objects, format, config.input.csv)
    for why in refused.values():
        raise InputError(why)
    for obj in objects:
        other = dataclasses.replace(draft, objects=(obj,), format=format)
        yield from input.rows_of(other, Shard(0, 0, Range(input.splittable(obj.name, format))), draft.columns)


def spread(draft: Plan, wanted: int, take: Callable[[Iterator[Row]], Iterator[Taken]]) -> Iterator[Taken]:
    """About `wanted` results of `take`, which is given the rows of evenly spread shards from their starts."""
    step = max(1, len(draft.shards) // wanted)
    chosen = draft.shards[::step][:wanted]
    each = -(-wanted // len(chosen))
    for shard in chosen:
        yield from itertools.islice(take(input.rows_of(draft, shard, draft.columns)), each)


def expected_rows(draft: Plan, limit: int | None) -> int | None:
    """About how many rows there are, `limit` at most. Where only reading counts them, the heads of a few files give an
    estimate. None for a dataset in an object store, or if none of those files can be read."""
    if limit is not None:
        return limit
    pieces = [piece for shard in draft.shards for piece in shard.pieces]
    ranges = [range for _, range in pieces]
    if all(each.unit == "rows" for each in ranges):
        return sum(each.stop - each.start for each in ranges)
    if draft.format == "dataset":
        return None
    whole = [draft.objects[i] for i in sorted({object for object, _ in pieces})]
    size = rows = 0.0
    for obj in whole[:: max(1, len(whole) // HEADS)][:HEADS]:
        with contextlib.suppress(InputError, StorageError):  # whoever labels it says so
            rows += obj.size * input.rows_per_byte(obj, draft.format)
            size += obj.size
    return round(rows / size * sum(obj.size for obj in whole)) if size else None


def rendered(task: Task, rows: Iterable[Row]) -> Iterator[tuple[str, Row]]:
    """Messages and their rows; rows that can't be asked are passed over: they will be failures in the output, and
    here would only spoil the sample."""
    for row in rows:
        if row.error is None:
            with contextlib.suppress(RowError):
                yield task.render(row.columns), row
