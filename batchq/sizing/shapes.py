"""Published models: a config.json in conf/shape -> the tensors that its checkpoint holds. No weights, no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchq.config import conf_dir
from batchq.errors import ModelError
from batchq.model.tensors import Shape, Tensor


@dataclass(frozen=True, slots=True)
class Published:
    """One model as its publisher describes it; `parameters` is the nameplate's number ("109B")."""

    name: str
    parameters: int
    shape: Shape


def published() -> tuple[Published, ...]:
    """The shipped shapes, smallest first. Raises ModelError for a file of another architecture."""
    models = [read_published(path) for path in (conf_dir() / "shape").glob("*.json")]
    return tuple(sorted(models, key=lambda model: model.parameters))


def read_published(path: Path) -> Published:
    """A config.json as its publisher has it, with one more key, `published`: name, parameters, source."""
    config = json.loads(path.read_text())
    about = config.pop("published")
    return Published(about["name"], about["parameters"], Shape(tensors_of(config), config))


def tensors_of(config: dict[str, Any]) -> tuple[Tensor, ...]:
    """What a checkpoint with this config.json holds. Raises ModelError for another architecture."""
    match config["model_type"]:
        case "llama":
            return tuple(_llama(config))
        case "llama4":
            return tuple(_llama4(config))
        case "llama4_text":
            return tuple(_llama4_text(config))
        case other:
            raise ModelError(f"model_type={other}: no known shape; known are llama, llama4, llama4_text")


def _llama(config: dict[str, Any]) -> Iterator[Tensor]:
    hidden = config["hidden_size"]
    yield from _ends(config, "model")
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        yield from _attention(config, layer)
        yield from _gated(f"{layer}.mlp", hidden, config["intermediate_size"])


def _llama4(config: dict[str, Any]) -> Iterator[Tensor]:
    vision = config["vision_config"]
    yield from _llama4_text(config["text_config"], "language_model.")
    yield _matrix("multi_modal_projector.linear_1", config["text_config"]["hidden_size"], vision["vision_output_dim"])
    yield from _tower(vision)


def _llama4_text(text: dict[str, Any], parent: str = "") -> Iterator[Tensor]:
    """Every `interleave_moe_layer_step`-th layer has experts, one of them shared; the others are dense and wider.

    Experts are (experts, rows, columns), the way llm-compressor's linear layers see them.
    """
    hidden, inner, experts = text["hidden_size"], text["intermediate_size"], text["num_local_experts"]
    yield from _ends(text, f"{parent}model")
    for index in range(text["num_hidden_layers"]):
        layer = f"{parent}model.layers.{index}"
        yield from _attention(text, layer)
        forward = f"{layer}.feed_forward"
        if (index + 1) % text["interleave_moe_layer_step"]:
            yield from _gated(forward, hidden, text["intermediate_size_mlp"])
            continue
        yield _matrix(f"{forward}.router", experts, hidden)
        yield Tensor(f"{forward}.experts.gate_up_proj.weight", "BF16", (experts, 2 * inner, hidden))
        yield Tensor(f"{forward}.experts.down_proj.weight", "BF16", (experts, hidden, inner))
        yield from _gated(f"{forward}.shared_expert", hidden, inner)


def _tower(vision: dict[str, Any]) -> Iterator[Tensor]:
    """Llama 4's vision tower; its biases and norms, a thousandth of it, left out."""
    width, inner = vision["hidden_size"], vision["intermediate_size"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
    yield Tensor("vision_model.positional_embedding_vlm", "BF16", (patches, width))
    yield _matrix("vision_model.patch_embedding.linear", width, vision["num_channels"] * vision["patch_size"] ** 2)
    for index in range(vision["num_hidden_layers"]):
        layer = f"vision_model.model.layers.{index}"
        for name in "qkvo":
            yield _matrix(f"{layer}.self_attn.{name}_proj", width, width)
        yield _matrix(f"{layer}.mlp.fc1", inner, width)
        yield _matrix(f"{layer}.mlp.fc2", width, inner)
    adapter, into, out = (
        "vision_model.vision_adapter.mlp",
        vision["projector_input_dim"],
        vision["projector_output_dim"],
    )
    yield _matrix(f"{adapter}.fc1", into, inner)
    yield _matrix(f"{adapter}.fc2", out, out)


def _ends(text: dict[str, Any], model: str) -> Iterator[Tensor]:
    vocabulary, hidden = text["vocab_size"], text["hidden_size"]
    yield _matrix(f"{model}.embed_tokens", vocabulary, hidden)
    yield Tensor(f"{model}.norm.weight", "BF16", (hidden,))
    if not text.get("tie_word_embeddings"):
        yield _matrix(f"{model.removesuffix('model')}lm_head", vocabulary, hidden)


def _attention(text: dict[str, Any], layer: str) -> Iterator[Tensor]:
    hidden, size = text["hidden_size"], text["head_dim"]
    queries, keys = text["num_attention_heads"] * size, text["num_key_value_heads"] * size
    for name, rows, columns in (
        ("q", queries, hidden),
        ("k", keys, hidden),
        ("v", keys, hidden),
        ("o", hidden, queries),
    ):
        yield _matrix(f"{layer}.self_attn.{name}_proj", rows, columns)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield Tensor(f"{layer}.{norm}.weight", "BF16", (hidden,))


def _gated(name: str, hidden: int, inner: int) -> Iterator[Tensor]:
    yield _matrix(f"{name}.gate_proj", inner, hidden)
    yield _matrix(f"{name}.up_proj", inner, hidden)
    yield _matrix(f"{name}.down_proj", hidden, inner)


def _matrix(name: str, rows: int, columns: int) -> Tensor:
    return Tensor(f"{name}.weight", "BF16", (rows, columns))
