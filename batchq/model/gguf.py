"""A GGUF file -> a BF16 checkpoint, converted in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from batchq.errors import ModelError
from batchq.machine.cache import cache_dir
from batchq.machine.words import last_line

CONVERTER = 1  # part of a converted GGUF's folder name: raise it when convert_gguf writes something else


def convert(source: Path, target: Path, where: str) -> None:
    """Run convert_gguf in a process of its own, so that torch never comes into this one."""
    log = cache_dir() / "logs" / f"convert-{source.stem}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    home = str(Path(__file__).parents[2])
    search = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [
        sys.executable,
        "-P",
        "-c",
        "import sys; from batchq.model.gguf import convert_gguf; convert_gguf(*sys.argv[1:])",
    ]
    with log.open("wb") as chatter:
        done = subprocess.run(
            [*command, str(source), str(target)],
            stdin=subprocess.DEVNULL,
            stdout=chatter,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": search, "HF_HUB_OFFLINE": "1"},
        )
    if done.returncode:
        said = last_line(log.read_text(errors="replace")) or f"exit code {done.returncode}"
        raise ModelError(f"{where}: converting it failed ({said}); see {log}")


def convert_gguf(source: str, target: str) -> None:
    """A GGUF file's weights, dequantized to BF16 safetensors, and its tokenizer with its chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, file = os.path.split(source)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    # transformers 5.17 takes the first token for a GGUF's end of sequence; the model's config has the right one.
    if isinstance(model.config.eos_token_id, int):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    for name in ("config.json", "generation_config.json"):  # the same model whichever version wrote it
        file_path = Path(target) / name
        content = json.loads(file_path.read_text(encoding="utf-8"))
        content.pop("transformers_version", None)
        file_path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
