"""What llm-compressor is told to do for each scheme."""

from __future__ import annotations

from typing import Any

from batchq.config import QuantizationConfig, Scheme
from batchq.errors import ConfigError


def recipe_of(scheme: Scheme, config: QuantizationConfig, group: int | None = None) -> dict[str, Any]:
    """What compress.py is told to do, beside the model and the prompts; part of the key.

    `steps`: llm-compressor's modifiers by name with their arguments, those of one step applied in one run over the
    prompts; `pipeline` is llm-compressor's way through the model.
    """
    gptq = {"dampening_frac": config.dampening}
    grouped = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    int4 = {"num_bits": 4, "type": "int", "symmetric": True, **grouped}
    # Smoothing changes no output of the model, so one plain pass finds all its scales: half the passes.
    smooth = ("SmoothQuantModifier", {"smoothing_strength": config.smoothing})
    fp8_tokens = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}

    def quantization(modifier: str, weights: Any, activations: Any = None, **more: Any) -> tuple[str, dict[str, Any]]:
        what = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
        if activations:  # llm-compressor would store these four bits in eight, and vLLM's kernel wants them packed
            what["format"] = "pack-quantized"
        chosen = {"config_groups": {"group_0": what}} if isinstance(weights, dict) else {"scheme": weights}
        return modifier, {"targets": ["Linear"], "ignore": list(config.ignore), **chosen, **more}

    steps: list[tuple[str, list[tuple[str, dict[str, Any]]]]]  # pipeline, and modifiers with their arguments
    match scheme:
        case Scheme.fp8:
            steps = [("datafree", [quantization("QuantizationModifier", "FP8_DYNAMIC")])]
        case Scheme.fp8_gptq:
            # Keeps 100.2% of the small model's accuracy; rounding alone 98.8%, GPTQ 99.1%, SmoothQuant 97.5%.
            steps = [("basic", [smooth]), ("sequential", [quantization("GPTQModifier", "FP8_DYNAMIC", **gptq)])]
        case Scheme.fp8_block:
            steps = [("datafree", [quantization("QuantizationModifier", "FP8_BLOCK")])]
        case Scheme.int8_rtn:
            steps = [("datafree", [quantization("QuantizationModifier", "W8A8")])]
        case Scheme.w8a16:
            steps = [
                ("datafree", [quantization("QuantizationModifier", {**int4, "num_bits": 8, "strategy": "channel"})])
            ]
        case Scheme.int8:
            steps = [("basic", [smooth]), ("sequential", [quantization("GPTQModifier", "W8A8", **gptq)])]
        case Scheme.w4a16:
            steps = [("sequential", [quantization("GPTQModifier", int4, **gptq)])]
        case Scheme.w4a16_awq:
            lopsided = {**int4, "symmetric": False}
            steps = [("sequential", [("AWQModifier", {}), quantization("QuantizationModifier", lopsided)])]
        case Scheme.w4a8_fp8:
            steps = [("sequential", [quantization("GPTQModifier", int4, fp8_tokens, **gptq)])]
        case Scheme.nvfp4:
            steps = [("sequential", [quantization("QuantizationModifier", "NVFP4")])]
        case Scheme.sparse24:
            pruned = {"sparsity": 0.5, "mask_structure": "2:4", "targets": ["Linear"], "ignore": list(config.ignore)}
            steps = [("sequential", [("SparseGPTModifier", pruned)])]
        case _:
            raise ConfigError(f"quantization.scheme={scheme.value}: nothing to do for llm-compressor")
    return {"scheme": scheme.value, "seed": config.seed, "steps": steps}
