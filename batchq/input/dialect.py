"""How CSV files are written, found out from their beginnings where the configuration leaves it open."""

from __future__ import annotations

import dataclasses
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from batchq.config import CsvConfig, character
from batchq.errors import InputError
from batchq.input import looks
from batchq.input.delimited import Records, column_names, csv_lines
from batchq.input.encoding import encoding_of
from batchq.input.formats import base, opened, readable
from batchq.input.former import Fields
from batchq.input.quoting import quoting_of
from batchq.records import Dialect, InputObject

OPENED_AT_ONCE = 16  # objects, when each is looked at
SAMPLE = 1 << 20  # bytes of a file that are looked at
SAMPLED = 16  # files that are looked at so closely; the others are tried with what was found
SAMPLE_OF_OTHERS = 1 << 17
RECORDS = 2000  # of them, for each way of reading that is tried
LINES = 30  # among which the header is looked for
DELIMITERS = ",;\t|\x01"  # the last is Hive's
CLEAR = 0.6  # a delimiter that gives this share of the records the same number of fields is one
LONG = 1000  # characters; questions of a survey are names too, but none is as long

NAMES = {",": "comma", ";": "semicolon", "\t": "tab", "|": "pipe", " ": "space"}
NUMBER = re.compile(r"\s*[-+]?\d[\d.,]*\s*")
SEP = re.compile('"?sep=(.)"?[\r\n]*', re.I)  # Excel's own first line


@dataclass(frozen=True, slots=True)
class Found:
    """What is known of a file's dialect; None where nothing tells of it."""

    delimiter: str | None = None
    quote: str | None = None
    escape: str | None = None
    encoding: str | None = None
    header: bool | None = None
    skip: int | None = None
    columns: tuple[str, ...] = ()

    def over(self, other: Found) -> Found:
        """This, and of the other what isn't known here."""
        mine = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return dataclasses.replace(other, **{name: value for name, value in mine.items() if value not in (None, ())})

    def dialect(self, default: Dialect) -> Dialect:
        known = {f.name: getattr(self, f.name) for f in dataclasses.fields(Dialect)}
        return dataclasses.replace(default, **{name: value for name, value in known.items() if value is not None})


def with_dialects(objects: list[InputObject], format: str, csv: CsvConfig) -> tuple[list[InputObject], dict[str, str]]:
    """CSV files with the dialect of each, and those that can't be read, by name: why. Other formats have none.

    What the configuration says goes for all files. What a file doesn't tell itself is as in most of the others.
    """
    if format != "csv":
        return objects, {}
    said = _said(csv)
    step = max(1, len(objects) // SAMPLED)
    closely, others = objects[::step], [obj for i, obj in enumerate(objects) if i % step]
    seen = _each(closely, lambda obj: find(obj, said, SAMPLE))
    known = [found for found in seen.values() if isinstance(found, Found)]
    usual = Found(
        delimiter=_most(found.delimiter for found in known),
        quote=_most(found.quote for found in known),
        escape=_most(found.escape for found in known),
    )
    columns = known[0].columns if known else ()

    def again(obj: InputObject) -> Found:
        guess = said.over(dataclasses.replace(usual, columns=columns))
        return _as_guessed(obj, guess) or find(obj, said, SAMPLE_OF_OTHERS)

    seen |= _each(others, again)
    read: list[InputObject] = []
    refused: dict[str, str] = {}
    for obj in objects:
        found = seen[obj.name]
        if isinstance(found, str):
            refused[obj.name] = found
        elif found.columns and sorted(found.columns) != sorted(columns):
            refused[obj.name] = (
                f"{obj.uri}: has other columns than {read[0].name if read else 'the others'}; label them apart, or is "
                "its first line no header? (input.csv.header)"
            )
        else:
            read.append(dataclasses.replace(obj, dialect=found.over(usual).dialect(_by_name(obj))))
    return read, refused


def words(objects: Sequence[InputObject]) -> str:
    """The dialect of most files in a person's words, and how many are written otherwise; empty if they aren't CSV."""
    told = Counter(obj.dialect for obj in objects if obj.dialect)
    if not told:
        return ""
    usual, count = told.most_common(1)[0]
    others = [(obj.name, obj.dialect) for obj in objects if obj.dialect and obj.dialect != usual]
    if not others:
        return _words(usual)
    name, dialect = others[0]
    return f"{_words(usual)} in {count:,} files; otherwise in {len(others):,}, as {name}: {_words(dialect)}"


def _words(dialect: Dialect) -> str:
    quote, escape = dialect.quote, dialect.escape
    inside = f"after {escape}" if escape else "doubled"
    parts = [
        NAMES.get(dialect.delimiter, ascii(dialect.delimiter)) + " between fields",
        f"{quote} around them, {inside} inside" if quote else f"no quotes{f', escape {escape}' if escape else ''}",
        dialect.encoding,
    ]
    if not dialect.header:
        parts.append("no header, columns c0, c1, ...")
    if dialect.skip:
        parts.append(f"after {dialect.skip} {'line' if dialect.skip == 1 else 'lines'}")
    return " · ".join(parts)


# ---- several files ----


def _said(csv: CsvConfig) -> Found:
    """What the configuration says."""
    quote, escape = character("quote", csv.quote), character("escape", csv.escape)
    return Found(
        delimiter=character("delimiter", csv.delimiter),
        quote=quote,
        escape="" if escape and escape == quote else escape,  # pandas and DuckDB call a doubled quote so
        encoding=csv.encoding and csv.encoding.lower(),
        header=csv.header,
        skip=csv.skip,
    )


def _each(objects: Sequence[InputObject], look: Callable[[InputObject], Found]) -> dict[str, Found | str]:
    """What is found of each object, by name, or why it can't be read."""

    def one(obj: InputObject) -> Found | str:
        try:
            return look(obj)
        except InputError as error:
            return str(error)

    with ThreadPoolExecutor(OPENED_AT_ONCE) as threads:
        return dict(zip((obj.name for obj in objects), threads.map(one, objects), strict=True))


def _most(values: Iterable[str | None]) -> str | None:
    told = Counter(value for value in values if value is not None)
    return told.most_common(1)[0][0] if told else None


def _by_name(obj: InputObject) -> Dialect:
    return Dialect({".tsv": "\t", ".tab": "\t", ".psv": "|"}.get(base(obj.name)[0].suffix.lower(), ","))


def _as_guessed(obj: InputObject, guess: Found) -> Found | None:
    """The guess, if all of the file's first records fit it, under the columns that it names."""
    encoding, lines = _beginning(obj, guess.encoding, SAMPLE_OF_OTHERS)
    dialect = guess.dialect(_by_name(obj))
    records = Records(iter(lines), dialect)
    table = list(islice(records, RECORDS))
    width = len(table[0][0]) if table else 0
    fits = all(error is None and len(fields) == width for fields, _, error in table)
    names = column_names(table[0][0]) if table and dialect.header else list(guess.columns)
    if not fits or width < 2 or sorted(names) != sorted(guess.columns):
        return None
    return dataclasses.replace(guess, encoding=encoding, skip=guess.skip or 0)


def _beginning(obj: InputObject, said: str | None, size: int) -> tuple[str | None, list[str]]:
    """The encoding, and the lines among the first `size` bytes. Raises InputError where the encoding can't be told."""
    with readable(obj, "csv"), opened(obj) as file:
        head = file.read(size)
        whole = len(head) < size or not file.read(1)
    if other := looks.as_binary(head) or looks.as_markup(head):
        raise InputError(f"{obj.uri}: looks like {other}")
    encoding = said or encoding_of(obj, head, whole)
    lines = [line for line in csv_lines(io.BytesIO(head), encoding or "utf-8") if line]
    return encoding, lines if whole or len(lines) < 2 else lines[:-1]  # the last is cut short


# ---- one file ----


def find(obj: InputObject, said: Found, size: int) -> Found:
    """What the file's first `size` bytes tell, beside what is said. Raises InputError where that isn't enough."""
    encoding, lines = _beginning(obj, said.encoding, size)
    if said.header is None and lines and (other := looks.as_json(lines[0].encode(errors="replace"))):
        raise InputError(f"{obj.uri}: looks like {other}")
    skip, delimiter = said.skip or 0, said.delimiter
    if said.skip is None and lines and (sep := SEP.fullmatch(lines[0])):
        skip, delimiter = 1, delimiter or sep[1]
    by_name = _by_name(obj)
    delimiter = delimiter or _delimiter(lines[skip:], by_name.delimiter)
    dialect = dataclasses.replace(said, delimiter=delimiter, skip=0).dialect(by_name)
    if said.skip is None and delimiter and dialect.header:
        skip += _title(obj, lines[skip:], dialect)
    lines = lines[skip:]
    quote, escape = quoting_of(lines, dialect, said.quote, said.escape)
    found = dataclasses.replace(
        said, delimiter=delimiter, quote=quote, escape=escape, encoding=encoding, header=dialect.header, skip=skip
    )
    table = _records(lines, dataclasses.replace(found, skip=0).dialect(by_name))
    header = table[0] if table else []
    if said.header is None:
        _refuse_data(obj, header, table[1:])
    names = column_names(header) if dialect.header else [f"c{number}" for number in range(len(header))]
    return dataclasses.replace(found, columns=tuple(names))


def _records(lines: list[str], dialect: Dialect) -> list[Fields]:
    """The first records, as far as they can be read."""
    return [fields for fields, _, error in islice(Records(iter(lines), dialect), RECORDS) if not error]


def _delimiter(lines: list[str], by_name: str) -> str | None:
    """The delimiter by which most records have as many fields as the first; None if none does."""
    named = by_name != ","  # .csv says nothing, half the world writes semicolons
    best: tuple[tuple[bool, bool, bool, float, int], str] | None = None
    for delimiter in DELIMITERS:
        counts = [len(fields) for fields, _, _ in islice(Records(iter(lines), Dialect(delimiter)), RECORDS)]
        several = Counter(count for count in counts if count > 1).most_common(1)
        if not several:
            continue
        width, often = several[0]
        share = often / len(counts)
        clear = share >= CLEAR and (counts[0] == width or not named or delimiter == by_name)
        score = (clear and named and delimiter == by_name, clear, counts[0] == width, share, width)
        if (clear or counts[0] > 1) and (best is None or score > best[0]):
            best = score, delimiter
    return best[1] if best else None


def _title(obj: InputObject, lines: list[str], dialect: Dialect) -> int:
    """How many lines stand before the header. Raises InputError where that can't be told."""
    table = _records(lines, dialect)
    if not table:
        return 0
    width, often = Counter(map(len, table)).most_common(1)[0]
    used = max((i for fields in table for i, value in enumerate(fields) if value), default=0) + 1
    if min(width, used) < 2 or often < CLEAR * len(table):
        return 0
    passed = False  # something that no header is
    for number, line in enumerate(lines[:LINES]):
        fields = next(iter(_records([line], dialect)), None)
        if fields is None and line.strip():
            return 0  # a header of several lines
        if fields is None or line.startswith("#") or _spreadsheet_title(fields, width):
            passed = True
        elif len(fields) == width and (not number or passed or _heads_numbers(fields, table)):
            return number
        elif len(fields) > 1:
            if not number and width > len(fields) and not any(any(row[len(fields) :]) for row in table):
                return 0  # the rows end with delimiters, the header doesn't
            break
    raise InputError(
        f"{obj.uri}: its first line has {len(table[0])} fields, most others have {width}; say with input.csv.skip how "
        "many lines stand before the header, 0 if it is the header"
    )


def _spreadsheet_title(fields: Fields, width: int) -> bool:
    """A title, and delimiters up to the last column."""
    return len(fields) == width > 2 and bool(fields[0]) and not any(fields[1:])


def _heads_numbers(names: Fields, table: list[Fields]) -> bool:
    """Whether something that is no number stands over a column of numbers."""
    return any(_of_numbers(table, names, i) and not NUMBER.fullmatch(name or "") for i, name in enumerate(names))


def _of_numbers(table: list[Fields], names: Fields, column: int) -> bool:
    values = [fields[column] or "" for fields in table if len(fields) == len(names) and fields != names]
    return bool(values) and all(map(NUMBER.fullmatch, values))


def _refuse_data(obj: InputObject, header: Fields, rows: list[Fields]) -> None:
    """Raises InputError for a first line that is no header: a number over a column of numbers, or too long a name."""
    for i, name in enumerate(header):
        if len(name or "") > LONG or (NUMBER.fullmatch(name or "") and _of_numbers(rows, header, i)):
            raise InputError(
                f"{obj.uri}: its first line looks like a row and not like a header; say input.csv.header=false, and "
                "its columns are called c0, c1, ..., or input.csv.header=true"
            )
