"""input.date: what {date} in a path stands for, and the runs that a range of dates means."""

from __future__ import annotations

import copy
import re
from datetime import date, timedelta

from batchq.config.fields import leaves
from batchq.config.schema import Config
from batchq.errors import ConfigError

MARK = "{date}"
PATHS = ("input.path", "output.path", "output.reuse", "quantization.calibration", "gate.input")  # it stands in these
MOST = 3660  # dates of a range: ten years
_FORM = "say it as 2026-11-21, a range as 2026-11-01..2026-11-30"


def each_date(config: Config) -> list[Config]:
    """One configuration per date, in order, each with its date and without {date}; the same one where none is given.

    Raises ConfigError for a date that can't be, and for {date} that is missing.
    """
    said = config.input.date
    if said is None:
        check_filled(config)
        return [config]
    days = _days(said)
    marked = set(_marked(config))
    if not marked:
        raise ConfigError(f"input.date={said}: no path has {MARK}; write it into input.path and output.path")
    if ".." in said:
        for name in ("input.path", "output.path"):
            if name not in marked:
                raise ConfigError(f"input.date={said}: {name} has no {MARK}, and each date needs one of its own")
    return [_filled(config, day) for day in days]


def check_filled(config: Config) -> None:
    """Raises ConfigError for a path that still has {date}."""
    for name, value in _marked(config).items():
        raise ConfigError(f"{name}={value}: {MARK} stands for input.date, which is missing: input.date=2026-11-21")


def _marked(config: Config) -> dict[str, str]:
    """The paths that have {date}, by name."""
    return {name: value for name, _, value in leaves(config) if name in PATHS and MARK in (value or "")}


def _filled(config: Config, day: date) -> Config:
    filled = copy.deepcopy(config)
    filled.input.date = day.isoformat()
    for name, value in _marked(config).items():
        group, _, field = name.partition(".")
        setattr(getattr(filled, group), field, value.replace(MARK, day.isoformat()))
    return filled


def _days(said: str) -> list[date]:
    first, dots, last = said.partition("..")
    start = _day(said, first)
    end = _day(said, last) if dots else start
    if end < start:
        raise ConfigError(f"input.date={said}: runs backwards; say {end}..{start}")
    count = (end - start).days + 1
    if count > MOST:
        raise ConfigError(f"input.date={said}: {count:,} dates; {MOST:,} at most")
    return [start + timedelta(days=n) for n in range(count)]


def _day(said: str, text: str) -> date:
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", text, re.ASCII):
        raise ConfigError(f"input.date={said}: {text or 'nothing'} is no date; {_FORM}")
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"input.date={said}: there is no {text} in the calendar; {_FORM}") from None
