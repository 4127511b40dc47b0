"""Hydra entry and verbs; the only place that sees a DictConfig; exit codes."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from batchq import __version__
from batchq.config import Config, PricingConfig, check, check_pricing, conf_dir, user_conf_dir
from batchq.errors import BatchqError, ConfigError, Stopped
from batchq.progress import visible

VERBS = {
    "run": "do the job, or what is left of it (the default)",
    "plan": "say what would happen; starts no engine; without a job: what published models take on which GPUs",
    "preview": "label the first rows and show prompt and answer side by side",
    "quantize": "only make the quantized checkpoint, or find it in the cache",
    "tune": "try engine settings on some of the job's rows and keep the fastest for later runs",
    "status": "how far the run at output.path is, from the store alone",
    "report": "the report of what stands at output.path, at today's prices; or of all outputs below a FOLDER",
    "verify": "count again, from inputs and data objects alone: every row once and whole, or exit code 1",
    "clean": "remove what a finished run no longer needs; clean.cache_days=30 old cached models too",
    "doctor": "what this machine has and lacks; with job=NAME, that job's model, input and output too",
}

USAGE = f"""batchq: label millions of documents with a language model, offline, and lose none

  python -m batchq [VERB] job=NAME [key=value ...] [--cfg job] [-m]
  python -m batchq report FOLDER [FILE.csv | .html | .json] [pricing=NAME]     FOLDER: or s3://bucket/prefix

verbs
{chr(10).join(f"  {verb:<9} {words}" for verb, words in VERBS.items())}

Configuration is Hydra's: `--cfg job` prints it, `--info defaults` where it comes from, `-m` sweeps.
Your own groups: ./conf (if it holds job/) or $BATCHQ_CONF. Exit codes: 0 complete, 1 failed,
2 bad configuration or input, 3 stopped early and resumable, 4 complete with too many failures or unreadable files,
5 the gate refused every scheme that fits."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. Prints one line for a user's mistake, never a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    bare = not arguments
    verb = arguments.pop(0) if arguments and arguments[0] in VERBS else "run"
    try:
        if any(a in ("-h", "--help", "help") for a in arguments) or bare:
            print(USAGE)
            return 0
        if arguments == ["--version"]:
            print(f"batchq {__version__}")
            return 0
        if verb == "report" and arguments and _POSITIONAL.match(arguments[0]):
            return _report_many(arguments)
        if unknown := [a for a in arguments[:1] if "=" not in a and not a.startswith(("-", "~", "+"))]:
            raise ConfigError(f"{unknown[0]}: no such verb; verbs are {', '.join(VERBS)}")
        if verb == "doctor" and not any(a.startswith("job=") for a in arguments):
            return _doctor(None)
        if verb == "plan" and not arguments:
            from batchq import forecast

            print(forecast.table())
            return 0
        if any(a.startswith("-") for a in arguments):
            return _through_hydra(arguments, verb)
        return _do(verb, compose(arguments))
    except BatchqError as error:
        print(f"batchq: {_one_line(error)}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # `| head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except KeyboardInterrupt:
        print("batchq: interrupted; what is committed stays, the same command goes on", file=sys.stderr)
        return 3


def compose(overrides: Sequence[str]) -> Config:
    """The checked configuration that these Hydra overrides make, as `python -m batchq` would.

    Raises ConfigError naming the field, group or choice.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    with _hydra_errors(overrides):
        _register()
        GlobalHydra.instance().clear()
        with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
            composed = hydra_compose("config", overrides=list(overrides))
        return typed(composed)


def typed(composed: Any) -> Config:
    """A composed DictConfig as checked dataclasses; an unknown key or a wrong type raises."""
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(plain, dict)
    plain.pop("hydra", None)
    # Merged from a plain container into a fresh schema: `+engine.typo=1` would slip past otherwise.
    merged = OmegaConf.merge(OmegaConf.structured(Config), plain)
    for key in OmegaConf.missing_keys(merged):
        raise ConfigError(f"{key} is missing: give it in the job's file or as {key}=VALUE")
    return check(OmegaConf.to_object(merged))  # type: ignore[arg-type]


def compose_pricing(overrides: Sequence[str]) -> PricingConfig:
    """The pricing that these overrides choose, without a job. Raises ConfigError naming the field, group or choice."""
    if other := next((o for o in overrides if not re.match(r"[+~]*pricing[=.]", o)), None):
        raise ConfigError(f"{other}: a report over many outputs takes pricing=NAME and pricing.FIELD=VALUE alone")
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    with _hydra_errors(overrides):
        _register()
        GlobalHydra.instance().clear()
        with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
            composed = hydra_compose("config", overrides=["~job", *overrides])
        found = OmegaConf.merge(OmegaConf.structured(PricingConfig), OmegaConf.to_container(composed.pricing))
        return check_pricing(OmegaConf.to_object(found))  # type: ignore[arg-type]


# A folder or a prefix, not key=value; ./a=b is a folder.
_POSITIONAL = re.compile(r"(?![-~+])(?!\w+([./@]\w+)*=)")


def _report_many(arguments: list[str]) -> int:
    """`report FOLDER [FILE]`; exit code 1 if one of the outputs can't be read."""
    from batchq import ledger, storage
    from batchq.report import files, survey

    named = [a for a in arguments if _POSITIONAL.match(a)]
    kinds = (".csv", ".html", ".json")
    if len(named) > 2 or (len(named) == 2 and not named[1].endswith(kinds)):
        raise ConfigError(f"{named[-1]}: say report FOLDER, or report FOLDER FILE; a file ends in {', '.join(kinds)}")
    found = ledger.survey(named[0], compose_pricing([a for a in arguments if a not in named]))
    where = storage.normalize(named[0])
    _say(survey.table(found, where))
    for file in named[1:]:
        storage.put(file, files.survey_files(found, where)[file.rpartition(".")[2]].encode())
    return 1 if any("error" in s for s in found) else 0


def _do(verb: str, config: Config) -> int:
    if "" not in sys.path:
        sys.path.insert(0, "")  # `python -m` has it, an installed script doesn't
    from batchq import verify
    from batchq.describe import describe
    from batchq.job.run import run
    from batchq.job.scheme import quantize_only
    from batchq.job.tune import tune_job
    from batchq.outcome import compose_report, status
    from batchq.preview import preview

    if verb == "plan":
        _say(describe(config))
    elif verb == "preview":
        _say(preview(config))
    elif verb == "quantize":
        _say(quantize_only(config, _stop_on_signals(config.cluster.grace_seconds)))
    elif verb == "tune":
        _say(tune_job(config, _stop_on_signals(config.cluster.grace_seconds)))
    elif verb == "verify":
        good, words = verify.verify(config)
        _say(words)
        return 0 if good else 1
    elif verb == "clean":
        _say(verify.clean(config))
    elif verb == "doctor":
        return _doctor(config)
    else:
        action: dict[str, Callable[[], Any]] = {
            "run": lambda: run(config, _stop_on_signals(config.cluster.grace_seconds)),
            "status": lambda: status(config),
            "report": lambda: compose_report(config),
        }
        result = action[verb]()
        _say(result.text)
        return int(result.exit_code)
    return 0


def _doctor(config: Config | None) -> int:
    from batchq import doctor

    good, lines = doctor.examine(config)
    _say(lines)
    return 0 if good else 1


def _say(text: str) -> None:
    """Print lines in which a terminal finds nothing to obey, whatever rows, names and messages stand in them."""
    print("\n".join(map(visible, text.expandtabs().split("\n"))))


def _stop_on_signals(grace: float) -> threading.Event:
    """The first SIGINT or SIGTERM stops intake; the second, or the end of the grace period, leaves at once."""
    stop = threading.Event()

    def leave() -> None:
        print("batchq: not done within cluster.grace_seconds; what is saved stays", file=sys.stderr, flush=True)
        os._exit(Stopped.exit_code)

    def handle(number: int, _: Any) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()
        timer = threading.Timer(grace, leave)
        timer.daemon = True
        timer.start()
        print("\nbatchq: stopping; rows in flight are finished and kept (again: leave at once)", file=sys.stderr)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    return stop


# -- Hydra ------------------------------------------------------------------------------------


def _through_hydra(arguments: list[str], verb: str) -> int:
    """Hydra's own flags: --cfg, --info, -m, --config-dir, ... The worst exit code of a sweep counts."""
    import hydra

    codes: list[int] = []

    def job(composed: Any) -> None:
        try:
            codes.append(_do(verb, typed(composed)))
        except Stopped:
            raise  # the whole sweep stops
        except BatchqError as error:
            print(f"batchq: {_one_line(error)}", file=sys.stderr)
            codes.append(error.exit_code)

    with _hydra_errors(arguments):
        _register()
        os.environ["HYDRA_FULL_ERROR"] = "1"  # raise to us instead of printing
        arguments = sorted(arguments, key=lambda a: a not in ("-m", "--multirun"))  # Hydra wants -m before overrides
        before, sys.argv = sys.argv, ["batchq", *arguments]
        try:
            hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(job)()
        finally:
            sys.argv = before
    return max(codes, default=0)


def _register() -> None:
    """Give Hydra the typed schema, and put the user's groups before ours: its own --config-dir only appends."""
    from hydra.core.config_search_path import ConfigSearchPath
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    class UserConf(SearchPathPlugin):
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            folder = user_conf_dir()
            if folder is not None and folder != conf_dir().resolve():
                search_path.prepend(provider="batchq-user", path=f"file://{folder}")

    ConfigStore.instance().store(name="schema", node=Config)
    if not any(p.__name__ == "UserConf" for p in Plugins.instance().discover(SearchPathPlugin)):
        Plugins.instance().register(UserConf)


class _hydra_errors:
    """Turn Hydra's and OmegaConf's many-line errors into one line that names the field and the choices."""

    def __init__(self, overrides: Sequence[str]) -> None:
        self.overrides = overrides

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        from hydra.errors import HydraException
        from omegaconf.errors import OmegaConfBaseException
        from yaml import YAMLError

        if isinstance(error, YAMLError):
            raise ConfigError(_yaml_words(error)) from None
        if isinstance(error, HydraException | OmegaConfBaseException):
            raise ConfigError(self._words(error)) from None
        if isinstance(error, ValueError) and "item value in defaults" in str(error):
            raise ConfigError("defaults: YAML reads a bare on, off, yes or no as true or false; quote it, as 'off'")

    def _words(self, error: BaseException) -> str:
        text = str(error)
        if type(error).__name__ == "OverrideParseException":
            key = (getattr(error, "override", "") or "").split("=")[0]
            if key in VERBS:
                return f"{key}: the verb comes first: python -m batchq {key} job=NAME ..."
            return (
                f"{key}: can't be read as Hydra's key=value; quote its value twice, for the shell too: '{key}=\"...\"'"
            )
        if text.startswith("Ambiguous value"):
            key = text.split("'")[1].split("=")[0] if "'" in text else "value"
            return f"{key}: has a comma; a list is {key}=[a,b], plain text is '{key}=\"a,b\"', a sweep needs -m"
        if found := re.match(r"In '([\w/]+)': \w+ raised while composing config:\s*(.*)", text, re.S):
            return f"conf/{found[1]}.yaml: {_in_file(found[2])}"
        if "You must specify" in text or "is not in a defaults list" in text.replace("'job'", ""):
            return f"job is missing: say job=NAME; jobs are {', '.join(choices('job'))}"
        if text.startswith(("Could not find", "In '")) and (group := _group(text)):
            return f"{group[0]}={group[1]}: no such {group[0]}; choices are {', '.join(choices(group[0]))}"
        if (key := getattr(error, "full_key", None)) and type(error).__name__.startswith("ConfigKeyError"):
            return f"{key}: no such field; {_siblings(key)}"
        cause = error.__cause__
        if type(cause).__name__ in ("ConfigAttributeError", "ConfigKeyError"):
            key = text.split("'")[1] if "'" in text else text
            bad = next(
                (o.split("=")[0].lstrip("+~") for o in self.overrides if o.split("=")[0].lstrip("+~").endswith(key)),
                key,
            )
            return f"{bad}: no such field; {_siblings(bad)}"
        where = getattr(error, "full_key", None) or getattr(cause, "full_key", None) or "configuration"
        return f"{where}: {str(cause or error).splitlines()[0]}"


def _in_file(text: str) -> str:
    """What is wrong inside a group's file, from Hydra's words about it."""
    key = re.search(r"full_key: (\S+)", text)
    first = " ".join(text.split("full_key:")[0].split())
    if not key:
        return first
    if "not in" not in first:
        return f"{key[1]}: {first}"
    rest = key[1].partition(".")[2]
    hint = ""
    if rest.split(".")[0] in {f.name for f in dataclasses.fields(Config)}:
        hint = "; a file that sets other groups begins with the line # @package _global_"
    return f"{key[1]}: no such field; {_siblings(key[1])}{hint}"


def _yaml_words(error: Any) -> str:
    """A file that is no YAML: where, and the two usual reasons."""
    mark = getattr(error, "problem_mark", None)
    where = f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}" if mark else "a configuration file"
    problem = getattr(error, "problem", None) or type(error).__name__
    return f"{where}: {problem}; text with a colon or {{{{ }}}} wants quotes or a | block, and tabs can't indent"


def _group(text: str) -> tuple[str, str] | None:
    found = re.search(r"Could not find '([\w/]+)/([^'/]+)'", text)
    return (found[1], found[2]) if found else None


def choices(group: str) -> list[str]:
    """The names in a configuration group, the user's own and ours."""
    folders = [f for f in (user_conf_dir(), conf_dir()) if f is not None]
    return sorted({p.stem for folder in folders for p in (folder / group).glob("*.yaml")})


def _siblings(key: str) -> str:
    """The fields that stand where `key` was looked for."""
    node: Any = Config
    path = key.split(".")[:-1]
    for name in path:
        kinds = {f.name: f for f in dataclasses.fields(node)}
        if name not in kinds or not dataclasses.is_dataclass(kinds[name].default_factory):
            return f"there is no {'.'.join(path)}; groups are {', '.join(f.name for f in dataclasses.fields(Config))}"
        node = kinds[name].default_factory
    names = ", ".join(f.name for f in dataclasses.fields(node))
    return f"fields{' of ' + '.'.join(path) if path else ''} are {names}"


def _one_line(error: BaseException) -> str:
    return visible(" ".join(str(error).split()))


if __name__ == "__main__":
    sys.exit(main())
