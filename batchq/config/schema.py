"""The typed configuration: one dataclass for each Hydra group.

A class's docstring has one paragraph for each field, `name: what it is`; the reference of all fields is made of these.
A number's range is in its field's metadata. Not frozen, because Hydra's overrides assign to them; treat them as
read-only after `check`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from batchq.config.csv import CsvConfig
from batchq.config.enums import EngineKind, InputFormat, KvCache, Scheme, TableFormat, TaskKind, Unreadable
from batchq.config.events import EventsConfig
from batchq.config.fields import MISSING, NOT_NEGATIVE, OBJECT, OPEN_SHARE, POSITIVE, PRICE, SHARE
from batchq.config.log import LogConfig
from batchq.config.metrics import MetricsConfig
from batchq.config.run import RunConfig


@dataclass
class JobConfig:
    """conf/job: a name, and the words that a person reads in reports.

    name: of the job, in reports and in the names of its logs.
    description: a line about it.
    """

    name: str = MISSING
    description: str = ""


@dataclass
class TaskConfig:
    """What is asked of a row.

    kind: classify chooses one of `labels`; generate writes text.
    prompt: Jinja, sandboxed; the row's columns by name, `row` for all of them, `choices` for the
        answer space in words.
    constant_prompt: the prompt reads no column on purpose, so that every row is asked the same.
    system: an optional system message; plain text, never rendered with row columns.
    answer_prefix: how the model's answer begins; written for it, so that what follows is the label or the text.
    labels: the closed answer space (kind=classify).
    codes: answer by letter (A, B, ...) instead of by the label's own words; null decides by
        whether the labels' first tokens collide.
    name: prefix of the output columns: label, label_probability, label_distribution, label_mass.
    gold: a column with the right answer, for accuracy; rows without a value are not counted.
    max_tokens: at most so many are generated for a row (kind=generate).
    temperature: of sampling; 0 takes the likeliest token each time (kind=generate).
    stop: texts at which generation ends (kind=generate).
    seed: of sampling (kind=generate).
    """

    kind: TaskKind = TaskKind.classify
    prompt: str = MISSING
    constant_prompt: bool = False
    system: str = ""
    answer_prefix: str = ""
    labels: list[str] = field(default_factory=list)
    codes: bool | None = None
    name: str = "label"
    gold: str | None = None
    max_tokens: int = field(default=128, metadata=POSITIVE)
    temperature: float = field(default=0.0, metadata=NOT_NEGATIVE)
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


@dataclass
class QuantizationConfig:
    """conf/quantization: scheme and calibration.

    scheme: auto, none, or one of batchq/model/scheme.py.
    samples: calibration prompts, from the job's own rows, never from those that the gate judges by; or from
        `calibration`.
    max_tokens: each calibration prompt is cut to this.
    calibration: rows to calibrate on, an input of the corpus's columns; null for a part of the corpus itself.
    seed: of the choice of calibration rows.
    group_size: columns that share a scale in 4-bit schemes; null for the largest that divides the model's matrices.
    smoothing: SmoothQuant's migration strength, 0 to 1.
    dampening: GPTQ's, a share of the Hessian's mean diagonal.
    ignore: layers left as they are: names, or re: and a pattern.
    kv_cache: fp8 halves the KV cache on GPUs that compute in FP8 (scales of 1, not calibrated).
    cache: folder or object-store prefix where quantized checkpoints are cached, by content.
    python: another interpreter that has llm-compressor; null for this one.
    """

    scheme: Scheme = Scheme.auto
    samples: int = field(default=128, metadata=POSITIVE)
    max_tokens: int = field(default=512, metadata=POSITIVE)
    calibration: str | None = None
    seed: int = 0
    group_size: int | None = field(default=None, metadata=POSITIVE)
    smoothing: float = field(default=0.8, metadata=SHARE)
    dampening: float = field(default=0.01, metadata=NOT_NEGATIVE)
    ignore: list[str] = field(default_factory=lambda: list(IGNORE))
    kv_cache: KvCache = KvCache.auto
    cache: str = "~/.cache/batchq/checkpoints"
    python: str | None = None


@dataclass
class GateConfig:
    """conf/gate: quantized against baseline on the job's own rows, before they are labelled.

    enabled: false labels without asking.
    recovery: the share of the baseline's accuracy that the quantized model has to reach; without gold labels, the
        agreement with the baseline's labels, or for generated text the ratio of perplexities.
    confidence: of the interval that the verdict is read from.
    rows: at most so many are asked, spread over the corpus; never rows that were calibrated on.
    input: rows to judge by, an input of the corpus's columns; null for a part of the corpus itself.
    min_gold: with fewer gold rows, agreement with the baseline is judged instead of accuracy.
    strict: "can't tell with so few rows" stops the scheme too.
    fallback: what is tried after the scheme, in this order; null for the ladder in batchq/model/scheme.py.
    baseline: where the unquantized model comes from, for a model that is quantized already.
    seed: of the choice of rows.
    """

    enabled: bool = True
    recovery: float = field(default=0.99, metadata=POSITIVE)
    confidence: float = field(default=0.95, metadata=OPEN_SHARE)
    rows: int = field(default=2000, metadata=POSITIVE)
    input: str | None = None
    min_gold: int = 50
    strict: bool = False
    fallback: list[Scheme] | None = None
    baseline: str | None = None
    seed: int = 0


@dataclass
class EngineConfig:
    """conf/engine: vLLM's limits; null means that batchq chooses from the hardware, and `plan` says why.

    kind: vllm, or the fake engine of tests.
    max_model_len: tokens of prompt and answer together; longer rows become failures.
    max_num_batched_tokens: tokens per step.
    max_num_seqs: sequences per step.
    in_flight: rows handed to the engine and not yet answered; null for twice max_num_seqs.
    start_timeout_s: an engine not ready by then has failed.
    stall_timeout_s: an engine that answers nothing for so long, with rows in flight, is taken down and replaced.
    options: any other of vLLM's engine arguments, under its own name.
    """

    kind: EngineKind = EngineKind.vllm
    max_model_len: int = field(default=2048, metadata=POSITIVE)
    max_num_batched_tokens: int | None = field(default=None, metadata=POSITIVE)
    max_num_seqs: int | None = field(default=None, metadata=POSITIVE)
    in_flight: int | None = field(default=None, metadata=POSITIVE)
    start_timeout_s: float = field(default=900.0, metadata=POSITIVE)
    stall_timeout_s: float = field(default=600.0, metadata=POSITIVE)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class ClusterConfig:
    """conf/cluster: where replicas run.

    address: null starts Ray on this machine; "auto" or host:port joins a running cluster.
    replicas: engines side by side; null for as many as there are GPUs for; on CPUs one per node, or as many as
        cpus_per_replica leaves cores for. On a cluster a run begins with the first that have a place, and nodes that
        join later are used up to this many.
    wait_s: so long a run waits for a node with a place for one replica, at its beginning and once it has lost all. The
        cluster's autoscaler is asked for nodes.
    tensor_parallel_size: accelerators that each engine's matrices are cut over.
    pipeline_parallel_size: stages that each engine's layers are cut into, of tensor_parallel_size accelerators each.
    cpus_per_replica: cores bound to each engine; null for an equal share of the machine's.
    max_attempts: engines that a shard may lose in a row without a new answer before the run gives up. In all it may
        lose this many times the engines that the search for one row that kills engines takes.
    spill_seconds: how often answered rows of an unfinished shard are saved.
    grace_seconds: within this time after SIGTERM or SIGINT everything is finished or saved, and the run has ended.
    """

    address: str | None = None
    replicas: int | None = field(default=None, metadata=POSITIVE)
    wait_s: float = field(default=600.0, metadata=NOT_NEGATIVE)
    tensor_parallel_size: int = field(default=1, metadata=POSITIVE)
    pipeline_parallel_size: int = field(default=1, metadata=POSITIVE)
    cpus_per_replica: int | None = field(default=None, metadata=POSITIVE)
    max_attempts: int = field(default=4, metadata=POSITIVE)
    spill_seconds: float = field(default=60.0, metadata=POSITIVE)
    grace_seconds: float = field(default=25.0, metadata=POSITIVE)


@dataclass
class InputConfig:
    """conf/input: the corpus.

    path: a file, a folder, a glob, or a list of them separated by commas; local or s3://.
    date: what {date} stands for in this path and in output.path, as 2026-11-21; a range as 2026-11-01..2026-11-30 is
        one run per date. A folder of the path called as ds=2026-11-21 is then a column too.
    format: auto goes by the name (.jsonl .csv .parquet .arrow .txt; text formats with .gz .zst .bz2 too);
        delta and iceberg are tables, by their logs.
    version: of a Delta table, or a snapshot's id of an Iceberg table; null for the latest when the run is planned.
    csv: how CSV files are written, if that isn't to be found out.
    columns: what is read; null for all. text lines come as one column, `text`.
    id: a user's own id column; its duplicates are counted and reported.
    limit: rows at most, from the start of the corpus; null for all.
    unreadable: what to do about a file that is damaged or lacks a column: stop (exit code 2), or quarantine it: the
        rows before the damage are in the output, meta/manifest.json names it and says why, and the run ends in exit
        code 4.
    trust_times: whether a local file is taken for the one that was planned if its size and its time are the same, also
        where the file system says that it changed since: after a chmod, a move, or a copy that was put back.
    """

    path: str = MISSING
    date: str | None = None
    format: InputFormat = InputFormat.auto
    version: int | None = field(default=None, metadata=NOT_NEGATIVE)
    csv: CsvConfig = field(default_factory=CsvConfig)
    columns: list[str] | None = None
    id: str | None = None
    limit: int | None = field(default=None, metadata=POSITIVE)
    unreadable: Unreadable = Unreadable.stop
    trust_times: bool = False


@dataclass
class OutputConfig:
    """conf/output: where the answers go.

    path: a folder or object-store prefix; data/ and meta/ are made below it.
    reuse: the output.path of a run that is complete: its answers to rows that are asked the same here (equal
        batchq_key) are copied, its failures and rows that it didn't have are asked. To retry failures, or to label what
        is new: the same command with output.path=NEW output.reuse=OLD.
    incremental: a new output reuses the last complete one of this job beside it, as output.reuse would; without any it
        asks all. A resume reuses the same one.
    columns: input columns that come along; null for all.
    compact: once all is committed, join its objects into few of about so many MiB each; null leaves them as they are.
    table: delta registers what is committed, once all is, as a Delta table at output.path; null doesn't.
    rows_per_shard: about how many rows one committed object holds; of long ones fewer, some 32 MiB of them.
    max_error_rate: above this share of failures the run ends in exit code 4.
    max_truncated_rate: above this share of answers that were cut off (at task.max_tokens or engine.max_model_len), the
        run ends in exit code 4 (kind=generate); 1 where answers are meant to be.
    """

    path: str = MISSING
    reuse: str | None = None
    incremental: bool = False
    columns: list[str] | None = None
    compact: int | None = field(default=None, metadata=OBJECT)
    table: TableFormat | None = None
    rows_per_shard: int = field(default=4096, metadata=POSITIVE)
    max_error_rate: float = field(default=0.05, metadata=SHARE)
    max_truncated_rate: float = field(default=0.05, metadata=SHARE)


@dataclass
class PricingConfig:
    """conf/pricing: what an hour costs; the file is the user's own.

    currency: of all prices.
    as_of: the day on which the prices were read.
    source: where they were read; every report names it.
    per_hour: price by accelerator name as NVML gives it ("NVIDIA H100 80GB HBM3"), matched by the longest key that
        stands in it as whole words; "cpu_core" prices a core where there is no accelerator.
    budget: in `currency`, of a run over all its invocations. Checked once a second. When it is spent the run stops with
        exit code 6; raise it to resume.
    """

    currency: str = "USD"
    as_of: str = ""
    source: str = ""
    per_hour: dict[str, float] = field(default_factory=dict, metadata=PRICE)
    budget: float | None = field(default=None, metadata=POSITIVE)


@dataclass
class TuneConfig:
    """`batchq tune`: engine settings tried on a slice of the job's own rows, the fastest saved in the cache.

    use: whether runs take the tuned settings; those that the configuration names itself always win.
    engines: started at most, one after the other, each with other settings.
    seconds: that each engine is asked for, after its start.
    rows: that each engine is asked at most.
    """

    use: bool = True
    engines: int = field(default=6, metadata=POSITIVE)
    seconds: float = field(default=30.0, metadata=POSITIVE)
    rows: int = field(default=4000, metadata=POSITIVE)


@dataclass
class CleanConfig:
    """`batchq clean`.

    cache_days: also remove models, checkpoints and small results that this machine cached more than so many days ago;
        null for none.
    parts: also remove the parts of an output that was compacted, each after it was compared with what took its place.
        Whoever still reads data/ then loses it.
    """

    cache_days: float | None = field(default=None, metadata=POSITIVE)
    parts: bool = False


@dataclass
class Config:
    """A job: one field for each group."""

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
    log: LogConfig = field(default_factory=LogConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    events: EventsConfig = field(default_factory=EventsConfig)
    run: RunConfig = field(default_factory=RunConfig)
