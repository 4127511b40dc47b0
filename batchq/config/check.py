"""What no type can say: values that are missing or out of range, impossible combinations, trust."""

from __future__ import annotations

import os
import re

from batchq.config.csv import check_csv
from batchq.config.dates import check_filled
from batchq.config.deadline import check_run
from batchq.config.enums import TaskKind
from batchq.config.events import check_events
from batchq.config.fields import MISSING, Range, leaves
from batchq.config.metrics import check_metrics
from batchq.config.schema import Config, PricingConfig, TaskConfig
from batchq.errors import ConfigError

TRUST = "BATCHQ_TRUST_REMOTE_CODE"  # the second yes to a model's own code; a copied file can't give it
MAX_LABELS = 128  # vLLM's MAX_LOGPROB_TOKEN_IDS, in 0.26 as in 0.32
MAX_NAME = 100  # letters of task.name: with _distribution, what Redshift and Hive take of a column's name (127, 128)
RESERVED = "batchq_"  # what batchq's own output columns begin with


def check(config: Config) -> Config:
    """Refuse missing values and impossible combinations; returns the same object.

    Raises ConfigError naming the field, its value and what it may be.
    """
    for name, field, value in leaves(config):
        if field.default == MISSING and value in (MISSING, "", None):
            raise missing(name)
    check_filled(config)
    _check_labels(config.task)
    check_csv(config.input.csv)
    check_events(config.events)
    check_run(config.run)
    check_metrics(config.metrics)
    if config.metrics.port is not None and config.cluster.address is not None:
        raise ConfigError(
            "metrics.port: the cluster's nodes have ports of their own; leave it out with cluster.address"
        )
    _check_name(config.task.name)
    if "" in config.task.stop:
        raise ConfigError("task.stop: an empty text would end every answer before it begins; leave it out")
    if os.path.isfile(os.path.expanduser(config.output.path)):
        raise ConfigError(f"output.path={config.output.path}: is a file; name a folder or an object-store prefix")
    if config.output.incremental and config.output.reuse:
        raise ConfigError(
            f"output.reuse={config.output.reuse}: output.incremental=true chooses what is reused; leave one of them out"
        )
    _check_ranges(config)
    _check_trust(config)
    return config


def check_pricing(pricing: PricingConfig) -> PricingConfig:
    """Refuse a price or a budget that can't be, naming it; returns the same object. Raises ConfigError."""
    _check_ranges(pricing, "pricing.")
    return pricing


def missing(name: str) -> ConfigError:
    """The error of a field that has to be given and isn't; `name` with dots."""
    return ConfigError(f"{name} is missing: give it in the job's file or as {name}=VALUE")


def _check_ranges(node: Config | PricingConfig, prefix: str = "") -> None:
    for name, field, value in leaves(node, prefix):
        allowed: Range | None = field.metadata.get("range")
        numbers = {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
        for full, number in numbers.items():
            if allowed and number is not None and not allowed.holds(number):
                raise ConfigError(f"{full}={str(number).removesuffix('.0')}: {allowed.words}")


def _check_name(name: str) -> None:
    """What the answer's columns are called must be told from ours by every reader; some take A for a."""
    if not name.isidentifier():
        raise ConfigError(f"task.name={name!r}: letters, digits and _ only, it prefixes column names")
    if name.casefold().startswith(RESERVED):
        raise ConfigError(f"task.name={name}: names that begin with {RESERVED} are batchq's own; choose another")
    if len(name) > MAX_NAME:
        raise ConfigError(f"task.name: {len(name)} letters; {MAX_NAME} at most, it prefixes column names")


def _check_labels(task: TaskConfig) -> None:
    if task.kind is not TaskKind.classify:
        if task.labels:
            raise ConfigError(f"task.labels goes with task.kind=classify, not {task.kind.value}")
        return
    if len(task.labels) < 2:
        raise ConfigError(f"task.labels={task.labels}: classify needs at least two labels")
    if len(task.labels) > MAX_LABELS:
        raise ConfigError(f"task.labels: {len(task.labels)} labels; vLLM scores at most {MAX_LABELS}")
    if len(set(task.labels)) < len(task.labels):
        raise ConfigError(f"task.labels={task.labels}: each label once")
    if read := sorted({"True", "False", "None"} & set(task.labels)):
        raise ConfigError(
            f"task.labels={task.labels}: YAML reads a bare yes, no, on, off, true or false as {read[0]}; "
            "put it in quotes"
        )
    if any(not label.strip() for label in task.labels):
        raise ConfigError(f"task.labels={task.labels}: a label can't be empty")


def _check_trust(config: Config) -> None:
    """A model's own code runs only if it can't change between runs, and whoever starts the run has named it."""
    model = config.model
    if "trust_remote_code" in config.engine.options:
        raise ConfigError("engine.options.trust_remote_code: say model.trust_remote_code, which takes a second yes")
    if not model.trust_remote_code:
        return
    hub = model.path.startswith("hf://")
    if not hub and "://" in model.path:
        raise ConfigError(
            f"model.trust_remote_code=true: only for a local folder or a pinned hub model, not model.path={model.path}"
        )
    if hub and not re.fullmatch(r"[0-9a-f]{40}", model.revision or ""):
        raise ConfigError("model.trust_remote_code=true: needs model.revision, the commit's 40 hexadecimal digits")
    if config.gate.baseline is not None:
        raise ConfigError("gate.baseline: not with model.trust_remote_code=true, which would trust both models' code")
    named = f"{model.path}@{model.revision}" if hub else model.path
    if os.environ.get(TRUST) != named:
        raise ConfigError(
            f"model.trust_remote_code=true: runs the model's own code as you, so it takes a second yes; once you have "
            f"read it, set {TRUST}={named} in the environment"
        )
