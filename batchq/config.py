"""The typed configuration: one dataclass a Hydra group, checked once, before anything starts.

Not frozen, because Hydra's overrides assign to them; treat them as read-only after `check`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from batchq.errors import ConfigError

MISSING = "???"
TRUST = "BATCHQ_TRUST_REMOTE_CODE"  # the second yes to a model's own code; a copied file can't give it
MAX_LABELS = 128  # vLLM's MAX_LOGPROB_TOKEN_IDS, in 0.26 as in 0.32


class Scheme(Enum):
    auto = "auto"
    none = "none"
    fp8 = "fp8"
    fp8_gptq = "fp8_gptq"
    fp8_block = "fp8_block"
    int8 = "int8"
    int8_rtn = "int8_rtn"
    w8a16 = "w8a16"
    w4a16 = "w4a16"
    w4a16_awq = "w4a16_awq"
    w4a8_fp8 = "w4a8_fp8"
    nvfp4 = "nvfp4"
    sparse24 = "sparse24"


class InputFormat(Enum):
    auto = "auto"
    jsonl = "jsonl"
    csv = "csv"
    parquet = "parquet"
    text = "text"
    dataset = "dataset"


class Unreadable(Enum):
    stop = "stop"
    quarantine = "quarantine"


class TaskKind(Enum):
    classify = "classify"
    generate = "generate"


class EngineKind(Enum):
    vllm = "vllm"
    fake = "fake"


@dataclass
class JobConfig:
    """conf/job: a name, and the words that a person reads in reports."""

    name: str = MISSING
    description: str = ""


@dataclass
class TaskConfig:
    """What is asked of a row.

    prompt: Jinja, sandboxed; the row's columns by name, `row` for all of them, `choices` for the
        answer space in words.
    system: an optional system message; plain text, never rendered with row columns.
    answer_prefix: how the model's answer begins; written for it, so that what follows is the label or the text.
    labels: the closed answer space (kind=classify).
    codes: answer by letter (A, B, ...) instead of by the label's own words; null decides by
        whether the labels' first tokens collide.
    name: prefix of the output columns: label, label_probability, label_distribution, label_mass.
    gold: a column with the right answer, for accuracy; rows without a value are not counted.
    max_tokens, temperature, stop, seed: how text is generated (kind=generate).
    """

    kind: TaskKind = TaskKind.classify
    prompt: str = MISSING
    system: str = ""
    answer_prefix: str = ""
    labels: list[str] = field(default_factory=list)
    codes: bool | None = None
    name: str = "label"
    gold: str | None = None
    max_tokens: int = 128
    temperature: float = 0.0
    stop: list[str] = field(default_factory=list)
    seed: int = 0


@dataclass
class ModelConfig:
    """conf/model: where the model comes from.

    path: hf://owner/name (with `revision`), a local folder, s3:// (or az://, gs://) prefix, or
        wheel://distribution/path/in/it.gguf for a model carried by an installed wheel.
    revision: the commit, 40 hexadecimal digits, of a hub model; required for hf://.
    trust_remote_code: run the Python code that comes with the model, in every process that opens it. It takes a second
        yes: BATCHQ_TRUST_REMOTE_CODE in the environment, set to model.path, or model.path@model.revision for hf://.
    chat_template: arguments of the model's own chat template, such as {enable_thinking: false}.
    """

    path: str = MISSING
    revision: str | None = None
    trust_remote_code: bool = False
    chat_template: dict[str, Any] = field(default_factory=dict)


# Left in full precision: the output head, routers of mixtures of experts, and everything that isn't the language model.
IGNORE = [r"re:(.*\.)?lm_head$", r"re:.*\.(gate|router|shared_expert_gate)$", r"re:.*(vision|visual|audio|projector).*"]


class KvCache(Enum):
    auto = "auto"
    fp8 = "fp8"


@dataclass
class QuantizationConfig:
    """conf/quantization: scheme and calibration.

    scheme: auto, none, or one of batchq/model/scheme.py.
    samples: calibration prompts; max_tokens: each cut to this. From the job's own rows, never from those that the gate
        judges by; or from `calibration`, an input of the same columns.
    group_size: columns that share a scale in 4-bit schemes; null for the largest that divides the model's matrices.
    smoothing: SmoothQuant's migration strength, 0 to 1.
    dampening: GPTQ's, a share of the Hessian's mean diagonal.
    ignore: layers left as they are: names, or re: and a pattern.
    kv_cache: fp8 halves the KV cache on GPUs that compute in FP8 (scales of 1, not calibrated).
    cache: folder or object-store prefix that keeps quantized checkpoints by content.
    python: another interpreter that has llm-compressor; null for this one.
    """

    scheme: Scheme = Scheme.auto
    samples: int = 128
    max_tokens: int = 512
    calibration: str | None = None
    seed: int = 0
    group_size: int | None = None
    smoothing: float = 0.8
    dampening: float = 0.01
    ignore: list[str] = field(default_factory=lambda: list(IGNORE))
    kv_cache: KvCache = KvCache.auto
    cache: str = "~/.cache/batchq/checkpoints"
    python: str | None = None


@dataclass
class GateConfig:
    """conf/gate: quantized against baseline on the job's own rows, before they are labelled.

    enabled: false labels without asking.
    recovery: the share of the baseline's accuracy that has to be kept (of its labels or its text, without gold).
    confidence: of the interval that the verdict is read from.
    rows: at most so many are asked, spread over the corpus; never rows that were calibrated on.
    input: rows to judge by, an input of the corpus's columns; null for a part of the corpus itself.
    min_gold: with fewer gold rows, agreement with the baseline is judged instead of accuracy.
    strict: "can't tell with so few rows" stops the scheme too.
    fallback: what is tried after the scheme, in this order; null for the ladder in batchq/model/scheme.py.
    baseline: where the unquantized model comes from, for a model that is quantized already.
    """

    enabled: bool = True
    recovery: float = 0.99
    confidence: float = 0.95
    rows: int = 2000
    input: str | None = None
    min_gold: int = 50
    strict: bool = False
    fallback: list[Scheme] | None = None
    baseline: str | None = None
    seed: int = 0


@dataclass
class EngineConfig:
    """conf/engine: vLLM's limits; null means chosen from the hardware, and said.

    max_model_len: tokens of prompt and answer together; longer rows become failures.
    max_num_batched_tokens, max_num_seqs: tokens and sequences a step.
    in_flight: rows handed to the engine and not yet answered; null for twice max_num_seqs.
    start_timeout_s: an engine not ready by then has failed.
    stall_timeout_s: an engine that answers nothing for so long, with rows in flight, is taken down and replaced.
    options: any other of vLLM's engine arguments, under its own name.
    """

    kind: EngineKind = EngineKind.vllm
    max_model_len: int = 2048
    max_num_batched_tokens: int | None = None
    max_num_seqs: int | None = None
    in_flight: int | None = None
    start_timeout_s: float = 900.0
    stall_timeout_s: float = 600.0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class ClusterConfig:
    """conf/cluster: where replicas run.

    address: null starts Ray on this machine; "auto" or host:port joins a running cluster.
    replicas: engines side by side; null for as many as the machine has room for.
    tensor_parallel_size: accelerators that each engine's matrices are cut over.
    pipeline_parallel_size: stages that each engine's layers are cut into, of tensor_parallel_size accelerators each.
    cpus_per_replica: cores bound to each engine; null for an equal share of the machine's.
    max_attempts: engines that a shard may lose in a row without one more answer before the run gives up; and as many
        times over it may lose what finding a row that kills engines takes.
    spill_seconds: how often answered rows of an unfinished shard are saved.
    grace_seconds: after SIGTERM or SIGINT all is finished or saved, and the run over, within this time.
    """

    address: str | None = None
    replicas: int | None = None
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    cpus_per_replica: int | None = None
    max_attempts: int = 4
    spill_seconds: float = 60.0
    grace_seconds: float = 25.0


@dataclass
class InputConfig:
    """conf/input: the corpus.

    path: a file, a folder, a glob, or a list of them separated by commas; local or s3://.
    format: auto goes by the name (.jsonl .csv .parquet .txt, with .gz .zst .bz2).
    columns: what is read; null for all. text lines come as one column, `text`.
    id: a user's own id column; its duplicates are counted and reported.
    limit: rows at most, from the start of the corpus; null for all.
    unreadable: what to do about a file that is damaged or lacks a column: stop (exit code 2), or quarantine it: the
        rows before the damage are kept, meta/manifest.json names it and says why, and the run ends in exit code 4.
    """

    path: str = MISSING
    format: InputFormat = InputFormat.auto
    columns: list[str] | None = None
    id: str | None = None
    limit: int | None = None
    unreadable: Unreadable = Unreadable.stop


@dataclass
class OutputConfig:
    """conf/output: where the answers go.

    path: a folder or object-store prefix; data/ and meta/ are made below it.
    reuse: the output.path of a run that is complete: its answers to rows that are asked the same here (equal
        batchq_key) are copied, its failures and rows that it didn't have are asked. To retry failures, or to label what
        is new: the same command with output.path=NEW output.reuse=OLD.
    columns: input columns that come along; null for all.
    rows_per_shard: about how many rows one committed object holds.
    max_error_rate: above this share of failures the run ends in exit code 4.
    """

    path: str = MISSING
    reuse: str | None = None
    columns: list[str] | None = None
    rows_per_shard: int = 4096
    max_error_rate: float = 0.05


@dataclass
class PricingConfig:
    """conf/pricing: what an hour costs; the file is the user's own.

    per_hour: price by accelerator name as NVML gives it ("NVIDIA H100 80GB HBM3"), matched by its
    longest contained key; "cpu_core" prices a core where there is no accelerator.
    budget: in `currency`, of a run over all its invocations; once spent the run stops as by a signal, in exit code 3.
    """

    currency: str = "USD"
    as_of: str = ""
    source: str = ""
    per_hour: dict[str, float] = field(default_factory=dict)
    budget: float | None = None


@dataclass
class TuneConfig:
    """`batchq tune`: engine settings tried on a slice of the job's own rows, the fastest kept in the cache.

    use: whether runs take what was found; engine.max_num_seqs and the like, where they are given, win in any case.
    engines: started at most, one after the other, each with other settings.
    seconds: that each is asked for, after its start; rows: that it is asked at most.
    """

    use: bool = True
    engines: int = 6
    seconds: float = 30.0
    rows: int = 4000


@dataclass
class CleanConfig:
    """`batchq clean`.

    cache_days: also remove models, checkpoints and findings that this machine cached more than so many days ago;
        null for none.
    """

    cache_days: float | None = None


@dataclass
class Config:
    job: JobConfig = field(default_factory=JobConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    input: InputConfig = field(default_factory=InputConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    pricing: PricingConfig = field(default_factory=PricingConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    clean: CleanConfig = field(default_factory=CleanConfig)


def conf_dir() -> Path:
    """The shipped Hydra groups: beside the package in a wheel, beside its folder in a checkout."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "conf"


def user_conf_dir() -> Path | None:
    """A user's own groups: $BATCHQ_CONF, or ./conf if it holds job/ (an unrelated conf/ is left alone).

    Raises ConfigError if BATCHQ_CONF names no folder.
    """
    if named := os.environ.get("BATCHQ_CONF"):
        if not Path(named).is_dir():
            raise ConfigError(f"BATCHQ_CONF={named}: no such folder")
        return Path(named).resolve()
    local = Path.cwd() / "conf"
    return local.resolve() if (local / "job").is_dir() else None


def check(config: Config) -> Config:
    """Refuse missing values and impossible combinations; returns the same object.

    Raises ConfigError naming the field, its value and what it may be.
    """
    required = {
        "job.name": config.job.name,
        "task.prompt": config.task.prompt,
        "model.path": config.model.path,
        "input.path": config.input.path,
        "output.path": config.output.path,
    }
    for name, value in required.items():
        if value in (MISSING, "", None):
            raise ConfigError(f"{name} is missing: give it in the job's file or as {name}=VALUE")
    task, engine, cluster = config.task, config.engine, config.cluster
    if task.kind is TaskKind.classify:
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
    elif task.labels:
        raise ConfigError("task.labels goes with task.kind=classify, not generate")
    if not task.name.isidentifier():
        raise ConfigError(f"task.name={task.name}: letters, digits and _ only, it prefixes column names")
    if Path(config.output.path).expanduser().is_file():
        raise ConfigError(f"output.path={config.output.path}: is a file; name a folder or an object-store prefix")
    for name, number in {
        "task.max_tokens": task.max_tokens,
        "engine.max_model_len": engine.max_model_len,
        "engine.max_num_batched_tokens": engine.max_num_batched_tokens,
        "engine.max_num_seqs": engine.max_num_seqs,
        "engine.in_flight": engine.in_flight,
        "cluster.replicas": cluster.replicas,
        "cluster.tensor_parallel_size": cluster.tensor_parallel_size,
        "cluster.pipeline_parallel_size": cluster.pipeline_parallel_size,
        "cluster.cpus_per_replica": cluster.cpus_per_replica,
        "cluster.max_attempts": cluster.max_attempts,
        "cluster.spill_seconds": cluster.spill_seconds,
        "cluster.grace_seconds": cluster.grace_seconds,
        "engine.start_timeout_s": engine.start_timeout_s,
        "engine.stall_timeout_s": engine.stall_timeout_s,
        "quantization.samples": config.quantization.samples,
        "quantization.max_tokens": config.quantization.max_tokens,
        "quantization.group_size": config.quantization.group_size,
        "gate.rows": config.gate.rows,
        "gate.recovery": config.gate.recovery,
        "output.rows_per_shard": config.output.rows_per_shard,
        "input.limit": config.input.limit,
        "tune.engines": config.tune.engines,
        "tune.seconds": config.tune.seconds,
        "tune.rows": config.tune.rows,
        "clean.cache_days": config.clean.cache_days,
    }.items():
        if number is not None and number <= 0:
            raise ConfigError(f"{name}={number}: must be above 0")
    if not 0 <= config.quantization.smoothing <= 1:
        raise ConfigError(f"quantization.smoothing={config.quantization.smoothing}: between 0 and 1")
    if not 0 < config.gate.confidence < 1:
        raise ConfigError(f"gate.confidence={config.gate.confidence}: between 0 and 1")
    if not 0 <= config.output.max_error_rate <= 1:
        raise ConfigError(f"output.max_error_rate={config.output.max_error_rate}: between 0 and 1")
    check_pricing(config.pricing)
    _check_trust(config)
    return config


def check_pricing(pricing: PricingConfig) -> PricingConfig:
    """Raises ConfigError for a price or a budget that can't be."""
    if pricing.budget is not None and not pricing.budget > 0:
        raise ConfigError(f"pricing.budget={pricing.budget:g}: must be above 0")
    for name, price in pricing.per_hour.items():
        if price < 0:
            raise ConfigError(f"pricing.per_hour.{name}={price}: a price can't be negative")
    return pricing


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
