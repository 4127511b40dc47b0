"""A tiny random Llama with a real tokenizer, made in well under a second and without torch.

    path = make_tiny_model(tmp_path / "tiny")

350 thousand weights in BF16: the shape "tiny" of benchmarks/shapes.py, with a tied head and a vocabulary of its own.
The tokenizer is byte-level BPE of some 430 tokens, so any text goes through it; LABELS are single tokens, with and
without a space before.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

from batchq.sizing.shapes import tensors_of
from benchmarks.shapes import LLAMA, TINY

LABELS = ("positive", "neutral", "negative")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = [
    "Agent: Good morning, thank you for calling. How can I help you today?",
    "Customer: The order arrived late and the box was broken, I am not happy with this at all.",
    "Agent: I am sorry to hear that. Could you give me the number of your order, please?",
    "Customer: Thank you, that was quick and friendly. The new one works well.",
    "Answer with one word: is the customer's sentiment positive, neutral or negative?",
]


def make_tiny_model(folder: Path, seed: int = 0) -> Path:
    """Write config, tokenizer, chat template and weights under `folder`, made if need be; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = _write_tokenizer(folder)
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    form = {"vocab_size": vocabulary, "tie_word_embeddings": True, "max_position_embeddings": 2048}
    config = {**LLAMA, **TINY, **form, **ends}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps(ends))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    random = np.random.default_rng(seed)
    weights = {
        t.name: np.ones(t.shape) if "norm" in t.name else random.normal(0, 0.1, t.shape)  # for answers to differ
        for t in tensors_of(config)
    }
    write_safetensors(folder / "model.safetensors", weights)
    return folder


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write float arrays as BF16, which numpy has no type for: the upper half of a float32's bits."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    blobs, end = [], 0
    for name, values in tensors.items():
        blob = (np.ascontiguousarray(values, dtype="<f4").view("<u4") >> 16).astype("<u2").tobytes()
        header[name] = {"dtype": "BF16", "shape": list(values.shape), "data_offsets": [end, end + len(blob)]}
        blobs.append(blob)
        end += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def _write_tokenizer(folder: Path) -> int:
    """Train and save the tokenizer; returns its vocabulary's size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    words = [f"{label} {label}\n{label}" for label in LABELS] * 20  # often enough to become single tokens
    tokenizer.train_from_iterator([*TEXT, *words], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[1],
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[0],
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return int(tokenizer.get_vocab_size())
