"""Everything batchq raises on purpose, and the exit code each ends in.

    no error                    exit 0   complete
                                exit 4   complete, with too many failures or unreadable files (report/outcome.py)

    BatchqError                 exit 1   the run failed; one line says why and what to do
    ├── UserError               exit 2   bad configuration or input; nothing was started
    │   ├── ConfigError                  a field, its value, and what it may be
    │   ├── InputError                   a file or folder that can't be read as asked
    │   ├── ModelError                   a model that can't be found, pinned or loaded
    │   └── OutputTaken                  the output belongs to another run (drift)
    ├── StorageError            exit 1   a store that failed after its retries
    │   ├── AlreadyExists                a create-only put lost, or won with a lost reply
    │   ├── NotFound                     no such object
    │   ├── AccessDenied                 an object, or all, that these credentials or this user may not read
    │   ├── Changed                      the object is no longer the one that was planned
    │   ├── Expired                      credentials that ran out; with new ones the same command resumes
    │   └── NoConditionalWrites exit 2   the store would let the last writer win
    ├── EngineError             exit 1   the engine could not start, died, or stalled
    │   └── EngineOutOfMemory            the engine died for want of memory
    ├── QuantizeError           exit 1   llm-compressor failed; its log is named
    ├── GateRefused             exit 5   no scheme that fits was accepted
    └── Stopped                 exit 3   stopped early on purpose; the same command resumes
        ├── LimitReached        exit 6   a budget is spent or a deadline has come; with another one it resumes
        └── OtherDriver         exit 7   another driver is at work on the output; wait for it

`RowError` is apart: it concerns one row, becomes a failure in the output, and never ends a run.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What a command ends in; `cli.EXIT_CODES` has words for each."""

    COMPLETE = 0
    FAILED = 1
    USER_ERROR = 2
    STOPPED = 3
    TOO_MANY_FAILURES = 4
    GATE_REFUSED = 5
    LIMIT_REACHED = 6
    OTHER_DRIVER = 7


class BatchqError(Exception):
    """A failure with a message fit for a person: one line, what is wrong, what to do."""

    exit_code: int = ExitCode.FAILED
    run = ""  # id of the invocation that it ended, for the log
    report = ""  # what that run came to, in words, where it had begun


class UserError(BatchqError):
    """The configuration or the input has to change before a run can succeed."""

    exit_code = ExitCode.USER_ERROR


class ConfigError(UserError):
    """A configuration field is missing, unknown, or impossible; the message names it."""


class InputError(UserError):
    """An input can't be read as asked; the message names the file and never quotes its rows."""


class ModelError(UserError):
    """A model can't be found, isn't pinned, or isn't one that batchq can serve."""


class OutputTaken(UserError):
    """The output folder holds another run's plan; the message names what differs."""


class StorageError(BatchqError):
    """A store failed for good; transient faults were retried before this is raised."""


class AlreadyExists(StorageError):
    """A create-only put of a name that is taken. Read the object back: its writer may have been us."""


class NotFound(StorageError):
    """No object at that URI."""


class AccessDenied(StorageError):
    """The store or the file system doesn't let us."""


class Changed(StorageError):
    """The object's etag is not the planned one: somebody replaced it."""


class Expired(StorageError):
    """The store's credentials ran out, and nobody renews them; what is committed stays."""


class NoConditionalWrites(StorageError):
    """The store accepted two creates of one name, so two runs could overwrite each other."""

    exit_code = ExitCode.USER_ERROR


class EngineError(BatchqError):
    """The engine could not start, died or stalled; the message names its log file."""


class EngineOutOfMemory(EngineError):
    """The engine died for want of memory, its device's or the machine's; with fewer rows at a time it may live."""


class QuantizeError(BatchqError):
    """The quantizing process failed; the message names its log file."""


class GateRefused(BatchqError):
    """No scheme was accepted, and nothing was labelled: each that fits and was allowed cost more quality than
    gate.recovery allows; or, under gate.strict, too few rows told, or the unquantized model doesn't fit here."""

    exit_code = ExitCode.GATE_REFUSED


class Stopped(BatchqError):
    """Stopped early on purpose (SIGINT, SIGTERM); the same command goes on from here."""

    exit_code = ExitCode.STOPPED


class LimitReached(Stopped):
    """What the configuration allows is used up: the budget, or the time until the deadline. Given again as it is, the
    command would end at once, but for a deadline by the clock or of some hours, which then is another one."""

    exit_code = ExitCode.LIMIT_REACHED


class OtherDriver(Stopped):
    """Another driver is at work on this output, and this one leaves it alone."""

    exit_code = ExitCode.OTHER_DRIVER


def words_of(error: BaseException) -> str:
    """The line that a person reads of an error which ends a command. Of a defect only the kind: its message may quote
    a row."""
    if isinstance(error, OSError):  # the machine's: a folder or a disk that takes nothing, too few files
        said = ": ".join(str(each) for each in (error.filename, error.strerror or error) if each is not None)
    elif isinstance(error, BatchqError):
        said = str(error)
    elif isinstance(error, KeyboardInterrupt):
        said = "interrupted"
    else:
        said = f"{type(error).__name__}: a defect of batchq's; standard error has where"
    return " ".join(said.split())


def exit_code_of(error: BaseException) -> int:
    """What a command ends in that this error ends."""
    if isinstance(error, BatchqError):
        return error.exit_code
    return ExitCode.STOPPED if isinstance(error, KeyboardInterrupt) else ExitCode.FAILED


class RowError(Exception):
    """One row can't be answered. `code` is a stable word, `message` says why without the text."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
