"""Whether a CSV file's fields are quoted, and how a quote inside one is written, by its first lines."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from itertools import islice

from batchq.input.delimited import PROSE, UNCLOSED, Records
from batchq.records import Dialect

RECORDS = 2000  # that are read for each way which is tried


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one way of reading fares: records that can't be read or have another number of fields than the first, fields
    that were quoted, and unquoted fields of \\\\N."""

    bad: int
    quoted: int
    nulls: int


def quoting_of(
    lines: list[str], dialect: Dialect, said_quote: str | None, said_escape: str | None
) -> tuple[str | None, str | None]:
    """Quote and escape, as said or as fewest records are bad; each None if nothing tells of it."""
    quotes, escapes = [said_quote or ""], [said_escape or ""]
    own = said_quote is None and _has_own_quotes(lines, dialect.delimiter)
    if said_quote is None:
        # Without quotes hardly a text could stand between commas.
        quotes = ['"'] if dialect.delimiter in PROSE else ["", '"'] if own else ['"', ""]
        quotes = ["'"] if _in_single_quotes(lines, dialect.delimiter) else quotes
    if said_escape is None:
        escapes = ["", "\\"]
    ways = [(quote, escape) for quote in quotes for escape in escapes]
    outcomes = {way: _try(lines, dataclasses.replace(dialect, quote=way[0], escape=way[1])) for way in ways}
    # Of those that are as good the first, but \N is a database's null.
    best = min(ways, key=lambda way: (outcomes[way].bad, way[1] == "" and outcomes[way].nulls > 0))
    chosen = outcomes[best]
    other_escape = [outcomes[way] for way in ways if way[0] == best[0] and way[1] != best[1]]
    if said_quote is None and chosen.nulls and not chosen.quoted:
        best = "", best[1]  # a database quotes texts or none
    by_quote = said_quote is not None or chosen.quoted > 0 or best[0] != '"'
    by_escape = said_escape is not None or bool(best[1]) or any(each.bad > chosen.bad for each in other_escape)
    return best[0] if by_quote else None, best[1] if by_escape else None


def _try(lines: list[str], dialect: Dialect) -> Outcome:
    records = Records(iter(lines), dialect)
    bad = nulls = width = 0
    for number, (fields, _, error) in enumerate(islice(records, RECORDS)):
        if not number:
            records.width = width = len(fields)
        if error and UNCLOSED in error[1]:
            bad += 1  # or the sample ends inside this record: what follows its first line is no row of its own
            break
        bad += bool(error) or len(fields) < width or any(fields[width:])
        nulls += "\\N" in fields or None in fields
    return Outcome(bad, records.quoted, nulls)


def _in_single_quotes(lines: list[str], delimiter: str) -> bool:
    """Whether each name of the header stands in single quotes."""
    header = lines[0].rstrip("\r\n").split(delimiter) if lines else []
    return bool(header) and all(re.fullmatch(r" *'[^']*' *", name) for name in header)


def _has_own_quotes(lines: list[str], delimiter: str) -> bool:
    """Whether a column has fields with quotes around them that need none, beside texts without: nothing that quotes
    fields writes that, so these quotes are the texts' own."""
    needless: set[int] = set()
    bare: set[int] = set()
    for line in lines[1:RECORDS]:
        for column, field in enumerate(line.rstrip("\r\n").split(delimiter)):
            if len(field) > 1 and field[0] == field[-1] == '"':
                if not re.search(r'[,"]', field[1:-1]):  # Excel quotes a field with a comma, whatever the delimiter
                    needless.add(column)
            elif re.search(r"[^\W\d]", field):
                bare.add(column)
    return bool(needless & bare)
