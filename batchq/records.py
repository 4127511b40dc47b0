"""The plain data that moves between packages: frozen, slotted, without behaviour beyond JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

END = sys.maxsize  # a position behind every object's last
OBJECT = 1 << 40  # positions that each object of a shard takes: no file of a terabyte is small

PLAN = "meta/plan.json"  # of an output; by these two an output is known for one
RUNS = "meta/runs"
COMPACT = "meta/compact.json"  # says which of an output's folders COMPACTED* is read instead of data/
COMPACTED = "compact-"


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one CSV file is written; fixed in the plan, so that every reader finds the same rows.

    A byte-order mark at the file's start says its encoding, whatever stands here, and is no text. A line ends with LF,
    CR or both. `skip` lines are passed over; a line of blanks and delimiters alone is never a record. A record is a
    line, and goes on with the next while a quoted field is open or, where there is no quote, its line end is escaped.

    - A quoted field begins with the quote, or blanks and the quote, and ends at the next quote that is neither doubled
      nor escaped. Blanks may follow, then the delimiter or the line's end.
    - With an escape and a quote, escape and quote are a quote inside a quoted field, two escapes are one; before any
      other character the escape stands for itself. Unquoted fields are taken as they are.
    - With an escape and no quote, the escape before t, n, r, b, f, v, 0 and Z is the control character that databases
      mean by it, before another letter or digit it stands for itself, and before anything else that is taken as it is.
    - With an escape, an unquoted field of the escape and N is null.

    Where text follows a closed quote, a quote isn't closed before the file's end or in 32 MiB, or a record of several
    lines looks like rows, its first line alone is a row that can't be read, and reading goes on with the second. It
    looks like rows if each line has as many delimiters as the header has, of which there are some, the first doesn't
    begin with the quote and, where commas or semicolons delimit, each begins with digits and such a one.
    """

    delimiter: str = ","
    quote: str = '"'  # empty: no field is quoted
    escape: str = ""  # empty: a quote inside a quoted field is doubled
    encoding: str = "utf-8"
    header: bool = True  # false: the columns are called c0, c1, ...
    skip: int = 0  # lines before the header, or before the first row


@dataclass(frozen=True, slots=True)
class InputObject:
    """One input file as it was when the plan was made."""

    uri: str
    name: str  # relative to the input's root; the first half of every batchq_id
    size: int  # bytes
    etag: str
    dialect: Dialect | None = None  # of a CSV file; None in plans from before there were dialects


@dataclass(frozen=True, slots=True)
class Range:
    """A piece of one input object: the positions from `start` up to `stop`, that one not included.

    `unit` says how they count: "bytes" (of plain JSONL or text, a row belongs to the range in which its first byte
    lies), "rows" (of Parquet or a dataset, by row ordinal), or "stream" (by row ordinal too, of an object that can only
    be read from its beginning).
    """

    unit: str
    start: int = 0
    stop: int = END

    def to_json(self) -> list[Any]:
        return [self.unit, self.start, 0 if self.stop == END else self.stop]

    @classmethod
    def from_json(cls, unit: str, start: int, stop: int) -> Range:
        return cls(unit, start, stop or END)


@dataclass(frozen=True, slots=True)
class Shard:
    """A piece of one input object that one worker labels, or several small objects, one after the other. It is written
    in parts: the next begins after as many bytes, and of a stream as many rows, as the plan says.

    A row's position in a shard is that in its object, and in the shard's n-th object (n from 0) OBJECT * n more.
    """

    index: int
    object: int  # position in Plan.objects
    range: Range
    more: tuple[tuple[int, Range], ...] = ()  # the objects after the first, and their ranges

    @property
    def pieces(self) -> tuple[tuple[int, Range], ...]:
        return ((self.object, self.range), *self.more)

    def place(self, position: int) -> tuple[int, int]:
        """The object, by its place in Plan.objects, and the position in it, of a position in this shard."""
        number, within = divmod(position, OBJECT)
        return self.pieces[number][0], within


@dataclass(frozen=True, slots=True)
class Row:
    """One input row: where it is, its columns, or why it could not be read.

    `position` is the row's ordinal in its object, or the byte offset of its first byte where the
    object is split by bytes; a shard of several objects adds to it. `error` is (code, message) for a row that can't be
    parsed; `raw` is then its text, as far as it can be decoded. `size`: bytes of its values, or of its line.
    """

    id: str
    position: int
    columns: Mapping[str, Any]
    error: tuple[str, str] | None = None
    raw: str | None = None
    size: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said of a row: the task's own columns and what it cost in tokens."""

    columns: dict[str, Any]
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a row has no answer: a stable code and a message without the row's text."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts that add up. Tokens are the engine's own counts; seconds are wall clock."""

    rows: int = 0
    answers: int = 0
    failures: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    correct: int = 0  # answers equal to the gold label
    gold: int = 0  # answers whose row had a gold label, or where text is generated a gold value
    mass: float = 0.0  # sum of label_mass over answers
    gold_unknown: int = (
        0  # answers whose row had a gold value that is none of the labels; 0.1.0 counted these as `gold`
    )
    truncated: int = 0  # answers that were cut off; 0.1.0 didn't count them

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(a + b for a, b in zip(values(self), values(other), strict=True)))


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a committed part says of itself, in its Parquet footer.

    `shard` and `part` give its place, `last` whether the shard ends here, `attempt` the id of the
    attempt that wrote it, `fingerprint` the plan's. `labels` counts the answers by label.
    """

    shard: int
    part: int
    last: bool
    attempt: str
    fingerprint: str
    usage: Usage
    labels: dict[str, int] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)  # by code
    next_position: int = 0  # where the shard's next part begins
    from_spill: int = 0  # rows taken over from an earlier attempt's spill, not asked again
    from_reuse: int = 0  # answers copied from the run that output.reuse names; in `usage` like the others
    from_reuse_tokens: int = 0  # prompt and output tokens of these, which that run has paid for
    quarantined: str = ""  # why the rest of the shard's input can't be read


@dataclass(frozen=True, slots=True)
class Plan:
    """All that is fixed before a worker starts; stored create-only as meta/plan.json."""

    fingerprint: str
    ingredients: dict[str, str]  # what decides an answer, by name -> digest; their hash is the fingerprint
    job: str
    objects: tuple[InputObject, ...]
    shards: tuple[Shard, ...]
    format: str
    schema: str  # the Arrow schema of every output object, base64 of its IPC form
    columns: tuple[str, ...]  # that are read from the input
    rows_per_part: int  # of a stream; other shards are cut to about so many rows
    quantization: str  # the scheme that was chosen; never `auto`
    model: str  # content digest of the model as named
    unreadable: dict[str, str] = field(default_factory=dict)  # input objects left out, by name: why
    left_out: dict[str, int] = field(default_factory=dict)  # files that are no input, by why: how many
    partitions: dict[str, str] = field(default_factory=dict)  # columns by folders named key=value: int64 or string
    snapshot: str = ""  # of a table with a log of its own: which version its objects are, in words
    unknown: bool = True  # whether keys that no column has go to batchq_extra
    checkpoint: str = ""  # digest of what is served; equal to `model` when nothing was quantized
    reuse: str = ""  # output of a finished run whose answers are copied where the batchq_key is the same
    bytes_per_part: int = 0  # as Row.size counts them; 0: no bound, as in plans of version 0.1.0
    verdicts: tuple[dict[str, Any], ...] = ()  # the gate's, of each scheme that it tried: gate.Verdict as JSON
    date: str = (
        ""  # ISO 8601: the present time, as chat templates are told; "" in a plan of 0.1.0: each replica's clock
    )
    model_name: str = ""  # what a person calls the model; "" in plans of before there was this field
    model_revision: str = ""  # the hub's commit, of a model that comes from there


def sealed(fields: dict[str, Any]) -> bytes:
    """JSON with a digest of its own, so that a byte that flipped on its way or at rest is noticed."""
    return json.dumps({"digest": _digest(fields), **fields}, allow_nan=False).encode()


def unsealed(data: bytes) -> dict[str, Any]:
    """What `sealed` was given. Raises ValueError if a byte of it is another."""
    fields = json.loads(data)
    if not isinstance(fields, dict) or fields.pop("digest", None) != _digest(fields):
        raise ValueError("its digest doesn't fit")
    return fields


# msgspec 0.22 looks at a dataclass's fields when it converts to it for the first time. Two threads that do so at once
# end the process in a segmentation fault: 85 of 150 processes of eight threads.
_LEARNING = threading.Lock()
_LEARNT: set[type[Any]] = set()


def restored(fields: Any, kind: type[T], renamed: Mapping[str, str] | None = None) -> T:
    """A record of that kind from the dicts and lists of its JSON, nested records too.

    `renamed`: fields of the record itself as they were called before -> as they are now. Raises ValueError that names
    a field which is missing or doesn't fit.
    """
    if renamed and isinstance(fields, dict):
        fields = {renamed.get(name, name): value for name, value in fields.items()}
    try:
        if kind in _LEARNT:
            return msgspec.convert(fields, kind)
        with _LEARNING:
            record = msgspec.convert(fields, kind)
            _LEARNT.add(kind)
            return record
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from error


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True, allow_nan=False).encode()).hexdigest()


def values(record: Any) -> list[Any]:
    """A record's fields, in order, not descending into nested records."""
    return [getattr(record, f.name) for f in dataclasses.fields(record)]
