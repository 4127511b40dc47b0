"""Rows that stand for the corpus: prompts to calibrate on, and prompts to judge by; no row is ever both."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from batchq import input, models, plan
from batchq.config import Config
from batchq.errors import InputError, RowError, StorageError
from batchq.models import digest_of
from batchq.output.parts import as_gold
from batchq.records import Plan, Range, Row
from batchq.task import Task

HEADS = 8  # files whose first rows are counted, of those that only reading would count
MEASURED = 512  # prompts that lengths are taken from


@dataclass(frozen=True, slots=True)
class Sample:
    """What both models are asked: prompts as token ids, and the gold label of each, if it has one."""

    prompts: list[list[int]] = field(default_factory=list)
    golds: list[str | None] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long sampled prompts are: tokens of each, ascending."""

    tokens: tuple[int, ...]

    @staticmethod
    def of(prompts: Iterable[Sequence[int]]) -> Lengths:
        return Lengths(tuple(sorted(map(len, prompts))))

    def at(self, share: float) -> int:
        """The length that this share of the prompts doesn't exceed; 0 without any."""
        return self.tokens[max(0, math.ceil(share * len(self.tokens)) - 1)] if self.tokens else 0

    @property
    def median(self) -> int:
        return self.at(0.5)

    @property
    def longest(self) -> int:
        return self.at(1.0)

    @property
    def mean(self) -> float:
        return sum(self.tokens) / max(1, len(self.tokens))

    def above(self, limit: int) -> int:
        """How many are longer."""
        return sum(count > limit for count in self.tokens)


def lengths(config: Config, draft: Plan, path: str, rows: int = MEASURED) -> Lengths:
    """Lengths of this job's prompts with the tokenizer at `path`, from rows all over the corpus."""
    task = Task(
        config.task,
        models.open_tokenizer(path, config.model.trust_remote_code),
        draft.columns,
        config.model.chat_template,
    )
    return Lengths.of(task.encode([message for message, _ in rendered(task, spread(draft, rows))][:rows]))


def side(key: str, seed: int) -> str:
    """Which of the two a row may serve, by its id alone: "gate" or "calibration". Never both."""
    return "gate" if int(digest_of([key, seed])[:8], 16) % 2 else "calibration"


def calibration(config: Config, draft: Plan, task: Task) -> list[list[int]]:
    """Prompts to calibrate on, tokenised and cut: rows of quantization.calibration, or of the corpus that the gate
    never judges by."""
    settings = config.quantization
    rows = drawn(config, draft, settings.calibration, settings.samples, "calibration")
    messages = [message for message, _ in rendered(task, rows)]
    return [ids[: settings.max_tokens] for ids in task.encode(messages[: settings.samples])]


def judging(config: Config, draft: Plan, task: Task) -> Sample:
    """Prompts to judge by, with gold labels: rows of gate.input, or rows of the corpus that are never calibrated on."""
    rows = drawn(config, draft, config.gate.input, config.gate.rows, "gate")
    asked = list(rendered(task, rows))[: config.gate.rows]
    room = config.engine.max_model_len - task.sampling.max_tokens
    prompts = task.encode([message for message, _ in asked])
    kept = [(p, row) for p, (_, row) in zip(prompts, asked, strict=True) if len(p) <= room]
    gold = config.task.gold
    return Sample([p for p, _ in kept], [as_gold(row.columns.get(gold)) if gold else None for _, row in kept])


def golds(config: Config, draft: Plan, rows: int = MEASURED) -> list[str | None]:
    """Gold values of rows all over the corpus."""
    name = config.task.gold
    if not name:
        return []
    found = itertools.islice(spread(draft, rows), rows)
    return [as_gold(row.columns.get(name)) for row in found if row.error is None]


def strange(config: Config, golds: Iterable[str | None]) -> str:
    """A warning where gold values are none of the labels, which says how many and not what they are; else empty."""
    known, there = set(config.task.labels), [gold for gold in golds if gold is not None]
    others = [gold for gold in there if gold not in known]
    if not known or not others:
        return ""
    alike = {label.casefold() for label in known}
    spelled = sum(gold.strip().casefold() in alike for gold in others)
    hint = f" ({spelled:,} but for case or spaces)" if spelled else ""
    return (
        f"{len(others):,} of {len(there):,} sampled gold values in task.gold={config.task.gold} are none of "
        f"task.labels{hint}; the gate passes them over and the report counts them as answered wrongly"
    )


def drawn(config: Config, draft: Plan, path: str | None, wanted: int, serving: str) -> Iterator[Row]:
    """About `wanted` rows: all of another input, or from the starts of evenly spread shards those of one side."""
    columns = list(draft.columns)
    if path is not None:
        for found in input.list_input(dataclasses.replace(config.input, path=path)):
            format = input.format_of(found.name, config.input.format)
            whole = Range(input.splittable(found.name, format))
            yield from input.read_rows(found, format, whole, columns=columns)
        return
    seed = config.gate.seed
    yield from spread(draft, wanted, lambda row: side(row.id, seed) == serving)


def spread(draft: Plan, wanted: int, fits: Callable[[Row], bool] = lambda _: True) -> Iterator[Row]:
    """About `wanted` rows of the corpus that fit, from the starts of evenly spread shards."""
    step = max(1, len(draft.shards) // wanted)
    chosen = draft.shards[::step][:wanted]
    each = -(-wanted // len(chosen))
    for shard in chosen:
        yield from itertools.islice(filter(fits, input.rows_of(draft, shard, draft.columns)), each)


def expected_rows(draft: Plan, limit: int | None) -> int | None:
    """About how many rows there are; of files whose rows only reading would count, by the heads of a few of them. None
    of a dataset in an object store, or if none of those can be read."""
    if (counted := plan.expected_rows(draft, limit)) is not None or draft.format == "dataset":
        return counted
    whole = [draft.objects[i] for i in sorted({shard.object for shard in draft.shards})]
    size = found = 0.0
    for obj in whole[:: max(1, len(whole) // HEADS)][:HEADS]:
        with contextlib.suppress(InputError, StorageError):  # whoever labels it says so
            found += obj.size * input.rows_per_byte(obj, draft.format)
            size += obj.size
    return round(found / size * sum(obj.size for obj in whole)) if size else None


def rendered(task: Task, rows: Iterable[Row]) -> Iterator[tuple[str, Row]]:
    """Messages and their rows; rows that can't be asked are passed over: they will be failures in the output, and
    here would only spoil the sample."""
    for row in rows:
        if row.error is None:
            with contextlib.suppress(RowError):
                yield task.render(row.columns), row
