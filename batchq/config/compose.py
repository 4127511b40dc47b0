"""Hydra: overrides -> the checked configuration; its errors of many lines -> one line that names field and choices.

The only importer of Hydra, and the only place that sees a DictConfig.
"""

from __future__ import annotations

import codecs
import dataclasses
import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import TYPE_CHECKING, Any

from batchq.config import interpolation, suggest
from batchq.config.check import check, check_pricing, missing
from batchq.config.dates import each_date
from batchq.config.folders import choices, conf_dir, user_conf_dir
from batchq.config.schema import Config, PricingConfig
from batchq.errors import BatchqError, ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

SWEEP = ("-m", "--multirun")
SHOW = re.compile(r"-[ci]|--(cfg|info)\b.*|--hydra-help")  # flags that print something of Hydra's and run no job
_OVERRIDE = re.compile(r"[~+]|\w[\w./@]*=")
# A value that holds an = or {date}, and nothing else that Hydra's grammar gives a meaning to: /calls/ds={date}.
_PLAIN = re.compile(r"""([+~]*[\w./@]+=)((?:[^\[\]{}()'"\\$]|\{date\})*(?:=|\{date\})(?:[^\[\]{}()'"\\$]|\{date\})*)""")


def compose(overrides: Sequence[str]) -> Config:
    """The checked configuration that these Hydra overrides make, as `python -m batchq` would.

    Raises ConfigError naming the field, group or choice, also for a range of dates.
    """
    config, *others = compose_dates(overrides)
    if others:
        raise ConfigError(f"input.date: {1 + len(others)} dates are as many runs; compose one date at a time")
    return config


def compose_dates(overrides: Sequence[str]) -> list[Config]:
    """The same; of a range of dates one for each, in order. Raises ConfigError naming the field, group or choice."""
    overrides = [_readable(o) for o in overrides]
    with _in_one_line(overrides):
        return typed(_composed(overrides))


def _readable(override: str) -> str:
    """The same for Hydra, to which an = within a value is a mistake, and {date} too: in a path neither is."""
    plain = _PLAIN.fullmatch(override)
    return plain[1] + re.sub("[={}]", r"\\\g<0>", plain[2]) if plain else override


def compose_pricing(overrides: Sequence[str]) -> PricingConfig:
    """The pricing that these overrides choose, without a job. Raises ConfigError naming the field, group or choice."""
    if other := next((o for o in overrides if not re.match(r"[+~]*pricing[=.]", o)), None):
        raise ConfigError(f"{other}: a report over many outputs takes pricing=NAME and pricing.FIELD=VALUE alone")
    from omegaconf import OmegaConf

    with _in_one_line(overrides):
        composed = _composed(["~job", *overrides])
        merged = OmegaConf.merge(OmegaConf.structured(PricingConfig), OmegaConf.to_container(composed.pricing))
        return check_pricing(OmegaConf.to_object(merged))  # type: ignore[arg-type]


def compose_each(arguments: Sequence[str]) -> list[Config | ConfigError]:
    """What a command line with Hydra's own flags (--cfg, --info, -m, --config-dir, ...) asks for: every job of a sweep,
    or what is wrong with it; one job without -m; none where Hydra only shows something.

    Raises ConfigError for a flag or an override that Hydra can't read.
    """
    import hydra

    jobs: list[Config | ConfigError] = []

    def job(composed: DictConfig) -> None:
        try:
            with _in_one_line(arguments):
                jobs.extend(typed(composed))
        except ConfigError as error:
            jobs.append(error)

    arguments = [_readable(a) for a in arguments]
    overrides = [a for a in arguments if _OVERRIDE.match(a)]
    ordered = [*(a for a in arguments if a not in overrides), "--", *overrides]  # Hydra wants its flags first
    _check_flags(ordered)
    with _in_one_line(arguments), _sweep_folder(arguments) as folder, _as_program([*ordered, *folder]):
        _register()
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(job)()
    if not jobs and not any(SHOW.fullmatch(a) for a in arguments):
        raise ConfigError("hydra/launcher: a sweep's jobs run here, one after the other; leave it out")
    return jobs


@contextmanager
def _sweep_folder(arguments: Sequence[str]) -> Iterator[list[str]]:
    """The override that has Hydra write what it writes about a sweep to a folder that is removed afterwards."""
    if not set(SWEEP) & set(arguments) or any(a.startswith("hydra.sweep.dir=") for a in arguments):
        yield []
        return
    with tempfile.TemporaryDirectory(prefix="batchq-sweep-") as folder:
        yield [f'hydra.sweep.dir="{folder}"']


def typed(composed: DictConfig) -> list[Config]:
    """A composed DictConfig as checked dataclasses, one for each date; an unknown key or a wrong type raises."""
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(plain, dict)
    plain.pop("hydra", None)
    # Merged from a plain container into a fresh schema: `+engine.typo=1` would slip past otherwise.
    merged = OmegaConf.merge(OmegaConf.structured(Config), interpolation.as_text(plain))
    for key in OmegaConf.missing_keys(merged):
        raise missing(key)
    return [check(config) for config in each_date(OmegaConf.to_object(merged))]  # type: ignore[arg-type]


def _composed(overrides: Sequence[str]) -> DictConfig:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    _register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return hydra_compose("config", overrides=list(overrides))


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


def _check_flags(arguments: Sequence[str]) -> None:
    """Raises ConfigError for what Hydra would answer with its whole usage."""
    from hydra._internal.utils import get_args_parser

    said = io.StringIO()
    try:
        with redirect_stderr(said):
            get_args_parser().parse_args(list(arguments))
    except SystemExit:
        words = said.getvalue().strip().splitlines()[-1].partition("error: ")[2]
        if unknown := re.match(r"unrecognized arguments: (\S+)", words):
            words = suggest.flag(unknown[1])
        raise ConfigError(words) from None


@contextmanager
def _as_program(arguments: Sequence[str]) -> Iterator[None]:
    """Inside, Hydra's main sees these arguments, and raises to us instead of printing."""
    before, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = ["batchq", *arguments], "1"
    try:
        yield
    finally:
        sys.argv = before
        if full is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full


# -- errors -----------------------------------------------------------------------------------


@contextmanager
def _in_one_line(overrides: Sequence[str]) -> Iterator[None]:
    """Turn what Hydra, OmegaConf and YAML raise inside, often many lines, into a ConfigError of one line."""
    from hydra.errors import HydraException
    from yaml import YAMLError

    try:
        yield
    except BatchqError:
        raise
    except YAMLError as error:
        raise ConfigError(_of_yaml(error)) from error
    except Exception as error:  # Hydra and OmegaConf have their own, and let ValueError and AssertionError through too
        if isinstance(error, OSError) and not isinstance(error, HydraException):
            if error.filename is None:  # standard output's
                raise
            raise ConfigError(f"{error.filename}: {error.strerror}") from error
        raise ConfigError(_words(error, overrides)) from error


def _words(error: Exception, overrides: Sequence[str]) -> str:
    """One line for an error of Hydra's or OmegaConf's."""
    text = str(error)
    if (nameless := next((o for o in overrides if not _key(o)), None)) is not None:
        return f"{nameless or repr(nameless)}: a name is missing; say key=value"
    if type(error).__name__ == "OverrideParseException":
        return suggest.quoted(getattr(error, "override", None) or "")
    if text.startswith("Ambiguous value"):
        key = text.split("'")[1].split("=")[0] if "'" in text else "value"
        return f"{key}: has a comma; a list is {key}=[a,b], plain text is '{key}=\"a,b\"', a sweep needs -m"
    if match := re.match(r"In '([\w/]+)': \w+ raised while composing config:\s*(.*)", text, re.S):
        return f"conf/{match[1]}.yaml: {_in_file(match[2])}{_marked(match[1])}"
    if "You must specify" in text or "is not in a defaults list" in text.replace("'job'", ""):
        return f"job is missing: say job=NAME; jobs are {', '.join(choices('job'))}"
    choice = re.search(r"Could not (?:find|load) '(\w+)/(.*?)'", text)
    if choice and (known := choices(choice[1])):
        return f"{choice[1]}={choice[2]}: no such {choice[1]}; choices are {', '.join(known)}" + suggest.choice(
            choice[1], choice[2], known
        )
    if "group override must be" in text or "item value in defaults" in text:
        return _no_name(overrides)
    return _of_field(error, text, overrides)


def _marked(name: str) -> str:
    """A hint where the user's file begins with a byte order mark: Hydra doesn't see what follows it."""
    folder = user_conf_dir()
    file = folder / f"{name}.yaml" if folder else None
    if file is None or not file.is_file() or not file.read_bytes().startswith(codecs.BOM_UTF8):
        return ""
    return "; it begins with a byte order mark, which hides that line: save it as UTF-8 without one"


def _no_name(overrides: Sequence[str]) -> str:
    """A group's choice that YAML reads as something else than text."""
    groups = [f.name for f in dataclasses.fields(Config)]
    for override in overrides:
        group, _, value = override.lstrip("+").partition("=")
        if group in groups and re.fullmatch(r"(?i)null|true|false|[-+]?[.\d].*", value):
            known = choices(group)
            hint = suggest.choice(group, value, known)
            return f"{group}={value}: no such {group}; choices are {', '.join(known)}{hint}"
    return "defaults: YAML reads a bare on, off, yes or no as true or false; quote it, as 'off'"


def _of_field(error: Exception, text: str, overrides: Sequence[str]) -> str:
    cause = error.__cause__
    key = getattr(error, "full_key", None)
    if key and type(error).__name__.startswith("ConfigKeyError"):
        return _no_field(key, overrides)
    if type(cause).__name__ in ("ConfigAttributeError", "ConfigKeyError"):
        key = text.split("'")[1] if "'" in text else text
        return _no_field(next((k for k in map(_key, overrides) if k.endswith(key)), key), overrides)
    where = (
        key
        or getattr(cause, "full_key", None)
        or next((_key(o) for o in overrides if "=" in o and _key(o) in text), "")
    )
    first = str(cause or error).strip().splitlines() or [type(error).__name__]
    return f"{where or 'configuration'}: {first[0]}{interpolation.hint(error) or _hint(where, first[0], overrides)}"


def _hint(where: str, said: str, overrides: Sequence[str]) -> str:
    """What to write instead of a value of another type."""
    value = next((o.partition("=")[2] for o in overrides if _key(o) == where), "")
    if "is not a ListConfig" in said:
        return f"; a list is {where}=[{value or 'a'}]"
    if said.startswith("Invalid type assigned"):
        return f"; {where} has no choices, its fields are set one by one, as {where}.FIELD=VALUE"
    if expected := re.search(r"Invalid value '(.*?)', expected one of \[(.*)\]", said):
        return suggest.did_you_mean(expected[1], expected[2].split(", "))
    if "could not be converted" in said and value.casefold() in ("none", "all"):
        return f"; for no value say {where}=null"
    return ""


def _key(override: str) -> str:
    return override.split("=")[0].lstrip("+~")


def _no_field(key: str, overrides: Sequence[str]) -> str:
    """A key that isn't there: what is, or how to add it where any key may be."""
    node: Any = Config
    path = key.split(".")
    for i, name in enumerate(path[:-1]):
        kinds = {f.name: f for f in dataclasses.fields(node)}
        if name in kinds and kinds[name].default_factory is dict:
            override = next((o for o in overrides if _key(o) == key), f"{key}=VALUE")
            return f"{key}: {'.'.join(path[: i + 1])} has no such key yet; add it with +{override.lstrip('+')}"
        if name not in kinds or not dataclasses.is_dataclass(kinds[name].default_factory):
            above = ".".join(path[: i + 1])
            return f"{key}: no such field; there is no {above}; groups are {_names(Config)}{suggest.field(key)}"
        node = kinds[name].default_factory
    if any(f.name == path[-1] and f.default_factory is dict for f in dataclasses.fields(node)):
        return f"{key}: on the command line add each key for itself, as +{key}.KEY=VALUE; or set it in the job's file"
    where = f"fields of {'.'.join(path[:-1])}" if path[:-1] else "groups"
    return f"{key}: no such field; {where} are {_names(node)}{suggest.field(key)}"


def _names(kind: Any) -> str:
    return ", ".join(f.name for f in dataclasses.fields(kind))


def _in_file(text: str) -> str:
    """What is wrong inside a group's file, from Hydra's words about it."""
    key = re.search(r"full_key: (\S+)", text)
    first = " ".join(text.split("full_key:")[0].split())
    if not key:
        return first
    if "not in" not in first:
        return f"{key[1]}: {first}"
    inner = key[1].partition(".")[2].split(".")[0]
    is_group = inner in {f.name for f in dataclasses.fields(Config)}
    hint = "; a file that sets other groups begins with the line # @package _global_" if is_group else ""
    return _no_field(key[1], ()) + hint


def _of_yaml(error: Any) -> str:
    """A file that is no YAML: where, and the two usual reasons."""
    mark = getattr(error, "problem_mark", None)
    where = f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}" if mark else "a configuration file"
    problem = getattr(error, "problem", None) or type(error).__name__
    return (
        f"{where}: {problem}; text with a colon, {{{{ }}}} or {{date}} wants quotes or a | block, and tabs can't indent"
    )
