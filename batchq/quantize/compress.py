"""llm-compressor's own process: a model folder in, a compressed-tensors checkpoint out.

Run by path, `python compress.py < request.json`, so that an interpreter without batchq can do it;
hence nothing of batchq is imported here. The request comes on stdin, not in a file, because its
token ids are the user's rows. Keys: `model` and `output` (folders), `steps` (as in quantize.recipe),
`seed`, `threads`, `trust_remote_code`, and where prompts are needed `calibration` (lists of token ids).

Lines with "batchq progress: " or "batchq error: " are for a person, "batchq peak: " comes with bytes of memory by
device; everything else is chatter for a log.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import re
import resource
import shutil
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

# What belongs to a model beside its weights and config.json; the checkpoint takes the base model's
# own bytes, because a tokenizer saved again is not always the tokenizer that was loaded.
COMPANIONS = ("*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt")
NOT_COMPANIONS = ("config.json", "batchq.json", "*.index.json")


def main() -> None:
    die_with_parent()
    request = json.load(sys.stdin)
    source, output = Path(request["model"]), Path(request["output"])
    compress(request, source, output)
    copy_companions(source, output, request["trust_remote_code"])
    for path in output.iterdir():
        path.chmod(0o644)  # safetensors come out as 0600
    print(f"batchq peak: {json.dumps(peak_bytes())}", flush=True)


def compress(request: dict[str, Any], source: Path, output: Path) -> None:
    """Load the base model, quantize it in place, save it compressed under `output`."""
    say("loading llm-compressor")
    import torch
    from datasets import Dataset
    from llmcompressor.entrypoints.oneshot import oneshot
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(request["seed"])
    torch.set_num_threads(request["threads"])
    if not torch.accelerator.is_available():
        # llm-compressor 0.14 pins AWQ's intermediate values, which torch refuses where there is no accelerator.
        setattr(IntermediatesCache, "pin_memory", lambda *_: None)  # noqa: B010
    say("loading the model")
    trusted = request["trust_remote_code"]
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", local_files_only=True, trust_remote_code=trusted)
    watch_layers(model.config.get_text_config().num_hidden_layers)
    calibration: dict[str, Any] = {}
    if samples := request.get("calibration"):
        say(f"calibrating on {len(samples)} prompts, {sum(map(len, samples))} tokens")
        calibration = {
            "dataset": Dataset.from_dict({"input_ids": samples}),
            "num_calibration_samples": len(samples),
            "shuffle_calibration_samples": False,
            "max_seq_length": max(map(len, samples)),
        }
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=trusted)
    for pipeline, modifiers in request["steps"]:
        # A GPU always goes layer by layer: only that pipeline brings there a model that is loaded in main memory.
        pipeline = "sequential" if pipeline == "basic" and torch.cuda.is_available() else pipeline
        recipe = [modifier(name)(**arguments) for name, arguments in modifiers]
        oneshot(model=model, tokenizer=tokenizer, recipe=recipe, pipeline=pipeline, **calibration)
    say("saving")
    model.save_pretrained(output, save_compressed=True)
    (output / "recipe.yaml").unlink(missing_ok=True)  # names the last step only; the card has the whole recipe


def peak_bytes() -> dict[str, int]:
    """The most memory this process had at a time, on the host and, if it used one, reserved on a GPU."""
    import torch

    peaks = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if torch.cuda.is_available():
        peaks["gpu"] = torch.cuda.max_memory_reserved()
    return peaks


def modifier(name: str) -> Any:
    """One of llm-compressor's modifiers, imported only when it is asked for."""
    where = {
        "AWQModifier": "transform.awq",
        "GPTQModifier": "gptq",
        "QuantizationModifier": "quantization",
        "SmoothQuantModifier": "transform.smoothquant",
        "SparseGPTModifier": "pruning.sparsegpt",
    }
    return getattr(importlib.import_module(f"llmcompressor.modifiers.{where[name]}"), name)


def copy_companions(source: Path, output: Path, code: bool = False) -> None:
    """Tokenizer, chat template and generation settings, and the model's own code if that is trusted, byte for byte."""
    patterns = (*COMPANIONS, "*.py") if code else COMPANIONS
    wanted = {p for pattern in patterns for p in source.glob(pattern) if p.is_file()}
    for path in sorted(wanted):
        if not any(path.match(pattern) for pattern in NOT_COMPANIONS):
            shutil.copyfile(path, output / path.name)


def watch_layers(layers: int) -> None:
    """Report each decoder layer as llm-compressor's own log mentions it for the first time."""
    from loguru import logger

    seen: set[tuple[str, int]] = set()

    def sink(message: Any) -> None:
        text = message.record["message"]
        step = "smoothing" if text.startswith("Smoothing") else "quantizing" if text.startswith("Quantizing") else None
        layer = re.search(r"layers\.(\d+)\.", text)
        if step and layer and (mark := (step, int(layer.group(1)))) not in seen:
            seen.add(mark)
            say(f"{step} layer {mark[1] + 1} of {layers}")

    logger.add(sink, level="INFO")


def say(text: str) -> None:
    print(f"batchq progress: {text}", flush=True)


def die_with_parent() -> None:
    """Hours of quantizing are no use to a driver that was killed; Linux tells the child."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        traceback.print_exc()
        print(f"batchq error: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}", flush=True)
        sys.exit(1)
