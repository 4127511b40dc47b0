"""CSV and TSV -> rows, by ordinal: a record may run over several lines, so it can't be found by bytes.

What a file's dialect means for its records is said at `records.Dialect`.
"""

from __future__ import annotations

import codecs
import io
import itertools
import re
from collections import Counter, deque
from collections.abc import Iterator
from typing import BinaryIO

from batchq.errors import InputError
from batchq.input import broken
from batchq.input.encoding import bom_of
from batchq.input.former import Fields, Record, former_records
from batchq.input.sizes import text_bytes
from batchq.records import Dialect, InputObject, Row

BAD = "\udc80"  # stands for bytes that can't be decoded; no text holds half of a surrogate pair
UNCLOSED = "a quote is not closed before the end of the file"
PROSE = ",;"  # delimiters that texts are full of
CONTROLS = {"t": "\t", "n": "\n", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "0": "\0", "Z": "\x1a"}


def _mark(error: UnicodeError) -> tuple[str, int]:
    if isinstance(error, UnicodeDecodeError):
        return BAD, error.end
    raise error


codecs.register_error("batchq", _mark)


def csv_rows(obj: InputObject, file: BinaryIO, columns: list[str] | None, skip_until: int) -> Iterator[Row]:
    names, records = csv_table(obj, file)
    if columns is not None and (missing := [name for name in columns if name not in names]):
        raise InputError(f"{obj.uri}: its header lacks the column {missing[0]}; or has it none? (input.csv.header)")
    prefix, width = f"{obj.name}:", len(names)
    for ordinal, (values, raw, error) in enumerate(records):
        if ordinal < skip_until:
            continue
        if error is None and len(values) != width:
            if len(values) > width and obj.dialect and not any(values[width:]):
                values = values[:width]  # a spreadsheet ends its lines with delimiters
            else:
                error = "csv_columns", f"{len(values)} fields, but the header has {width}"
        if error is not None:
            yield broken.row(prefix, ordinal, *error, raw)
            continue
        row = dict(zip(names, values, strict=True))
        wanted = row if columns is None else {name: row[name] for name in columns}
        yield Row(f"{prefix}{ordinal}", ordinal, wanted, size=text_bytes(raw))


def csv_table(obj: InputObject, file: BinaryIO) -> tuple[list[str], Iterator[Record]]:
    """The names of the columns, and the records. Raises InputError for a header that can't be read, or that names a
    column twice."""
    if obj.dialect is None:
        records = former_records(obj, file)
        header, _, error = next(records, ([], "", None))
        names = [value or "" for value in header]
    else:
        records = new = Records(csv_lines(file, obj.dialect.encoding), obj.dialect)
        if not obj.dialect.header:
            return _without_header(new)
        header, _, error = next(new, ([], "", None))
        new.width, names = len(header), column_names(header)
    if error is not None:
        raise InputError(f"{obj.uri}: its header can't be read ({error[1]})")
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError(
            f"{obj.uri}: its header names the column {repeated[0]} more than once; rename one, or say "
            "input.csv.header=false input.csv.skip=1 and take the columns as c0, c1, ..."
        )
    return names, records


def _without_header(records: Records) -> tuple[list[str], Iterator[Record]]:
    """As many columns as the first record has that can be read."""
    first: list[Record] = []
    for record in records:
        first.append(record)
        records.width = len(record[0])
        if record[2] is None:
            break
    return [f"c{number}" for number in range(records.width)], itertools.chain(first, records)


def column_names(header: Fields) -> list[str]:
    """Names without the blanks around them. Those without a name are called by their place, as c0; empty ones at the
    end, which a spreadsheet leaves, are no columns."""
    names = [(name or "").strip() for name in header]
    while names and not names[-1]:
        names.pop()
    return [name or f"c{number}" for number, name in enumerate(names)]


def csv_lines(file: BinaryIO, encoding: str) -> Iterator[str | None]:
    """Lines with their ends, decoded; None for one that is too long. Bytes that can't be decoded are BAD."""
    head = file.read(4)
    file.seek(0)
    text = io.TextIOWrapper(file, bom_of(head) or encoding, errors="batchq", newline="")
    while line := text.readline(broken.MAX_LINE):
        if len(line) < broken.MAX_LINE or line[-1] in "\r\n":
            yield line
            continue
        while len(rest := text.readline(broken.MAX_LINE)) == broken.MAX_LINE and rest[-1] not in "\r\n":
            pass
        yield None


class _BrokenRecord(Exception):
    """Why the first of the lines that were taken for a record is none."""


class Records(Iterator[Record]):
    """The records of a CSV file that aren't blank: fields (None is null), raw text and error; the header first."""

    def __init__(self, lines: Iterator[str | None], dialect: Dialect) -> None:
        self.dialect = dialect
        self.width = 0  # fields of the header, empty ones at its end too; 0 while it isn't read
        self.quoted = 0  # fields that were, so far
        self._lines = itertools.islice(lines, dialect.skip, None)
        self._again: deque[str | None] = deque()  # lines to be read once more
        self._blank = dialect.delimiter + " \t\r\n\v\f"
        self._size = 0  # characters of the record under way
        self._special = [char for char in (dialect.quote, dialect.escape) if char]
        self._null = dialect.escape + "N" if dialect.escape else None
        delimiter, quote, escape = map(re.escape, (dialect.delimiter, dialect.quote, dialect.escape))
        end = rf"(?={delimiter}|[\r\n]|\Z)"
        if quote:
            inside = rf"[^{quote}{escape}]|{quote}{quote}" + (rf"|{escape}." if escape else "")
            self._stop = re.compile(f"{quote}|{escape}" if escape else quote)
            self._after = re.compile(f" *{end}")
            self._padded = re.compile(f" +({quote}(?:{inside})*{quote}) *{end}", re.S)
        elif escape:
            self._plain = re.compile(rf"(?:[^{delimiter}{escape}]|{escape}.)*{escape}?", re.S)
            self._escaped = re.compile(rf"{escape}(.)", re.S)

    def __next__(self) -> Record:
        while True:
            line = self._next_line()
            if line is None:
                return [], "", broken.TOO_LONG
            if not line:
                raise StopIteration
            if line.strip(self._blank):
                break
        taken = [line]
        try:
            fields = self._split(taken)
        except _BrokenRecord as error:
            self._again.extendleft(reversed(taken[1:]))
            return [], _readable(line), ("invalid_csv", str(error))
        text = taken[0] if len(taken) == 1 else "".join(taken)
        return fields, _readable(text), self._undecodable if BAD in text else None

    @property
    def _undecodable(self) -> tuple[str, str]:
        if self.dialect.encoding == "utf-8":
            return broken.NOT_UTF8
        return "invalid_encoding", f"not valid {self.dialect.encoding}"

    def _next_line(self) -> str | None:
        """The next line, None if it is too long, empty at the end."""
        return self._again.popleft() if self._again else next(self._lines, "")

    def _split(self, taken: list[str]) -> Fields:
        """The fields of the record that begins with the line in `taken`, to which its other lines are added."""
        line = taken[0]
        if not any(char in line for char in self._special):
            return [*_without_end(line).split(self.dialect.delimiter)]
        self._size = len(line)
        return self._quoted_fields(taken) if self.dialect.quote else self._escaped_fields(taken)

    def _more(self, taken: list[str]) -> str:
        """One more line of this record."""
        if self._size > broken.MAX_LINE:
            raise _BrokenRecord(f"a quote is not closed in {broken.MAX_LINE // 1024**2} MiB")
        line = self._next_line()
        if line is None:
            self._again.appendleft(None)
            raise _BrokenRecord("a line inside its quotes is too long")
        if not line:
            raise _BrokenRecord(UNCLOSED)
        self._size += len(line)
        taken.append(line)
        return line

    def _quoted_fields(self, taken: list[str]) -> Fields:
        delimiter, quote = self.dialect.delimiter, self.dialect.quote
        fields: Fields = []
        line, at = taken[0], 0
        while True:
            if line.startswith(quote, at):
                value, at = self._inside(taken, at + 1)
                fields.append(value)
                line = taken[-1]
            elif padded := self._padded.match(line, at):
                fields.append(self._inside([padded[1]], 1)[0])
                at = padded.end()
            else:
                end = line.find(delimiter, at)
                value = line[at:end] if end >= 0 else _without_end(line)[at:]
                fields.append(None if value == self._null else value)
                at = end if end >= 0 else len(line)
            if not line.startswith(delimiter, at):
                break
            at += len(delimiter)
        if len(taken) > 1 and self._look_like_rows(taken):
            raise _BrokenRecord("its quotes hold what looks like rows; is this file quoted? (input.csv.quote=none)")
        return fields

    def _inside(self, taken: list[str], at: int) -> tuple[str, int]:
        """The text of the quoted field that begins at `at` in the last line taken, and where what follows begins."""
        quote, escape, pieces, line = self.dialect.quote, self.dialect.escape, [], taken[-1]
        self.quoted += 1
        while True:
            stop = self._stop.search(line, at)
            if stop is None:
                pieces.append(line[at:])
                line, at = self._more(taken), 0
                continue
            end = stop.start()
            pieces.append(line[at:end])
            if line[end] == escape:
                escaped = line[end + 1 : end + 2]
                pieces.append(escaped if escaped in (quote, escape) else escape + escaped)
                at = end + 2
            elif line.startswith(quote, end + 1):
                pieces.append(quote)
                at = end + 2
            elif after := self._after.match(line, end + 1):
                return "".join(pieces), after.end()
            else:
                hint = "" if escape else '; is a quote written as \\" here? (input.csv.escape=backslash)'
                raise _BrokenRecord(f"text follows where a quote is closed{hint}")

    def _look_like_rows(self, lines: list[str]) -> bool:
        """Whether each of these lines has as many fields as the header, and no quote before the first. Commas and
        semicolons are in prose too: there each line has to begin with a number as well."""
        delimiter = self.dialect.delimiter
        if self.width < 2 or any(line.count(delimiter) != self.width - 1 for line in lines):
            return False
        if lines[0].startswith(self.dialect.quote):
            return False
        return delimiter not in PROSE or all(line.partition(delimiter)[0].strip().isdigit() for line in lines)

    def _escaped_fields(self, taken: list[str]) -> Fields:
        """The fields of a record without quotes, whose line ends and delimiters may be escaped."""
        escape, text = self.dialect.escape, taken[0]
        while text.endswith(("\n", "\r")) and self._is_escaped(_without_end(text)):
            try:
                self._more(taken)
            except _BrokenRecord:  # the file ends here
                break
            text = "".join(taken)
        text = text if self._is_escaped(_without_end(text)) else _without_end(text)
        fields: Fields = []
        at = 0
        while True:
            field = self._plain.match(text, at)
            assert field, "it matches what is empty too"
            value = field[0]
            fields.append(None if value == self._null else self._escaped.sub(lambda m: _meant(escape, m[1]), value))
            if (at := field.end() + 1) > len(text):
                return fields

    def _is_escaped(self, text: str) -> bool:
        """Whether what follows `text` is escaped by an escape at its end."""
        return (len(text) - len(text.rstrip(self.dialect.escape))) % 2 == 1


def _meant(escape: str, char: str) -> str:
    """What a database means by the escape before this character."""
    if char in CONTROLS:
        return CONTROLS[char]
    return escape + char if char.isalnum() else char


def _without_end(line: str) -> str:
    return line.rstrip("\r\n") if line.endswith(("\n", "\r")) else line


def _readable(text: str) -> str:
    return _without_end(text).replace(BAD, "\N{REPLACEMENT CHARACTER}")
