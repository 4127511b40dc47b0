"""What the model reads around the user's message: the chat template's text, and the tokenizer that encodes it all."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from batchq.engine.protocol import Prompt
from batchq.errors import ConfigError
from batchq.task.length import token_length

# Placeholders for texts of a conversation: they show what the chat template puts around them.
PROBE, REPLY, NEXT = (f"\N{WHITE SQUARE}{word}\N{WHITE SQUARE}" for word in ("probe", "reply", "next"))
SPACES = " \n "  # around a probe: does the chat template keep them?
# Of added tokens that aren't "special", those that are written like </think>, [/INST] or {{end}} control a model too; a
# plain word was added for its meaning and stays one token.
MARKUP = re.compile(r"[<\[{|].*[>\]}|]", re.S)

ENCODED_AT_ONCE = 1024 * 1024  # characters: they take some 35 bytes each while they are tokenised

Render = Callable[..., str]


class Frame:
    """What the model reads around the user's message, with the tokenizer that encodes it. Thread-safe.

    The chat template is split at the message once, instead of being run for each row.
    """

    def __init__(
        self, tokenizer: Any, system: str, answer_prefix: str, arguments: Mapping[str, Any], date: str = ""
    ) -> None:
        """`arguments`: the chat template's own; `answer_prefix`: how the model's answer begins; `date`: as in Plan.

        Raises ConfigError if the chat template doesn't carry the message through unchanged.
        """
        chat = _Chat(tokenizer, system, {**arguments, **_frozen(tokenizer.chat_template, date)})
        self.before, after = chat.around(PROBE)
        self.after = after + answer_prefix
        spaced = chat.around(f"{SPACES}{PROBE}{SPACES}")
        self._strips = spaced[0] == self.before, spaced[1] == after
        self._prefix = answer_prefix
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()  # a tokenizer.json may ask for both
        self._backend.no_padding()
        self._token_length = token_length(self._backend)
        self._add_special_tokens = not tokenizer.chat_template  # a chat template writes them itself
        self._control = _Control(tokenizer, f"{self.before}{after}{chat.between_turns()}", self._add_special_tokens)
        endings = [self._control.plain_beginning(text) for text in (after, chat.between_turns())]
        self.markers = tuple(dict.fromkeys(ending.splitlines()[0].strip() for ending in endings if ending))

    @property
    def strips(self) -> bool:
        """Whether the chat template takes spaces from around the message."""
        return any(self._strips)

    def text(self, message: str) -> str:
        """The whole text that the model reads."""
        return f"{self.before}{self._stripped(message)}{self.after}"

    def exceeds(self, message: str, tokens: int) -> bool:
        """Whether the message alone has more tokens for sure; False says nothing."""
        return self._token_length is not None and self._token_length.exceeds(self._stripped(message), tokens)

    def head(self, message: str, tokens: int) -> str:
        """As much of the message as its first tokens, so many, come from."""
        return message if self._token_length is None else message[: tokens * self._token_length.characters]

    def encode(self, messages: Sequence[str]) -> list[Prompt]:
        """What the model reads for each message: framed, and tokenised a few at a time, beside each other."""
        prompts: list[Prompt] = []
        group: list[str] = []
        size = 0
        for message in messages:
            group.append(message)
            size += len(message)
            if size >= ENCODED_AT_ONCE:
                prompts += self._encode(group)
                group, size = [], 0
        return [*prompts, *self._encode(group)]

    def _encode(self, messages: Sequence[str]) -> list[Prompt]:
        suspects = [i for i, m in enumerate(messages) if self._control.is_in(m)]
        texts = [self.text(m) for m in messages]
        ids = [e.ids for e in self._backend.encode_batch_fast(texts, add_special_tokens=self._add_special_tokens)]
        for i in suspects:  # a row can't close its own turn or open another
            ids[i] = self._control.encode_around(self.before, self._stripped(messages[i]), self.after)
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

    def _stripped(self, message: str) -> str:
        """The message as the chat template would print it, which the model was trained on."""
        left, right = self._strips
        message = message.lstrip() if left else message
        return message.rstrip() if right else message

    def _ids(self, text: str) -> list[int]:
        """Token ids of a text that begins as a prompt does."""
        return list(self._backend.encode(text, add_special_tokens=self._add_special_tokens).ids)


class _Control:
    """The tokens that control the model: those that the tokenizer calls special, and other added ones that are written
    as markup or that the chat template writes."""

    def __init__(self, tokenizer: Any, written: str, add_special_tokens: bool) -> None:
        from tokenizers import AddedToken

        added = tokenizer.added_tokens_decoder.items()
        control = {
            number: token.content
            for number, token in added
            if token.content.replace("\N{LOWER ONE EIGHTH BLOCK}", "").strip()  # spaces, as SentencePiece writes them
            and (token.special or MARKUP.fullmatch(token.content) or token.content in written)
        }
        self._ids = frozenset(control) - {tokenizer.unk_token_id}  # which stands for any text that isn't known
        texts = sorted(control.values(), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, texts))) if texts else None
        self._backend = tokenizer.backend_tokenizer
        loose = any(token.normalized for number, token in added if number in control)
        self._normalizer = self._backend.normalizer if loose else None  # "＜s＞" may become "<s>"
        # A copy that reads "<|im_end|>" and its like as plain text, for rows that contain them.
        self._literal = type(self._backend).from_str(self._backend.to_str())
        self._literal.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in texts])
        self._literal.encode_special_tokens = True
        self._at_ends = self._put_at_ends() if add_special_tokens else ([], [])

    def is_in(self, text: str) -> bool:
        """Whether a tokenizer would find a control token in the text."""
        if self._pattern is None:
            return False
        if self._pattern.search(text):
            return True
        return self._normalizer is not None and bool(self._pattern.search(self._normalizer.normalize_str(text)))

    def encode_around(self, before: str, message: str, after: str) -> list[int]:
        """Token ids of all three, with the message's control tokens as text. The frame's own text beside the message is
        encoded with it, as it is where a message has none."""
        opened, closed = self._control_ends(before), self._control_begins(after)
        first, last = self._at_ends
        head = self._backend.encode(before[:opened], add_special_tokens=False).ids
        tail = self._backend.encode(after[closed:], add_special_tokens=False).ids
        return [*first, *head, *self._as_text(f"{before[opened:]}{message}{after[:closed]}"), *tail, *last]

    def plain_beginning(self, text: str) -> str:
        """What stands before the first control token, without spaces around: text that a row can write too."""
        return text[: self._control_begins(text)].strip()

    def _control_ends(self, text: str) -> int:
        """Where the last control token ends, the spaces that it takes with it included; 0 without any."""
        found = self._backend.encode(text, add_special_tokens=False)
        return max((end for id, (_, end) in zip(found.ids, found.offsets, strict=True) if id in self._ids), default=0)

    def _control_begins(self, text: str) -> int:
        """Where the first control token begins; the text's length without any."""
        found = self._backend.encode(text, add_special_tokens=False)
        pairs = zip(found.ids, found.offsets, strict=True)
        return min((start for id, (start, _) in pairs if id in self._ids), default=len(text))

    def _as_text(self, text: str) -> list[int]:
        """Some vocabularies have a control token among their words too (Unigram's do): then it is cut."""
        assert self._pattern is not None
        cut = re.split(f"({self._pattern.pattern})", text)
        letters = [piece for i, part in enumerate(cut) for piece in (part if i % 2 else [part])]
        for pieces in ([text], letters, list(text)):
            ids = [id for piece in pieces for id in self._literal.encode(piece, add_special_tokens=False).ids]
            if self._ids.isdisjoint(ids):
                break
        return [id for id in ids if id not in self._ids]

    def _put_at_ends(self) -> tuple[list[int], list[int]]:
        """What the tokenizer itself puts before and after a text."""
        full, bare = (self._backend.encode("a", add_special_tokens=added).ids for added in (True, False))
        at = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
        return full[:at], full[at + len(bare) :]


class _Chat:
    """The model's chat template, or what stands for one where it has none."""

    def __init__(self, tokenizer: Any, system: str, arguments: Mapping[str, Any]) -> None:
        self._tokenizer, self._arguments = tokenizer, arguments
        self._system = [{"role": "system", "content": system}] if system else []

    def around(self, message: str) -> tuple[str, str]:
        """What is written before and after PROBE in the user's message. Raises ConfigError if it isn't there once."""
        if not self._tokenizer.chat_template:
            system = f"{self._system[0]['content']}\n\n" if self._system else ""
            before, _, after = message.partition(PROBE)
            return f"{system}{before}", after
        try:
            text = self._rendered([{"role": "user", "content": message}])
        except Exception as error:  # a chat template is the model's own code and raises what it likes
            raise ConfigError(f"the model's chat template refused the messages: {error}") from error
        before, probe, after = text.partition(PROBE)
        if not probe or PROBE in after:
            raise ConfigError("the model's chat template does not print the user's message exactly once")
        return before, after

    def between_turns(self) -> str:
        """What is written between an answer and the next message; empty where that can't be told."""
        if not self._tokenizer.chat_template:
            return ""
        said = zip(("user", "assistant", "user"), (PROBE, REPLY, NEXT), strict=True)
        try:
            text = self._rendered([{"role": role, "content": content} for role, content in said])
        except Exception:  # a template for one turn alone, or one that wants other roles
            return ""
        return text.partition(REPLY)[2].partition(NEXT)[0]

    def _rendered(self, messages: list[dict[str, str]]) -> str:
        chat = [*self._system, *messages]
        return str(
            self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **self._arguments)
        )


def _frozen(chat_template: Any, date: str) -> dict[str, Any]:
    """The chat template's `strftime_now`, if it calls that, with the time standing still: by the clock a prompt would
    change at midnight, and its key with it."""
    if not date or "strftime_now" not in str(chat_template):
        return {}
    return {"strftime_now": datetime.fromisoformat(date).strftime}
