"""`batchq report FOLDER [FILE]`: what all outputs below a folder or prefix have come to, as a table and as a file."""

from __future__ import annotations

import re

from batchq.config.compose import compose_pricing
from batchq.errors import ConfigError

REPRICE = "--reprice"
ENDINGS = (".csv", ".html", ".json")
# A folder or a prefix, not key=value; ./a=b is a folder.
_POSITIONAL = re.compile(r"(?![-~+])(?!\w+([./@]\w+)*=).")


def names_folder(argument: str) -> bool:
    """Whether an argument is a folder's or a file's name, and no flag or override."""
    return _POSITIONAL.match(argument) is not None


def of_folder(arguments: list[str]) -> tuple[int, str]:
    """(exit code, the table), after the file is written if one is named; exit code 1 if an output can't be read.

    Raises ConfigError for anything beside a folder, a file and overrides of pricing.
    """
    from batchq import storage
    from batchq.account import ledger
    from batchq.report import files, survey

    anew = REPRICE in arguments
    arguments = [a for a in arguments if a != REPRICE]
    named = [a for a in arguments if names_folder(a)]
    if anew and len(named) > 1:
        raise ConfigError(f"{named[1]}: {REPRICE} only shows and writes no file; leave one of them out")
    if len(named) > 2 or (len(named) == 2 and not named[1].endswith(ENDINGS)):
        raise ConfigError(f"{named[-1]}: say report FOLDER, or report FOLDER FILE; a file ends in {', '.join(ENDINGS)}")
    pricing = compose_pricing([a for a in arguments if a not in named])
    outputs = ledger.survey(named[0], pricing)
    where = storage.normalize(named[0])
    for file in named[1:]:
        storage.put(file, files.survey_files(outputs, where)[file.rpartition(".")[2]].encode())
    text = survey.table(outputs, where)
    if anew:
        repriced = survey.table(ledger.survey(named[0], pricing, anew=True), where)
        text = f"booked\n{text}\n\nrepriced; nothing was written\n{repriced}"
    return 1 if any("error" in s for s in outputs) else 0, text
