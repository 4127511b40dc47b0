"""What is asked of a row: the prompt, and the answer space bound to one model's tokenizer.

A closed answer space is scored, not decoded: the labels' first distinguishing tokens are looked up
in the distribution that follows the prompt, so one prefill answers the row and gives the whole
distribution.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from batchq.config import Config, TaskConfig
from batchq.engine.protocol import Completion, Prompt
from batchq.model import folder
from batchq.records import Answer
from batchq.task import answers, labels
from batchq.task.prompt import Frame, Template, names_in


def ingredients(config: TaskConfig) -> dict[str, str]:
    """What of this task decides an answer, by name; each becomes a part of the fingerprint."""
    return {
        "prompt": json.dumps([config.system, config.prompt, config.answer_prefix]),
        "labels": json.dumps([config.kind.value, config.labels, config.codes, config.name]),
        "sampling": json.dumps([config.max_tokens, config.temperature, config.stop, config.seed]),
    }


def open_task(config: Config, path: str, columns: Sequence[str]) -> Task:
    """The job's task, bound to the tokenizer in a model's folder. `columns`: the input's.

    Raises ModelError, ConfigError.
    """
    tokenizer = folder.open_tokenizer(path, config.model.trust_remote_code)
    return Task(config.task, tokenizer, columns, config.model.chat_template)


class Task:
    """A task bound to one model's tokenizer. Thread-safe; holds no row."""

    def __init__(
        self, config: TaskConfig, tokenizer: Any, columns: Sequence[str], chat_template: Mapping[str, Any] | None = None
    ) -> None:
        """`columns`: the input's column names; `chat_template`: arguments of the model's own.

        Raises ConfigError, naming the field.
        """
        self.config = config
        self.space = answers.of(config)
        self.tokenizer = tokenizer
        self._template = Template(config.prompt, columns)
        self._frame = Frame(tokenizer, config.system, config.answer_prefix, chat_template or {})
        lists_choices = "choices" in names_in(config.prompt)
        tokens = labels.tokens_of(self.space.labels, config.codes, lists_choices, self._frame.continuation)
        self.label_texts = tokens.texts
        self.choices = labels.choices(self.space.labels, tokens.texts)
        self.sampling = self.space.sampling(tokens.token_ids)
        self._salt = json.dumps(ingredients(config), sort_keys=True).encode()

    # -- asking ------------------------------------------------------------------------------

    def render(self, columns: Mapping[str, Any]) -> str:
        """The user's message for one row. Raises RowError for a row that can't fill the prompt."""
        return self._template.render(columns, self.choices, self.config.labels)

    def framed(self, message: str) -> str:
        """The whole text that the model reads."""
        return self._frame.text(message)

    def encode(self, messages: Sequence[str]) -> list[Prompt]:
        """What the model reads for each message, tokenised as one batch."""
        return self._frame.encode(messages)

    def key(self, prompt: Prompt, served: str) -> str:
        """batchq_key: equal keys have equal answers. `served` is the digest of the served model."""
        digest = hashlib.blake2b(digest_size=16, key=hashlib.blake2b(self._salt, digest_size=32).digest())
        digest.update(served.encode())
        digest.update(np.asarray(prompt.token_ids, dtype=np.int32).tobytes())
        return digest.hexdigest()

    # -- reading the answer ------------------------------------------------------------------

    def answer(self, completion: Completion) -> Answer:
        """The row's answer. Raises RowError if the completion holds none."""
        columns = self.space.read(completion)
        return Answer(columns, completion.prompt_tokens, completion.cached_tokens, completion.output_tokens)
