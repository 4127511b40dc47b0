"""An engine's settings and the reason of each: chosen from hardware, model and prompt lengths, or measured by `tune`.

What the configuration names is never changed. What it leaves open comes from what `tune` measured on this kind of
machine, and otherwise from the rules here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from batchq.config import Config, EngineKind, KvCache, Scheme
from batchq.engine.protocol import EngineSpec, Origin
from batchq.machine.hardware import Hardware
from batchq.machine.words import gib
from batchq.model import kv_cache
from batchq.model.folder import read_config
from batchq.model.scheme import SCHEMES, stored_scheme
from batchq.plan import sample
from batchq.plan.sample import Lengths
from batchq.records import Plan
from batchq.sizing import replicas, tuned
from batchq.sizing.lengths import answer_tokens, tokens_read
from batchq.sizing.memory import GPU_SHARE, OVERHEAD, kv_cache_bytes
from batchq.sizing.tuned import Arguments, Tuned
from batchq.task import answers

STEP, ROWS, SHARE, EAGER = "max_num_batched_tokens", "max_num_seqs", "gpu_memory_utilization", "enforce_eager"
COMPILATION, BACKEND = "compilation_config", "linear_backend"
FIELDS = (STEP, ROWS)  # fields of conf/engine; the others are engine.options
STEP_TOKENS = {"cpu": 2048, "cuda": 16384}  # a CPU is busy with one row's prefill; a GPU wants many rows in a step
SEQUENCES = {"cpu": 64, "cuda": 1024}
# CUTLASS's FP8 products on Hopper reach 1,165 TFLOP/s at 8,192 tokens and 1,103 at 16,384: prefill is 1.061 times as
# fast. Of INT8 only the products were measured, 1,229 and 1,174. cuBLAS's reach 1,315 at both (8B shape, one H100,
# 2026-11-25, benchmarks/levers.py and products.py). In batchq itself, on one H200, cuBLAS labels 71,013 tokens/s and
# CUTLASS at its best step 67,733 (2026-11-30, benchmarks/peers.py). Small steps of decoding were not compared.
HOPPER_STEP_TOKENS = 8192
HOPPER = (9, 0)
FP8 = frozenset({Scheme.fp8, Scheme.fp8_gptq})  # scales per token and per channel
CUTLASS = FP8 | {Scheme.int8, Scheme.int8_rtn}
LARGE_GPU = 64 << 30  # bytes; on smaller ones a step's activations compete with the weights
TIGHT_SHARE = 0.95  # of a GPU's memory, where the KV cache is short


@dataclass(frozen=True, slots=True)
class Weights:
    """What is served: a checkpoint's folder (the model's, before there is one) and the bytes of its tensors."""

    path: str
    bytes: int
    origin: Origin | None = None  # for nodes that haven't the folder


@dataclass(frozen=True, slots=True)
class Reason:
    """One setting as it will be, in words, and why."""

    name: str
    value: str
    why: str


@dataclass(frozen=True, slots=True)
class Settings:
    """An engine as it will be started, how many rows it holds at a time, and why."""

    engine: EngineSpec
    in_flight: int
    reasons: tuple[Reason, ...]


def resolve_settings(
    config: Config, draft: Plan, weights: Weights, hardware: Hardware, lengths: Lengths | None = None
) -> Settings:
    """How this job's engine is started on the weights. The same arguments give the same engine, to the bit.

    `lengths` are measured here if they aren't given and a setting depends on them.
    """
    chosen, reasons = choose_settings(config, draft, weights, hardware, lengths)
    spec = engine_spec(chosen, weights, hardware)
    return Settings(spec, in_flight(config, spec), tuple(reasons))


def engine_spec(config: Config, weights: Weights, hardware: Hardware) -> EngineSpec:
    """An engine with what the configuration names and nothing else chosen but what it can't start without."""
    engine, cuda = config.engine, hardware.device == "cuda"
    tokens = engine.max_num_batched_tokens or step_tokens(hardware)
    sequences = engine.max_num_seqs or SEQUENCES[hardware.device]
    options: dict[str, Any] = {}
    if engine.kind is EngineKind.vllm and not cuda:
        model, bytes = read_config(weights.path), weights.bytes
        if "quantization_config" not in model and lacks_bfloat16(hardware):
            options["dtype"], bytes = "float32", 2 * bytes
        options["kv_cache_memory_bytes"] = kv_cache_bytes(
            model,
            hardware,
            weights=bytes,
            max_model_len=engine.max_model_len,
            max_num_seqs=sequences,
            replicas=replicas.arrange(config.cluster, hardware).on_fullest_node,
        )
    if config.quantization.kv_cache is KvCache.fp8:
        options["kv_cache_dtype"] = "fp8"
    return EngineSpec(
        kind=engine.kind.value,
        model=weights.path,
        max_model_len=engine.max_model_len,
        max_num_batched_tokens=max(tokens, engine.max_model_len) if not cuda else tokens,
        max_num_seqs=sequences,
        device=hardware.device,
        tensor_parallel_size=config.cluster.tensor_parallel_size,
        pipeline_parallel_size=config.cluster.pipeline_parallel_size,
        scored=answers.of(config.task).scored,
        options={**options, **engine.options},
        trust_remote_code=config.model.trust_remote_code,
        origin=weights.origin,
    )


def lacks_bfloat16(hardware: Hardware) -> bool:
    """Whether torch has no fast bfloat16 on this CPU: on an AMD EPYC without AVX-512 a product of it took 48 times as
    long as one of float32, and the demo ran at 23 tokens/s."""
    return "avx2" in hardware.flags and "avx512f" not in hardware.flags


def in_flight(config: Config, spec: EngineSpec) -> int:
    """Rows handed to the engine and not yet answered."""
    return config.engine.in_flight or 2 * spec.max_num_seqs


def step_tokens(hardware: Hardware) -> int:
    """Tokens in a step, unless told otherwise."""
    small = any(gpu.memory < LARGE_GPU for gpu in hardware.gpus)
    return STEP_TOKENS[hardware.device] // (2 if small else 1)


# ---- the rules ----


class _Choices:
    """Settings as they are decided one after the other: the configured, else the tuned, else the rule's."""

    def __init__(self, config: Config, measured: Tuned | None, lengths: Lengths | None) -> None:
        self.given, self.tuned, self.lengths = configured(config), measured, lengths
        self.values: Arguments = dict(self.given)
        self.reasons: list[Reason] = []

    def decided(self, name: str) -> Any:
        """What is configured or tuned; None where a rule decides."""
        return self.given.get(name, (self.tuned.settings if self.tuned else {}).get(name))

    def choose(self, name: str, value: Any, why: str) -> Any:
        """Decide a setting, with what its rule says if nothing else does; returns what it is."""
        if name in self.given:
            value, why = self.given[name], "as configured"
        elif self.tuned and name in self.tuned.settings:
            value, why = self.tuned.settings[name], self.tuned.words(self.lengths)
        self.values[name] = value
        self.reasons.append(Reason(name, f"{value:,}" if name in FIELDS else str(value), why))
        return value


def choose_settings(
    config: Config, draft: Plan, weights: Weights, hardware: Hardware, lengths: Lengths | None = None
) -> tuple[Config, list[Reason]]:
    """The configuration with its engine's settings filled in, and the reason of each."""
    engine, cuda = config.engine, hardware.device == "cuda"
    choices = _Choices(config, tuned.recall(config, draft, hardware) if config.tune.use else None, lengths)
    generates = answers.of(config.task).decodes and engine.kind is EngineKind.vllm and cuda
    if lengths is None and generates and choices.decided(ROWS) is None:
        choices.lengths = sample.look(config, draft, weights.path).lengths()
    choices.reasons.append(_length(config, weights.path, choices.lengths))
    scheme = Scheme(draft.quantization)
    if scheme is Scheme.none and engine.kind is EngineKind.vllm:
        scheme = stored_scheme(read_config(weights.path))  # a model that came quantized
    if engine.kind is EngineKind.vllm and hardware.capability == HOPPER and scheme in FP8 and not generates:
        why = "cuBLAS multiplies FP8 faster on Hopper than CUTLASS (auto, what vLLM takes): 1.05 to 1.15 times the rows"
        choices.choose(BACKEND, "torch", why)
    step = _choose_step(choices, config, hardware, scheme)
    if engine.kind is EngineKind.vllm and cuda:
        _choose_on_gpu(choices, config, weights, hardware, step)
    else:
        choices.choose(ROWS, SEQUENCES[hardware.device], "more only take memory; a step holds fewer rows")
        if engine.kind is EngineKind.vllm:
            why = "on a CPU compiling takes minutes of start-up; `tune` tries what it gains"
            choices.choose(EAGER, True, why)
            choices.reasons += _kv_cache_on_cpu(with_settings(config, choices.values), weights, hardware)
    return with_settings(config, choices.values), choices.reasons


def _choose_step(choices: _Choices, config: Config, hardware: Hardware, scheme: Scheme) -> int:
    step, longest = step_tokens(hardware), config.engine.max_model_len
    if hardware.device == "cuda":
        why = "more gain nothing, the GPU is bound by arithmetic before"
        cutlass = scheme in CUTLASS and choices.values.get(BACKEND) != "torch"
        if hardware.capability == HOPPER and cutlass and step > HOPPER_STEP_TOKENS:
            step, why = HOPPER_STEP_TOKENS, "vLLM's 8-bit products are fastest in such steps on Hopper"
        elif step < STEP_TOKENS["cuda"]:
            why = f"fewer than on larger GPUs: a step's activations take memory too, of {gib(_smallest(hardware))}"
        step = choices.choose(STEP, step, why)
    elif choices.given.get(STEP, longest) < longest:
        choices.reasons.append(Reason(STEP, f"{longest:,}", "raised from what is configured to max_model_len"))
    else:
        least = max(step, longest)
        why = (
            "a CPU is busy with one row's prefill" if least == step else "a CPU takes a row in one step: max_model_len"
        )
        step = choices.choose(STEP, least, why)
    return step


def _choose_on_gpu(choices: _Choices, config: Config, weights: Weights, hardware: Hardware, step: int) -> None:
    """Scoring holds the prompts of the step that is computed and of the next; generating, rows to their ends."""
    generates, lengths = answers.of(config.task).decodes, choices.lengths
    row, wanted = 0.0, 2.0 * step
    if generates:
        prompt = lengths.mean if lengths and lengths.tokens else config.engine.max_model_len / 2
        row = prompt + answers.of(config.task).max_output_tokens
        wanted = row * (choices.decided(ROWS) or SEQUENCES["cuda"])
    share = GPU_SHARE
    if kv_tokens(config, weights, hardware, share) < wanted and free_share(hardware) > TIGHT_SHARE:
        share = TIGHT_SHARE
    held = kv_tokens(config, weights, hardware, choices.given.get(SHARE, share))
    rows, why = SEQUENCES["cuda"], "one prefill answers a row, so a step's tokens are the limit, not its rows"
    if generates:
        rows = max(1, min(SEQUENCES["cuda"], int(held / row)))
        why = "decoding reads the weights once for all rows of a step"
        if rows < SEQUENCES["cuda"]:
            why = (
                f"a row takes {row:,.0f} tokens of KV cache with a whole answer, and {held:,} fit; "
                "more would be put off"
            )
    choices.choose(ROWS, rows, why)
    tight = "the KV cache is short of what the rows of a step need" if share > GPU_SHARE else "enough"
    why = f"{tight}: {held:,} tokens of KV cache beside {gib(weights.bytes)} of weights; the rest stays free"
    choices.choose(SHARE, share, why)
    choices.reasons.append(_kv_cache_on_gpu(config, hardware, held < wanted))
    if choices.decided(EAGER) is not None:
        choices.choose(EAGER, False, "")
    elif not generates:
        why = "CUDA graphs are for steps of up to 512 tokens, and a prefill's are larger; 11 s less of each start"
        choices.choose(COMPILATION, {"cudagraph_mode": "NONE"}, why)


def _length(config: Config, path: str, lengths: Lengths | None) -> Reason:
    limit, most = config.engine.max_model_len, tokens_read(path)
    why = "as configured"
    if lengths and lengths.tokens:
        longest = lengths.longest + answer_tokens(config)
        why += f"; the longest of {len(lengths.tokens):,} sampled rows takes {longest:,}"
    why += f"; the model reads {most:,}" if most else ""
    return Reason("max_model_len", f"{limit:,}", why)


def _kv_cache_on_cpu(config: Config, weights: Weights, hardware: Hardware) -> list[Reason]:
    engine, options = config.engine, engine_spec(config, weights, hardware).options
    size = options["kv_cache_memory_bytes"]
    whole = f"{engine.max_num_seqs:,} rows of {engine.max_model_len:,} tokens, at most half of the memory that is left"
    given = engine.options.get("kv_cache_memory_bytes")
    reasons = [
        Reason("kv_cache_memory_bytes", gib(size), "as configured" if given else whole),
        Reason("kv_cache_dtype", "auto", "the model's own type; fp8 takes a GPU that computes in it"),
    ]
    if options.get("dtype") == "float32" and "dtype" not in engine.options:
        reasons.append(Reason("dtype", "float32", "without AVX-512, as here, bfloat16 is many times slower"))
    return reasons


def _kv_cache_on_gpu(config: Config, hardware: Hardware, short: bool) -> Reason:
    """The KV cache's type, and advice where another would help; never another unasked, since it changes answers."""
    kind, why = "auto", "the model's own type; there is memory enough, so fp8 would cost quality for nothing"
    if config.quantization.kv_cache is KvCache.fp8:
        kind, why = "fp8", "as configured; twice the tokens in the same memory, and the gate judges what it costs"
    elif short and (hardware.capability or (0, 0)) >= SCHEMES[Scheme.fp8].since:
        why = "the model's own type; it is short here, and quantization.kv_cache=fp8 would hold twice the tokens"
    elif short:
        why = "the model's own type; it is short here, and fp8 takes a GPU that computes in it"
    return Reason("kv_cache_dtype", kind, why)


def kv_tokens(config: Config, weights: Weights, hardware: Hardware, share: float) -> int:
    """Tokens of KV cache on one engine's GPUs beside the weights, if vLLM takes that share of their memory."""
    devices = config.cluster.tensor_parallel_size * config.cluster.pipeline_parallel_size
    element = 1 if config.quantization.kv_cache is KvCache.fp8 else 2
    free = share * _smallest(hardware) - OVERHEAD["cuda"] - weights.bytes / devices
    return max(0, int(free * devices)) // kv_cache.bytes_per_token(read_config(weights.path), element)


def _smallest(hardware: Hardware) -> int:
    return min(gpu.memory for gpu in hardware.gpus)


def free_share(hardware: Hardware) -> float:
    """The share of its memory that is free on the fullest GPU, between 0 and 1."""
    return min(gpu.free / gpu.memory for gpu in hardware.gpus)


# ---- as configured ----


def configured(config: Config) -> Arguments:
    """What the configuration names itself, and nothing here may change."""
    fields = {name: getattr(config.engine, name) for name in FIELDS}
    return {name: value for name, value in fields.items() if value is not None} | config.engine.options


def with_settings(config: Config, settings: Arguments) -> Config:
    """The same job with these engine arguments."""
    fields = {name: value for name, value in settings.items() if name in FIELDS}
    options = {name: value for name, value in settings.items() if name not in FIELDS}
    engine = dataclasses.replace(config.engine, **fields, options={**config.engine.options, **options})
    return dataclasses.replace(config, engine=engine)
