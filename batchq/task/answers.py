"""Answer spaces: what an answer to the task can be, which columns it fills, and how it is read from a completion.

What differs between a label that is scored and a text that is generated is in this module, and nowhere else.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any, Protocol

import pyarrow as pa

from batchq.config import TaskConfig, TaskKind
from batchq.engine.protocol import Completion, Sampling
from batchq.errors import RowError
from batchq.records import Answer, Failure


@dataclass(frozen=True, slots=True)
class AnswerCounts:
    """What the answers of some rows come to."""

    labels: dict[str, int] = field(default_factory=dict)  # answers by label, where there are labels
    gold: int = 0  # answered rows with a gold value, which is one of the labels where there are labels
    correct: int = 0  # of those, answered as their gold value says
    mass: float = 0.0  # label mass, summed over the answered rows
    gold_unknown: int = 0  # answered rows whose gold value is none of the labels
    truncated: int = 0  # answers that were cut off


class AnswerSpace(Protocol):
    """What an answer can be. Made from the task's configuration alone: no tokenizer, no engine."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels to choose from, in the order of their scores; empty where the answer is free."""
        ...

    @property
    def scored(self) -> int:
        """How many token ids a request asks the log-probabilities of."""
        ...

    @property
    def max_output_tokens(self) -> int:
        """The most tokens that a request may generate; a prompt has to leave so many of engine.max_model_len."""
        ...

    @property
    def decodes(self) -> bool:
        """Whether text is generated token by token. Otherwise one prefill answers a row."""
        ...

    def fields(self) -> list[pa.Field]:
        """The output columns of an answer, each nullable (a failure has none of them)."""
        ...

    def sampling(self, score_ids: Sequence[int]) -> Sampling:
        """What the engine is asked. `score_ids`: the token id that each label begins with, in the labels' order."""
        ...

    def read(self, completion: Completion) -> dict[str, Any]:
        """The answer's columns, by name. Raises RowError if the completion holds no answer."""
        ...

    def truncated(self, answer: Answer) -> bool:
        """Whether the answer was cut off, at task.max_tokens or engine.max_model_len."""
        ...

    def counts(self, outcomes: Sequence[Answer | Failure], golds: Sequence[str | None]) -> AnswerCounts:
        """What these rows' answers come to. `golds` go with `outcomes`, row by row, as task.gold reads them; None: no
        gold value."""
        ...


def of(config: TaskConfig) -> AnswerSpace:
    """The answer space that a task configures."""
    request = Sampling(temperature=config.temperature, stop=tuple(config.stop), seed=config.seed)
    if config.kind is TaskKind.generate:
        return FreeText(config.name, dataclasses.replace(request, max_tokens=config.max_tokens))
    return ClosedChoice(config.name, tuple(config.labels), request)


@dataclass(frozen=True, slots=True)
class ClosedChoice:
    """One of several labels. They are scored, not generated: one prefill gives the whole distribution."""

    name: str
    labels: tuple[str, ...]
    request: Sampling  # without the token ids, which only a tokenizer tells

    @property
    def scored(self) -> int:
        return len(self.labels)

    @property
    def max_output_tokens(self) -> int:
        return self.request.max_tokens

    @property
    def decodes(self) -> bool:
        return False

    def fields(self) -> list[pa.Field]:
        distribution = pa.struct([pa.field(label, pa.float32()) for label in self.labels])
        return [
            pa.field(self.name, pa.string()),
            pa.field(f"{self.name}_probability", pa.float32()),
            pa.field(f"{self.name}_distribution", distribution),
            pa.field(f"{self.name}_mass", pa.float32()),
        ]

    def sampling(self, score_ids: Sequence[int]) -> Sampling:
        return dataclasses.replace(self.request, score_ids=tuple(score_ids))

    def read(self, completion: Completion) -> dict[str, Any]:
        """The likeliest label and its probability, those of all labels (they sum to 1), and their sum before that."""
        scores = completion.logprobs
        if len(scores) != len(self.labels) or any(map(math.isnan, scores)):
            raise RowError("invalid_score", "the engine returned no number for some label")
        top = max(scores)
        if top == -math.inf:
            raise RowError("invalid_score", "the engine gave every label a probability of zero")
        weights = [math.exp(s - top) for s in scores]
        total = math.fsum(weights)
        shares = [w / total for w in weights]
        best = shares.index(max(shares))
        return {
            self.name: self.labels[best],
            f"{self.name}_probability": shares[best],
            f"{self.name}_distribution": dict(zip(self.labels, shares, strict=True)),
            f"{self.name}_mass": min(1.0, total * math.exp(top)),
        }

    def truncated(self, answer: Answer) -> bool:
        return False

    def counts(self, outcomes: Sequence[Answer | Failure], golds: Sequence[str | None]) -> AnswerCounts:
        said = _with_gold(self.name, outcomes, golds)
        known = [(answer, gold) for answer, gold in said if gold in self.labels]
        columns = [o.columns for o in outcomes if isinstance(o, Answer)]
        return AnswerCounts(
            labels=dict(Counter(c[self.name] for c in columns)),
            gold=len(known),
            correct=sum(answer == gold for answer, gold in known),
            mass=float(sum(c[f"{self.name}_mass"] for c in columns)),
            gold_unknown=len(said) - len(known),
        )


@dataclass(frozen=True, slots=True)
class FreeText:
    """Text that the model writes."""

    name: str
    request: Sampling

    @property
    def labels(self) -> tuple[str, ...]:
        return ()

    @property
    def scored(self) -> int:
        return 0

    @property
    def max_output_tokens(self) -> int:
        return self.request.max_tokens

    @property
    def decodes(self) -> bool:
        return True

    def fields(self) -> list[pa.Field]:
        return [pa.field(self.name, pa.string()), pa.field(f"{self.name}_finish", pa.string())]

    def sampling(self, score_ids: Sequence[int]) -> Sampling:
        return self.request

    def read(self, completion: Completion) -> dict[str, Any]:
        """The text, and why it ended: "stop", or "length" where it was cut off."""
        return {self.name: completion.text, f"{self.name}_finish": completion.finish_reason}

    def truncated(self, answer: Answer) -> bool:
        return bool(answer.columns[f"{self.name}_finish"] == "length")

    def counts(self, outcomes: Sequence[Answer | Failure], golds: Sequence[str | None]) -> AnswerCounts:
        said = _with_gold(self.name, outcomes, golds)
        return AnswerCounts(
            gold=len(said),
            correct=sum(alike(answer, gold) for answer, gold in said),
            truncated=sum(isinstance(o, Answer) and self.truncated(o) for o in outcomes),
        )


def alike(one: str, other: str) -> bool:
    """Whether two texts say the same: case, spaces around and how a number is written don't count."""
    return folded(one) == folded(other) or ((number := number_in(one)) is not None and number == number_in(other))


def folded(text: str) -> str:
    """What is compared of two texts that are no numbers."""
    return text.strip().casefold()


def number_in(text: str) -> Decimal | None:
    """The number that a text is, exactly, so that no two long ids become one."""
    try:
        number = Decimal(text.strip())
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def _with_gold(name: str, outcomes: Sequence[Answer | Failure], golds: Sequence[str | None]) -> list[tuple[str, str]]:
    """Answers and their gold values, where there are both."""
    pairs = zip(outcomes, golds, strict=True)
    return [(o.columns[name], gold) for o, gold in pairs if isinstance(o, Answer) and gold is not None]
