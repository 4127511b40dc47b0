"""The moment that `run.deadline` means. Pure, but for the machine's time zones."""

from __future__ import annotations

import re
import zoneinfo
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from batchq.config.run import RunConfig
from batchq.config.suggest import did_you_mean
from batchq.errors import ConfigError

FORMS = "HH:MM ZONE as 06:00 Europe/Berlin, a moment with its offset as 2026-12-01T06:00+01:00, or a duration as 8h"
_CLOCK = re.compile(r"(\d{1,2}):(\d\d)(?:\s+(\S+))?")
_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
_MOMENT = re.compile(r"\d{4}-\d\d-\d\d[T ].*")


def check_run(run: RunConfig) -> None:
    """Raises ConfigError for a deadline that is none."""
    if run.deadline is not None:
        deadline_after(run.deadline, datetime.now(UTC))


def is_clock(deadline: str) -> bool:
    """Whether it comes again every day."""
    return _CLOCK.fullmatch(deadline.strip()) is not None


def deadline_after(deadline: str, start: datetime) -> datetime:
    """The moment, in UTC, that `run.deadline` means for an invocation that started at `start`; a moment that is given
    as one may have passed.

    A time that a clock shows twice, as it is put back, is the first that comes; one that it skips is when it skips it.
    Raises ConfigError for what is none.
    """
    given = deadline.strip()
    if match := _CLOCK.fullmatch(given):
        if int(match[1]) > 23 or int(match[2]) > 59:
            raise ConfigError(f"run.deadline={given}: a clock shows 00:00 to 23:59")
        return _next(int(match[1]), int(match[2]), _zone(given, match[3]), start)
    if given and (match := _DURATION.fullmatch(given)):
        days, hours, minutes, seconds = (int(n or 0) for n in match.groups())
        try:
            after = timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
            if after:
                return start.astimezone(UTC) + after
        except OverflowError:
            pass
        raise ConfigError(f"run.deadline={given}: must be above 0 and below a century")
    if _MOMENT.fullmatch(given):
        try:
            moment = datetime.fromisoformat(given)
        except ValueError as error:
            raise ConfigError(f"run.deadline={given}: {error}; say {FORMS}") from None
        if moment.tzinfo is None:
            raise ConfigError(f"run.deadline={given}: its offset is missing, as in {given}+01:00, or {given}Z for UTC")
        return moment.astimezone(UTC)
    raise ConfigError(f"run.deadline={given}: say {FORMS}")


def _zone(given: str, name: str | None) -> ZoneInfo:
    if name is None:
        raise ConfigError(f"run.deadline={given}: whose clock? Say {given} UTC, or a zone as {given} Europe/Berlin")
    try:
        return ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        known = zoneinfo.available_timezones()
        if not known:
            raise ConfigError(
                f"run.deadline={given}: no time zones are known here (install tzdata); say a moment with its offset"
            ) from None
        hint = did_you_mean(name, known) or "; zones are called as Europe/Berlin, America/New_York or UTC"
        raise ConfigError(f"run.deadline={given}: no time zone {name}{hint}") from None


def _next(hour: int, minute: int, zone: ZoneInfo, start: datetime) -> datetime:
    today = start.astimezone(zone).date()
    moments = []
    for day in (today, today + timedelta(days=1), today + timedelta(days=2)):
        shown = datetime(day.year, day.month, day.day, hour, minute)
        for fold in (0, 1):
            moment = shown.replace(tzinfo=zone, fold=fold).astimezone(UTC)
            if moment.astimezone(zone).replace(tzinfo=None, fold=0) != shown:
                moment = _skip(moment, zone)
            moments.append(moment)
    return min(moment for moment in moments if moment > start)


def _skip(near: datetime, zone: ZoneInfo) -> datetime:
    """When that zone's clock jumps, within a day of a moment, to the second."""
    before, after = near - timedelta(days=1), near + timedelta(days=1)
    offset = before.astimezone(zone).utcoffset()
    while after - before > timedelta(seconds=1):
        middle = before + (after - before) / 2
        if middle.astimezone(zone).utcoffset() == offset:
            before = middle
        else:
            after = middle
    return after.replace(microsecond=0)
