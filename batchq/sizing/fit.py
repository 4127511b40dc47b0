"""Which scheme a model is served in on this machine: what was asked for, or the fastest that fits, and why."""

from __future__ import annotations

from dataclasses import dataclass

from batchq.config import Config, Scheme
from batchq.errors import ConfigError
from batchq.machine.hardware import Hardware
from batchq.machine.words import gib
from batchq.model.scheme import LADDER, SCHEMES, fallback_after, unserved
from batchq.model.source import Model
from batchq.model.tensors import Shape, matrices, read_shape
from batchq.quantize.sizes import Quantization
from batchq.sizing.memory import Memory, memory_needed, usable_bytes
from batchq.sizing.replicas import arrange
from batchq.task import answers

INT8_FLAGS = frozenset({"avx512_vnni", "amx_int8"})  # without these, INT8 on a CPU is slower than BF16


def require_memory(need: Memory, scheme: Scheme, hardware: Hardware, config: Config) -> None:
    """Raises ConfigError with the numbers when one device of a replica hasn't enough."""
    sharing = arrange(config.cluster, hardware).on_fullest_node
    have = usable_bytes(hardware, sharing)
    if hardware.gpus:
        where, ways = (
            f"a {hardware.accelerator}",
            "a smaller model, a higher cluster.tensor_parallel_size or pipeline_parallel_size",
        )
    else:
        where = "each replica's share of this machine's free memory" if sharing > 1 else "this machine's free memory"
        ways = "a smaller model" + (", fewer cluster.replicas" if sharing > 1 else "")
    if need.total > have:
        raise ConfigError(
            f"too little memory: {gib(need.total)} needed (weights {gib(need.weights)} under {scheme.value}, KV cache "
            f"{gib(need.kv)} for one row of engine.max_model_len={config.engine.max_model_len}, engine "
            f"{gib(need.overhead)}), {gib(have)} in {where}; choose {ways}, or a lower engine.max_model_len"
        )


@dataclass(frozen=True, slots=True)
class Choice:
    """The scheme to quantize to, never `auto`, why, and what is tried after it if it costs too much quality."""

    scheme: Scheme
    why: str
    fallback: tuple[Scheme, ...]


class Fit:
    """One model on one machine under one configuration: what each scheme takes, and whether it can be served."""

    def __init__(self, model: Model, hardware: Hardware, config: Config, shape: Shape | None = None) -> None:
        """`shape`: where it isn't to be read from the model's folder."""
        self.model, self.hardware, self.config = model, hardware, config
        self.shape = shape or read_shape(model.path)

    def quantization(self, scheme: Scheme) -> Quantization:
        """How the scheme stores this model's matrices."""
        asked = self.config.quantization
        return Quantization.of(scheme, self.shape.tensors, asked.ignore, asked.group_size)

    def memory(self, scheme: Scheme) -> Memory:
        """What one device needs under the scheme."""
        return memory_needed(
            self.shape,
            self.quantization(scheme),
            max_model_len=self.config.engine.max_model_len,
            device=self.hardware.device,
            tensor=self.config.cluster.tensor_parallel_size,
            pipeline=self.config.cluster.pipeline_parallel_size,
        )

    def fits(self, scheme: Scheme) -> bool:
        sharing = arrange(self.config.cluster, self.hardware).on_fullest_node
        return self.memory(scheme).total <= usable_bytes(self.hardware, sharing)

    def unserved(self, scheme: Scheme) -> str | None:
        """Why vLLM can't serve it here, or None."""
        return unserved(scheme, self.hardware, matrices(self.shape.tensors, self.config.quantization.ignore))

    def choose(self) -> Choice:
        """Raises ConfigError for a scheme, or a model's own quantization, that can't be served on this hardware."""
        asked, hardware, model = self.config.quantization.scheme, self.hardware, self.model
        if model.quantized:
            _require_stored(model, hardware)
            why = f"{model.name} is already quantized ({model.quantized}) and is used as it is"
            return Choice(Scheme.none, why, ())
        if asked is not Scheme.auto:
            if reason := self.unserved(asked):
                others = [s.value for s in (*LADDER, Scheme.auto) if s is Scheme.auto or not self.unserved(s)]
                raise ConfigError(f"quantization.scheme={asked.value}: {reason}; choose {', '.join(others)}")
            return Choice(asked, f"{asked.value}, as asked{self._grouped(asked)}", self._fallback(asked))
        scheme, why = self._auto()
        return Choice(scheme, why + self._grouped(scheme), self._fallback(scheme))

    def _auto(self) -> tuple[Scheme, str]:
        """The fastest of what fits: bits that the hardware computes in, fewer only where memory forces it."""
        hardware = self.hardware
        best, why = self._native()
        if self.fits(best) or best is Scheme.none:
            return best, why
        device = _named(hardware) if hardware.gpus else "this machine"
        for scheme in (Scheme.nvfp4, Scheme.w4a8_fp8, Scheme.w4a16):
            if not self.unserved(scheme) and self.fits(scheme):
                heavy = not answers.of(self.config.task).decodes
                price = "prefill is slower for it" if heavy else "decoding reads fewer bytes for it"
                return scheme, (
                    f"{best.value} weights take {gib(self.memory(best).weights)} on each device and don't fit in "
                    f"{device}, "
                    f"4-bit ones take {gib(self.memory(scheme).weights)} and do; {price}"
                )
        return best, why  # nothing fits; require_memory says so with the numbers

    def _native(self) -> tuple[Scheme, str]:
        hardware = self.hardware
        work = "this job is all prefill, which is bound by arithmetic"
        if answers.of(self.config.task).decodes:
            work = "in large batches decoding is bound by arithmetic too"
        if not hardware.gpus:
            if fast := sorted(INT8_FLAGS & hardware.flags):
                return Scheme.int8, f"no GPU here, and this CPU computes in INT8 ({', '.join(fast)})"
            return Scheme.none, "no GPU here, and this CPU has no INT8 instructions (avx512_vnni, amx_int8)"
        capability, name = hardware.capability or (0, 0), _named(hardware)
        if capability >= SCHEMES[Scheme.fp8].since:
            return Scheme.fp8, f"{name} computes in FP8 at twice the rate, without calibration; {work}"
        if capability >= SCHEMES[Scheme.int8].since:
            return Scheme.int8, f"{name} computes in INT8 at twice the rate but not in FP8; {work}"
        return Scheme.none, f"{name} gains nothing from FP8 or INT8"

    def _grouped(self, scheme: Scheme) -> str:
        """Words about the group size, where the scheme has one."""
        if not SCHEMES[scheme].grouped:
            return ""
        group = self.quantization(scheme).group
        return (
            f"; a scale for each {group} columns"
            if group
            else "; a scale for each row, since no group divides its columns"
        )

    def _fallback(self, scheme: Scheme) -> tuple[Scheme, ...]:
        named = self.config.gate.fallback
        after = fallback_after(scheme, named)
        return after if named is not None else tuple(s for s in after if not self.unserved(s) and self.fits(s))


def _require_stored(model: Model, hardware: Hardware) -> None:
    """Raise ConfigError if vLLM can't compute in what the model is stored in; older GPUs take FP8 as weights only."""
    kind = (model.quantized or "").rpartition(" ")[2]
    if kind == "fp8" and hardware.capability is None:
        raise ConfigError(f"{model.name} is stored in fp8, which vLLM doesn't serve on a CPU")
    if kind == "int8" and hardware.capability and hardware.capability >= SCHEMES[Scheme.int8].before:
        raise ConfigError(f"{model.name} is stored in int8, and vLLM has no INT8 kernel for {_named(hardware)}")


def _named(hardware: Hardware) -> str:
    major, minor = hardware.capability or (0, 0)
    return f"{hardware.accelerator} (compute capability {major}.{minor})"
