"""A row -> the user's message, by the job's Jinja template -> the prompt, by the chat template and the tokenizer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import BuiltinMethodType
from typing import Any

import jinja2
import jinja2.meta
import jinja2.sandbox

from batchq.engine.protocol import Prompt
from batchq.errors import ConfigError, RowError

# A placeholder for the row's text: it shows what the chat template puts around it.
PROBE = "\N{WHITE SQUARE}probe\N{WHITE SQUARE}"
SCOPE = frozenset({"row", "choices", "labels"})  # names that a template may use besides the input's columns
# Without format and format_map, through which a format string reaches attributes.
STRING_METHODS = frozenset(name for name in dir(str) if name[0] != "_" and not name.startswith("format"))


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


def _environment() -> Sandbox:
    def refuse_null(value: Any) -> Any:
        if value is None:
            raise RowError("null_value", "the prompt prints a column that is null in this row")
        return value

    return Sandbox(
        undefined=jinja2.StrictUndefined, autoescape=False, finalize=refuse_null, keep_trailing_newline=False
    )


def names_in(source: str) -> set[str]:
    """The names that a template uses: columns, and those of SCOPE. Raises ConfigError if it is no valid Jinja."""
    try:
        return jinja2.meta.find_undeclared_variables(_environment().parse(source))
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"task.prompt, line {error.lineno}: {error.message}") from error


def prompt_columns(source: str, columns: Sequence[str]) -> list[str]:
    """The input columns that a template reads, all of them if it reads `row`.

    Raises ConfigError if it is no valid Jinja or names a column that isn't there.
    """
    names = names_in(source)
    missing = sorted(names - set(columns) - SCOPE)
    if missing:
        raise ConfigError(
            f"task.prompt uses {', '.join(missing)}, not a column of the input; columns are {', '.join(columns)}"
        )
    return list(columns) if "row" in names else [c for c in columns if c in names]


class Template:
    """The job's template of the user's message. Thread-safe."""

    def __init__(self, source: str, columns: Sequence[str]) -> None:
        """`columns`: the input's column names. Raises ConfigError as `prompt_columns` does."""
        self.reads = prompt_columns(source, columns)
        self._template = _environment().from_string(source)
        self._globals = dict(self._template.globals)  # Jinja would merge them from a chain of maps for each row

    def render(self, columns: Mapping[str, Any], choices: str, labels: Sequence[str]) -> str:
        """The message for one row. Raises RowError for a row that can't fill the template."""
        columns = {**dict.fromkeys(self.reads), **columns}  # a key that a JSON row lacks is null, as it is in the table
        values = [columns[name] for name in self.reads]
        if values and all(v is None or (isinstance(v, str) and not v.strip()) for v in values):
            raise RowError("empty", "every column that the prompt reads is empty in this row")
        try:
            scope = {"row": columns, "choices": choices, "labels": labels}
            context = self._template.new_context({**self._globals, **columns, **scope}, shared=True)
            return "".join(self._template.root_render_func(context))
        except jinja2.UndefinedError as error:
            raise RowError("missing_value", "the prompt reads something that this row lacks") from error
        except jinja2.TemplateError as error:
            raise RowError("prompt", f"the prompt could not be rendered: {type(error).__name__}") from error
        except (TypeError, ValueError, ArithmeticError, KeyError) as error:
            raise RowError("prompt", f"the prompt failed on this row: {type(error).__name__}") from error


class Frame:
    """What the model reads around the user's message, with the tokenizer that encodes it. Thread-safe.

    The chat template is split at the message once, instead of being run for each row.
    """

    def __init__(self, tokenizer: Any, system: str, answer_prefix: str, arguments: Mapping[str, Any]) -> None:
        """`arguments`: the chat template's own; `answer_prefix`: how the model's answer begins.

        Raises ConfigError if the chat template doesn't carry the message through unchanged.
        """
        self.before, after = _around_message(tokenizer, system, arguments)
        self.after = after + answer_prefix
        self._prefix = answer_prefix
        self._add_special_tokens = not tokenizer.chat_template  # a chat template writes them itself
        self._backend = tokenizer.backend_tokenizer
        # A copy that reads "<|im_end|>" and its like as plain text, for rows that contain them.
        self._literal = type(self._backend).from_str(self._backend.to_str())
        self._literal.encode_special_tokens = True
        specials = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special and t.content.strip()]
        self._special = re.compile("|".join(map(re.escape, specials))) if specials else None

    def text(self, message: str) -> str:
        """The whole text that the model reads."""
        return f"{self.before}{message}{self.after}"

    def encode(self, messages: Sequence[str]) -> list[Prompt]:
        """What the model reads for each message: framed, and tokenised as one batch."""
        special = self._special
        suspects = [i for i, m in enumerate(messages) if special is not None and special.search(m)]
        texts = [self.text(m) for m in messages]
        ids = [e.ids for e in self._backend.encode_batch_fast(texts, add_special_tokens=self._add_special_tokens)]
        for i in suspects:  # a row can't close its own turn or open another
            before = self._ids(self.before)
            after = self._backend.encode(self.after, add_special_tokens=False).ids
            ids[i] = before + self._literal.encode(messages[i], add_special_tokens=False).ids + after
        return [Prompt(each) for each in ids]

    def continuation(self, text: str) -> list[int]:
        """The tokens that `text` adds when it follows the prompt's end, after a space where that ends in a word."""
        if self._prefix and not self._prefix[-1].isspace():
            text = f" {text}"
        stem = self.text(PROBE)
        bare, full = self._ids(stem), self._ids(stem + text)
        if full[: len(bare)] == bare and len(full) > len(bare):
            return full[len(bare) :]
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def _ids(self, text: str) -> list[int]:
        """Token ids of a text that begins as a prompt does."""
        return list(self._backend.encode(text, add_special_tokens=self._add_special_tokens).ids)


def _around_message(tokenizer: Any, system: str, arguments: Mapping[str, Any]) -> tuple[str, str]:
    """What the chat template writes before and after the user's message."""
    if not tokenizer.chat_template:
        return f"{system}\n\n" if system else "", ""
    messages = [{"role": "system", "content": system}] if system else []
    chat = [*messages, {"role": "user", "content": PROBE}]
    try:
        text = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **arguments))
    except Exception as error:  # a chat template is the model's own code and raises what it likes
        raise ConfigError(f"the model's chat template refused the messages: {error}") from error
    before, probe, after = text.partition(PROBE)
    if not probe or PROBE in after:
        raise ConfigError("the model's chat template does not print the user's message exactly once")
    return before, after
