"""What is asked of a row: the prompt, and the answer space bound to one model's tokenizer.

A closed answer space is scored, not decoded: the labels' first distinguishing tokens are looked up
in the distribution that follows the prompt, so one prefill answers the row and gives the whole
distribution.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import BuiltinMethodType
from typing import Any

import jinja2
import jinja2.meta
import jinja2.sandbox
import numpy as np

from batchq.config import TaskConfig
from batchq.engine.protocol import Completion, Prompt
from batchq.errors import ConfigError, RowError
from batchq.records import Answer
from batchq.task import answers

# Stands where the row's text will stand, to find out what the chat template puts around it.
PROBE = "\N{WHITE SQUARE}probe\N{WHITE SQUARE}"
SCOPE = frozenset({"row", "choices", "labels"})
# Without format and format_map, through which a format string reaches attributes.
STRING_METHODS = frozenset(name for name in dir(str) if name[0] != "_" and not name.startswith("format"))


def ingredients(config: TaskConfig) -> dict[str, str]:
    """What of this task decides an answer, by name; each becomes a part of the fingerprint."""
    return {
        "prompt": json.dumps([config.system, config.prompt, config.answer_prefix]),
        "labels": json.dumps([config.kind.value, config.labels, config.codes, config.name]),
        "sampling": json.dumps([config.max_tokens, config.temperature, config.stop, config.seed]),
    }


def prompt_columns(config: TaskConfig, columns: Sequence[str]) -> list[str]:
    """The input columns that the prompt reads, all of them if it reads `row`.

    Raises ConfigError if the prompt is no valid Jinja or names a column that isn't there.
    """
    try:
        names = jinja2.meta.find_undeclared_variables(_environment().parse(config.prompt))
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"task.prompt, line {error.lineno}: {error.message}") from error
    missing = sorted(names - set(columns) - SCOPE)
    if missing:
        raise ConfigError(
            f"task.prompt uses {', '.join(missing)}, not a column of the input; columns are {', '.join(columns)}"
        )
    return list(columns) if "row" in names else [c for c in columns if c in names]


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    def refuse_null(value: Any) -> Any:
        if value is None:
            raise RowError("null_value", "the prompt prints a column that is null in this row")
        return value

    return Sandbox(
        undefined=jinja2.StrictUndefined, autoescape=False, finalize=refuse_null, keep_trailing_newline=False
    )


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with a short cut for the methods of plain strings, which is nearly all that a prompt calls.

    The sandbox looks at each attribute and each call anew, and was 40% of a worker's Python time on the shipped job.
    """

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is str and attribute in STRING_METHODS:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        if type(obj) is BuiltinMethodType and type(obj.__self__) is str and obj.__name__ in STRING_METHODS:
            return obj(*args, **kwargs)
        return super().call(context, obj, *args, **kwargs)


@dataclass(frozen=True, slots=True)
class Frame:
    """What the model's chat template puts before and after the user's message."""

    before: str
    after: str
    add_special_tokens: bool  # only where there is no chat template to write them


class Task:
    """A task bound to one model's tokenizer. Thread-safe; holds no row."""

    def __init__(
        self, config: TaskConfig, tokenizer: Any, columns: Sequence[str], chat_template: Mapping[str, Any] | None = None
    ) -> None:
        """`columns`: the input's column names. Raises ConfigError, naming the field."""
        self.config = config
        self.space = answers.of(config)
        self.tokenizer = tokenizer
        self.reads = prompt_columns(config, columns)
        self._template = _environment().from_string(config.prompt)
        self._globals = dict(self._template.globals)  # Jinja would merge them from a chain of maps for each row
        frame = _frame(tokenizer, config.system, dict(chat_template or {}))
        self._frame = dataclasses.replace(frame, after=frame.after + config.answer_prefix)
        backend = tokenizer.backend_tokenizer
        # A copy that reads "<|im_end|>" and its like as plain text, for rows that contain them.
        self._literal = type(backend).from_str(backend.to_str())
        self._literal.encode_special_tokens = True
        specials = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special and t.content.strip()]
        self._special = re.compile("|".join(map(re.escape, specials))) if specials else None
        self.asked, score_ids = self._labels()
        self.choices = self._choices()
        self.sampling = self.space.sampling(score_ids)
        self._salt = json.dumps(ingredients(config), sort_keys=True).encode()

    # -- asking ------------------------------------------------------------------------------

    def render(self, columns: Mapping[str, Any]) -> str:
        """The user's message for one row. Raises RowError for a row that can't fill the prompt."""
        columns = {**dict.fromkeys(self.reads), **columns}  # a key that a JSON row lacks is null, as it is in the table
        values = [columns[name] for name in self.reads]
        if values and all(v is None or (isinstance(v, str) and not v.strip()) for v in values):
            raise RowError("empty", "every column that the prompt reads is empty in this row")
        try:
            scope = {"row": columns, "choices": self.choices, "labels": self.config.labels}
            context = self._template.new_context({**self._globals, **columns, **scope}, shared=True)
            return "".join(self._template.root_render_func(context))
        except jinja2.UndefinedError as error:
            raise RowError("missing_value", "the prompt reads something that this row lacks") from error
        except jinja2.TemplateError as error:
            raise RowError("prompt", f"the prompt could not be rendered: {type(error).__name__}") from error
        except (TypeError, ValueError, ArithmeticError, KeyError) as error:
            raise RowError("prompt", f"the prompt failed on this row: {type(error).__name__}") from error

    def framed(self, message: str) -> str:
        """The whole text that the model reads."""
        return f"{self._frame.before}{message}{self._frame.after}"

    def encode(self, messages: Sequence[str]) -> list[Prompt]:
        """What the model reads for each message: framed, and tokenised as one batch."""
        special = self._special
        suspects = [i for i, m in enumerate(messages) if special is not None and special.search(m)]
        texts = [self.framed(m) for m in messages]
        backend = self.tokenizer.backend_tokenizer
        ids = [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=self._frame.add_special_tokens)]
        for i in suspects:  # a row can't close its own turn or open another
            before = backend.encode(self._frame.before, add_special_tokens=self._frame.add_special_tokens).ids
            after = backend.encode(self._frame.after, add_special_tokens=False).ids
            ids[i] = before + self._literal.encode(messages[i], add_special_tokens=False).ids + after
        return [Prompt(each) for each in ids]

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

    # -- the labels --------------------------------------------------------------------------

    def _continuation(self, text: str) -> list[int]:
        """The tokens that `text` adds when it follows the prompt's end, after a space where that ends in a word."""
        if self.config.answer_prefix and not self.config.answer_prefix[-1].isspace():
            text = f" {text}"
        backend, special = self.tokenizer.backend_tokenizer, self._frame.add_special_tokens
        stem = f"{self._frame.before}{PROBE}{self._frame.after}"
        bare = backend.encode(stem, add_special_tokens=special).ids
        full = backend.encode(stem + text, add_special_tokens=special).ids
        if full[: len(bare)] == bare and len(full) > len(bare):
            return list(full[len(bare) :])
        return list(backend.encode(text, add_special_tokens=False).ids)

    def _labels(self) -> tuple[list[str], list[int]]:
        """(the texts that stand for the labels, the token id that each begins with)."""
        config = self.config
        if not self.space.labels:
            return [], []
        if not config.codes:
            ids = [self._continuation(label) for label in config.labels]
            firsts = [i[0] for i in ids]
            if len(set(firsts)) == len(firsts):
                return list(config.labels), firsts
            if config.codes is False:
                raise ConfigError(
                    "task.codes=false: some labels begin with the same token for this model; "
                    "leave task.codes unset to answer by letter, or rename the labels"
                )
        letters = list(string.ascii_uppercase[: len(config.labels)])
        if len(letters) < len(config.labels):
            raise ConfigError(
                f"task.labels: {len(config.labels)} labels that collide; at most 26 can be coded by letter"
            )
        if "choices" not in jinja2.meta.find_undeclared_variables(_environment().parse(config.prompt)):
            raise ConfigError(
                "task.prompt: labels are answered by letter here (they begin with the same token, or task.codes=true), "
                "so the prompt has to list them: put {{ choices }} in it"
            )
        return letters, [self._continuation(letter)[0] for letter in letters]

    def _choices(self) -> str:
        if self.asked == list(self.config.labels):
            return ", ".join(self.asked)
        return "\n".join(f"{code}: {label}" for code, label in zip(self.asked, self.config.labels, strict=True))


def _frame(tokenizer: Any, system: str, arguments: dict[str, Any]) -> Frame:
    """Split what the chat template writes at the user's message, once, instead of running it per row.

    Raises ConfigError if the template does not carry the message through unchanged.
    """
    if not tokenizer.chat_template:
        return Frame(f"{system}\n\n" if system else "", "", add_special_tokens=True)
    messages = [{"role": "system", "content": system}] if system else []

    def whole(content: str) -> str:
        chat = [*messages, {"role": "user", "content": content}]
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **arguments))

    try:
        text = whole(PROBE)
    except Exception as error:  # a chat template is the model's own code and raises what it likes
        raise ConfigError(f"the model's chat template refused the messages: {error}") from error
    before, probe, after = text.partition(PROBE)
    if not probe or PROBE in after:
        raise ConfigError("the model's chat template does not print the user's message exactly once")
    return Frame(before, after, add_special_tokens=False)
