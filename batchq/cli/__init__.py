"""The command line: verbs, exit codes, signals; one line for each mistake of a user's, never a traceback."""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import FrameType

from batchq import __version__
from batchq.cli import report, streams
from batchq.config import Config, choices, deadline_after, suggest
from batchq.config.compose import SWEEP, compose, compose_dates, compose_each
from batchq.errors import BatchqError, ConfigError, ExitCode
from batchq.machine import log

__all__ = ["EXIT_CODES", "USAGE", "VERBS", "Verb", "compose", "main"]

Said = tuple[int, str]  # an exit code, and what is printed

EXIT_CODES = {
    ExitCode.COMPLETE: "complete",
    ExitCode.FAILED: "failed",
    ExitCode.USER_ERROR: "bad configuration or input",
    ExitCode.STOPPED: "stopped by a signal; the same command resumes",
    ExitCode.TOO_MANY_FAILURES: "complete with too many failures or answers cut off, or with unreadable files",
    ExitCode.GATE_REFUSED: "the gate refused every scheme that fits",
    ExitCode.LIMIT_REACHED: "the budget is spent or the deadline has come; every answer is saved, another one resumes",
    ExitCode.OTHER_DRIVER: "another driver is at work on this output; nothing was done here",
}


@dataclass(frozen=True)
class Verb:
    """`words` tell a person what it does. `act` does it, and imports the packages for it; each of `flags`, which aren't
    Hydra's, is a keyword of it without its dashes, false unless it is given. `prints`: what it prints is
    what it is for, so that it has failed where nothing can be printed; the others' exit codes tell of what they did."""

    words: str
    act: Callable[..., Said]
    prints: bool = False
    flags: tuple[str, ...] = ()


def _run(config: Config) -> Said:
    from batchq.job.run import run

    result = run(config, _stop_on_signals(config.cluster.grace_seconds))
    return result.exit_code, result.text


def _plan(config: Config) -> Said:
    from batchq.cli import plan

    return 0, plan.describe(config)


def _preview(config: Config) -> Said:
    from batchq.cli import preview

    return 0, preview.preview(config)


def _quantize(config: Config) -> Said:
    from batchq.job.scheme import quantize_only

    return 0, quantize_only(config, _stop_on_signals(config.cluster.grace_seconds))


def _tune(config: Config) -> Said:
    from batchq.job.tune import tune_job

    return 0, tune_job(config, _stop_on_signals(config.cluster.grace_seconds))


def _status(config: Config, json: bool = False, watch: bool = False, wait: bool = False) -> Said:
    from batchq.cli import status

    return status.observe(config, json, watch, wait)


def _report(config: Config, reprice: bool = False) -> Said:
    from batchq.report import outcome

    result = outcome.compose_report(config, reprice)
    return result.exit_code, result.text


def _verify(config: Config, full: bool = False) -> Said:
    from batchq.cli import verify

    good, text = verify.verify(config, full)
    return 0 if good else 1, text


def _compact(config: Config) -> Said:
    from batchq.cli import compact

    result = compact.compact(config, _stop_on_signals(config.cluster.grace_seconds))
    return result.exit_code, result.text


def _clean(config: Config) -> Said:
    from batchq.cli import clean

    return 0, clean.clean(config)


def _doctor(config: Config | None) -> Said:
    from batchq.cli import doctor

    good, text = doctor.examine(config)
    return 0 if good else 1, text


VERBS = {
    "run": Verb("do the job, or what is left of it (the default)", _run),
    "plan": Verb(
        "say what would happen; starts no engine; without a job: what published models take on which GPUs", _plan, True
    ),
    "preview": Verb("label the first rows and show prompt and answer side by side", _preview, True),
    "quantize": Verb("only make the quantized checkpoint, or find it in the cache", _quantize),
    "tune": Verb("try engine settings on some of the job's rows and save the fastest for later runs", _tune),
    "status": Verb(
        "how far the run at output.path is and whether it is at work, from the store alone; --watch shows it until it "
        "ends, --wait ends with its exit code, --json is for programs",
        _status,
        True,
        ("--json", "--watch", "--wait"),
    ),
    "report": Verb(
        "the report of what is committed at output.path, or of all outputs below a FOLDER, at the prices that were "
        "booked; --reprice only shows what that would cost at the list that is given now",
        _report,
        True,
        ("--reprice",),
    ),
    "verify": Verb(
        "count again and compare, from inputs and data objects alone: every row once, whole and unchanged, or exit "
        "code 1; above ten million rows a sample is compared, with --full all",
        _verify,
        flags=("--full",),
    ),
    "compact": Verb(
        "join a finished run's objects into few large ones (output.compact MiB each, 512 if null)", _compact
    ),
    "clean": Verb("remove what a finished run no longer needs; clean.cache_days=30 old cached models too", _clean),
    "doctor": Verb("what this machine has and lacks; with job=NAME, that job's model, input and output too", _doctor),
}

USAGE = f"""batchq: label millions of documents with a language model, offline, and lose none

  python -m batchq [VERB] job=NAME [key=value ...] [--cfg job] [-m]
  python -m batchq report FOLDER [FILE.csv | .html | .json] [pricing=NAME]     FOLDER: or s3://bucket/prefix

verbs
{chr(10).join(f"  {name:<9} {verb.words}" for name, verb in VERBS.items())}

exit codes
{chr(10).join(f"  {code:<9} {words}" for code, words in EXIT_CODES.items())}

Configuration is Hydra's: `--cfg job` prints it, `--info defaults` where it comes from, `-m` sweeps.
Your own groups: ./conf (if it holds job/) or $BATCHQ_CONF."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. Prints one line for a user's mistake, never a traceback."""
    streams.prepare()
    try:
        return _dispatch(list(sys.argv[1:] if argv is None else argv))
    except BrokenPipeError:  # `| head`: the reader has seen enough
        return 1
    except (BatchqError, OSError) as error:
        return streams.complain(error)
    except KeyboardInterrupt:
        streams.warn("batchq: interrupted; what is committed stays, the same command goes on")
        return ExitCode.STOPPED
    finally:
        streams.close()


def _dispatch(arguments: list[str]) -> int:
    if not arguments or {"-h", "--help", "help"} & set(arguments):
        return 0 if streams.say(USAGE) else 1
    if "--version" in arguments:
        return 0 if streams.say(f"batchq {__version__}") else 1
    _require_working_directory()
    verb = arguments.pop(0) if arguments[0] in VERBS else "run"
    if said := _without_job(verb, arguments):
        return _end(VERBS[verb], *said)
    asked = _with_flags(verb, arguments)
    _refuse_stray(arguments)
    if not any(a.startswith("-") for a in arguments):
        return _act(asked, compose_dates(arguments))
    with streams.to_stdout():  # where Hydra prints what its flags ask for
        configs = compose_each(arguments)
    return _act(asked, configs)


def _with_flags(verb: str, arguments: list[str]) -> Verb:
    """The verb as its flags ask for it; they are taken out of `arguments`. Raises ConfigError for another verb's."""
    asked = VERBS[verb]
    for flag in [a for a in arguments if a.startswith("--")]:
        if flag in asked.flags:
            arguments.remove(flag)
            asked = dataclasses.replace(asked, act=functools.partial(asked.act, **{flag[2:]: True}))
        elif others := [name for name, other in VERBS.items() if flag in other.flags]:
            raise ConfigError(f"{flag}: goes with {' or '.join(others)}, not with {verb}")
    return asked


def _without_job(verb: str, arguments: list[str]) -> Said | None:
    """What three of the verbs say without a job; None with one."""
    if verb == "doctor" and not any(a.startswith("job=") for a in arguments):
        return _doctor(None)
    if verb == "plan" and not arguments:
        from batchq.sizing import forecast

        return 0, forecast.table()
    if verb == "report" and arguments and report.names_folder(arguments[0]):
        return report.of_folder(arguments)
    return None


def _require_working_directory() -> None:
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ConfigError("the working directory was removed; change to one that is there") from None


def _refuse_stray(arguments: list[str]) -> None:
    """Raises ConfigError for a word that is neither key=value nor a flag, nor what a flag is given."""
    for before, word, after in zip(["", *arguments], arguments, [*arguments[1:], ""], strict=False):
        if "=" in word or word.startswith(("-", "~", "+")) or (before.startswith("-") and before not in SWEEP):
            continue
        if word in VERBS:
            raise ConfigError(f"{word}: the verb comes first: python -m batchq {word} job=NAME ...")
        if hint := suggest.stray(before, word, after):
            raise ConfigError(hint)
        if word in choices("job"):
            raise ConfigError(f"{word}: a job is named as job={word}")
        near = suggest.did_you_mean(word, VERBS)
        raise ConfigError(
            f"{word or repr(word)}: no such verb; verbs are {', '.join(VERBS)}; all else is key=value{near}"
        )


def _act(verb: Verb, configs: Sequence[Config | ConfigError]) -> int:
    """Each job of a sweep or date of a range, one after the other, or a single one; the highest exit code counts, and a
    signal ends it."""
    if "" not in sys.path:
        sys.path.insert(0, "")  # `python -m` has it, an installed script doesn't
    codes, started = [0], datetime.now(UTC)
    _signalled.clear()
    for number, config in enumerate(configs, 1):
        if _signalled.is_set():  # by a signal that came while nothing was at work
            return ExitCode.STOPPED
        if isinstance(config, ConfigError):
            codes.append(streams.complain(config))
            continue
        if len(configs) > 1 and config.run.deadline:  # one for all of them
            config.run.deadline = deadline_after(config.run.deadline, started).isoformat(timespec="seconds")
        with log.configured(log.setting(config.log)) as progress:
            if config.input.date and len(configs) > 1:
                progress.step(f"{config.input.date}, {number} of {len(configs)}")
            try:
                code = _end(verb, *verb.act(config))
            except (BatchqError, OSError) as error:
                if isinstance(error, BatchqError) and error.report:
                    streams.say(error.report)
                code = streams.complain(error)
                if code == ExitCode.STOPPED:
                    return code
        codes.append(code)
    return max(codes)


def _end(verb: Verb, code: int, text: str) -> int:
    """Print what a verb has to say; the exit code."""
    said = streams.say(text)
    return code if said or not verb.prints else max(code, ExitCode.FAILED)


_signalled = threading.Event()  # by the first signal, which also ends a sweep between two of its jobs


def _stop_on_signals(grace: float) -> threading.Event:
    """The first SIGINT or SIGTERM stops intake; the second, or the end of the grace period, leaves at once."""
    stop = threading.Event()

    def leave() -> None:
        streams.warn_at_once(log.formatted("not done within cluster.grace_seconds; what is saved stays"))
        os._exit(ExitCode.STOPPED)

    def handle(number: int, _: FrameType | None) -> None:
        if _signalled.is_set():
            os._exit(128 + number)
        _signalled.set()
        stop.set()
        timer = threading.Timer(grace, leave)
        timer.daemon = True
        timer.start()
        streams.warn_at_once(log.formatted("stopping; rows in flight are finished and saved (again: leave at once)"))

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    return stop
