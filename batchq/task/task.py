"""What is asked of a row: the prompt, and the answer space bound to one model's tokenizer.

A closed answer space is scored, not decoded: the labels' first distinguishing tokens are looked up
in the distribution that follows the prompt, so one prefill answers the row and gives the whole
distribution.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from batchq.config import Config, TaskConfig
from batchq.engine.protocol import Completion, Prompt
from batchq.model import tokenizer
from batchq.records import Answer, Plan
from batchq.task import answers, labels
from batchq.task.frame import Frame
from batchq.task.gold import Gold
from batchq.task.prompt import Template, names_in


def ingredients(config: TaskConfig) -> dict[str, str]:
    """What of this task decides an answer, by name; each becomes a part of the fingerprint."""
    return {
        "prompt": json.dumps([config.system, config.prompt, config.answer_prefix]),
        "labels": json.dumps([config.kind.value, config.labels, config.codes, config.name]),
        "sampling": json.dumps([config.max_tokens, config.temperature, config.stop, config.seed]),
    }


def open_task(config: Config, path: str, plan: Plan) -> Task:
    """The job's task as it is planned, bound to the tokenizer in a model's folder. Raises ModelError, ConfigError."""
    opened = tokenizer.open_tokenizer(path, config.model.trust_remote_code)
    return Task(config.task, opened, plan.columns, config.model.chat_template, plan.date)


class Task:
    """A task bound to one model's tokenizer. Thread-safe; holds no row."""

    def __init__(
        self,
        config: TaskConfig,
        tokenizer: Any,
        columns: Sequence[str],
        chat_template: Mapping[str, Any] | None = None,
        date: str = "",
    ) -> None:
        """`columns`: the input's column names; `chat_template`: arguments of the model's own; `date`: as in Plan.

        Raises ConfigError, naming the field.
        """
        self.config = config
        self.space = answers.of(config)
        self.tokenizer = tokenizer
        self.gold = Gold(config)
        self._template = Template(config.prompt, columns)
        self._frame = Frame(tokenizer, config.system, config.answer_prefix, chat_template or {}, date)
        lists_choices = "choices" in names_in(config.prompt)
        tokens = labels.tokens_of(self.space.labels, config.codes, lists_choices, self._frame.continuation)
        self.label_texts = tokens.texts
        self.choices = labels.choices(self.space.labels, tokens.texts)
        self.sampling = self.space.sampling(tokens.token_ids)
        salt = json.dumps(ingredients(config), sort_keys=True).encode()
        self._keyed = hashlib.blake2b(digest_size=16, key=hashlib.blake2b(salt, digest_size=32).digest())

    # -- asking ------------------------------------------------------------------------------

    def render(self, columns: Mapping[str, Any]) -> str:
        """The user's message for one row. Raises RowError for a row that can't fill the prompt."""
        return self._template.render(columns, self.choices, self.config.labels)

    @property
    def strips(self) -> bool:
        """Whether the model's chat template takes spaces from around the message."""
        return self._frame.strips

    @property
    def markers(self) -> tuple[str, ...]:
        """What the chat template ends a turn with as plain text, which a row can write too."""
        return self._frame.markers

    def framed(self, message: str) -> str:
        """The whole text that the model reads."""
        return self._frame.text(message)

    def exceeds(self, message: str, tokens: int) -> bool:
        """Whether the message has more tokens for sure, told without tokenising it; False says nothing."""
        return self._frame.exceeds(message, tokens)

    def head(self, message: str, tokens: int) -> str:
        """As much of the message as its first tokens, so many, come from."""
        return self._frame.head(message, tokens)

    def encode(self, messages: Sequence[str], ids: Sequence[str] | None = None) -> list[Prompt]:
        """What the model reads for each message, tokenised as one batch. `ids`: the rows' batchq_ids; where answers are
        sampled, each prompt has its row's seed then."""
        prompts = self._frame.encode(messages)
        if ids is None or not (self.space.decodes and self.sampling.temperature):
            return prompts
        return [Prompt(p.token_ids, self.seed_of(id)) for p, id in zip(prompts, ids, strict=True)]

    def seed_of(self, id: str) -> int:
        """A row's seed, 0 up to 2**63: the same for this row in every run of the task, and another for every other row,
        so that equal rows are drawn anew."""
        digest = hashlib.blake2b(json.dumps([self.config.seed, id]).encode(), digest_size=8).digest()
        return int.from_bytes(digest) >> 1

    def key(self, prompt: Prompt, served: str) -> str:
        """batchq_key: equal keys have equal answers. `served` is the digest of the served model."""
        digest = self._keyed.copy()
        digest.update(served.encode())
        ids = prompt.token_ids
        digest.update(struct.pack(f"<{len(ids)}i", *ids))  # in half of numpy's time
        if prompt.seed is not None:
            digest.update(f"seed {prompt.seed}".encode())
        return digest.hexdigest()

    # -- reading the answer ------------------------------------------------------------------

    def answer(self, completion: Completion) -> Answer:
        """The row's answer. Raises RowError if the completion holds none."""
        columns = self.space.read(completion)
        return Answer(columns, completion.prompt_tokens, completion.cached_tokens, completion.output_tokens)
