"""quantize: real checkpoints by llm-compressor, cached by content, never half made."""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import uuid
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from batchq import storage
from batchq.config import ModelConfig, QuantizationConfig, Scheme
from batchq.engine.protocol import Origin
from batchq.errors import ConfigError, ModelError, QuantizeError
from batchq.machine.cache import BUILDING, cache_of
from batchq.model.folder import is_tied, quantization_of, read_config
from batchq.model.source import Model, resolve
from batchq.model.tensors import read_tensors, stored_bytes
from batchq.quantize import checkpoint
from batchq.quantize.card import is_whole
from batchq.quantize.checkpoint import Checkpoint, bring, checkpoint_key, make_checkpoint
from batchq.quantize.process import library_versions
from batchq.quantize.recipe import recipe_of
from batchq.quantize.sizes import Quantization, predicted_bytes

if TYPE_CHECKING:
    from tests.s3 import S3

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def base(tiny: Path) -> Model:
    return resolve(ModelConfig(path=str(tiny)))


def prompts(count: int = 8) -> list[list[int]]:
    source = random.Random(0)
    return [[source.randrange(3, 400) for _ in range(source.randrange(20, 60))] for _ in range(count)]


def make(
    base: Model, scheme: Scheme, config: QuantizationConfig, log: Path, told: list[str] | None = None
) -> Checkpoint:
    return make_checkpoint(base, scheme, config, prompts, log, (told if told is not None else []).append)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs") / "deep" / "quantize.log"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> QuantizationConfig:
    """A cache on disk that the module's tests share, so that each scheme is made once."""
    return QuantizationConfig(cache=str(tmp_path_factory.mktemp("checkpoints")))


@pytest.fixture(scope="module")
def int8(base: Model, shelf: QuantizationConfig, log: Path) -> tuple[Checkpoint, list[str]]:
    told: list[str] = []
    return make(base, Scheme.int8, shelf, log, told), told


@pytest.fixture(scope="module")
def fp8(base: Model, shelf: QuantizationConfig, log: Path) -> Checkpoint:
    return make(base, Scheme.fp8, shelf, log)


def dtypes(folder: str) -> dict[str, str]:
    return {tensor.name: tensor.dtype for tensor in read_tensors(folder)}


# ---- what comes out ----


def test_int8_stores_every_linear_layer_in_a_byte_and_nothing_else(
    base: Model, int8: tuple[Checkpoint, list[str]], log: Path
) -> None:
    made, told = int8
    assert not made.cached and made.seconds > 0
    stored = dtypes(made.path)
    layers = {name for name, dtype in stored.items() if dtype == "I8"}
    assert len(layers) == 2 * 7 and all(f"{name}_scale" in stored for name in layers)
    assert stored["model.embed_tokens.weight"] == stored["model.norm.weight"] == "BF16"
    assert quantization_of(read_config(made.path)) == "compressed-tensors int8"
    tensors = read_tensors(base.path)
    assert made.bytes == predicted_bytes(tensors, Quantization(Scheme.int8), tied=True) < stored_bytes(tensors)
    assert any("layer 2 of 2" in line for line in told)
    assert "SmoothQuant" in log.read_text() or "Smoothing" in log.read_text()


def test_int8_answers_as_the_model_does(base: Model, int8: tuple[Checkpoint, list[str]]) -> None:
    """Smoothing moves scale from activations to weights and GPTQ rounds: the answers must survive both."""
    import torch
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([prompt[:20] for prompt in prompts()])
    with torch.no_grad():
        before, after = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits.flatten()
            for path in (base.path, int8[0].path)
        )
    assert torch.corrcoef(torch.stack([before, after]))[0, 1] > 0.99


def test_fp8_needs_no_prompts(base: Model, fp8: Checkpoint, shelf: QuantizationConfig, log: Path) -> None:
    assert sum(dtype == "F8_E4M3" for dtype in dtypes(fp8.path).values()) == 2 * 7
    assert quantization_of(read_config(fp8.path)) == "compressed-tensors fp8"
    assert fp8.bytes == predicted_bytes(read_tensors(base.path), Quantization(Scheme.fp8), tied=True)

    def never() -> list[list[int]]:
        raise AssertionError("asked for prompts")

    assert make_checkpoint(base, Scheme.fp8, shelf, never, log, print).cached


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme.fp8_gptq,
        Scheme.fp8_block,
        Scheme.w8a16,
        Scheme.w4a16_awq,
        Scheme.w4a8_fp8,
        Scheme.sparse24,
    ],  # w4a16 stores as w4a8_fp8
    ids=lambda scheme: scheme.value,
)
def test_a_scheme_is_made_and_weighs_what_was_predicted(
    base: Model, shelf: QuantizationConfig, log: Path, scheme: Scheme
) -> None:
    made = make(base, scheme, shelf, log)
    tensors = read_tensors(base.path)
    predicted = predicted_bytes(tensors, Quantization.of(scheme, tensors, shelf.ignore), tied=True)
    assert predicted == pytest.approx(made.bytes, rel=0.02)
    assert made.bytes < stored_bytes(tensors) or scheme is Scheme.sparse24


def test_pruning_leaves_two_of_four(base: Model, shelf: QuantizationConfig, log: Path) -> None:
    from safetensors import safe_open

    made = make(base, Scheme.sparse24, shelf, log)
    with safe_open(Path(made.path) / "model.safetensors", "pt") as file:
        weights = file.get_tensor("model.layers.0.mlp.down_proj.weight")
    assert ((weights.reshape(-1, 4) != 0).sum(1) <= 2).all()
    assert quantization_of(read_config(made.path)) is None  # vLLM refuses what says that it is sparse


def test_a_checkpoint_is_a_model_with_the_bases_own_tokenizer(base: Model, fp8: Checkpoint) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (Path(fp8.path) / name).read_bytes() == (Path(base.path) / name).read_bytes()
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in Path(fp8.path).iterdir())
    served = resolve(ModelConfig(path=fp8.path))
    assert served.quantized and is_tied(read_config(fp8.path))


def test_the_card_tells_what_it_is(base: Model, int8: tuple[Checkpoint, list[str]]) -> None:
    folder = Path(int8[0].path)
    card = json.loads((folder / "batchq.json").read_text())
    assert card["key"] == int8[0].key == folder.name
    assert (card["base"]["name"], card["base"]["digest"]) == (base.name, base.digest)
    assert card["base"]["bytes"] > card["bytes"] == int8[0].bytes
    assert (card["recipe"]["scheme"], card["recipe"]["seed"]) == ("int8", 0)
    (_, [(first, smoothing)]), (_, [(second, gptq)]) = card["recipe"]["steps"]
    assert (first, smoothing) == ("SmoothQuantModifier", {"smoothing_strength": 0.8})
    assert second == "GPTQModifier" and any("lm_head" in name for name in gptq["ignore"])
    assert card["calibration"] == {"prompts": 8, "tokens": sum(map(len, prompts()))}
    assert set(card["versions"]) == {"llmcompressor", "compressed-tensors", "transformers"}
    assert set(card["files"]) == {path.name for path in folder.iterdir()} - {"batchq.json"}


def test_none_is_the_model_itself(base: Model, shelf: QuantizationConfig, log: Path) -> None:
    made = make_checkpoint(base, Scheme.none, shelf, list, log, print)
    assert (made.path, made.key, made.cached) == (base.path, base.digest, True)
    tuned = Model(base.path, "tuned", base.digest, "gptq")
    assert make_checkpoint(tuned, Scheme.int8, shelf, list, log, print).path == base.path


# ---- the key ----


def test_the_key_follows_all_that_decides_the_checkpoint(base: Model) -> None:
    recipe, versions = recipe_of(Scheme.int8, QuantizationConfig()), library_versions(None)
    same = [checkpoint_key(base, recipe, prompts(), versions) for _ in range(2)]
    moved = Model("/elsewhere", "other name", base.digest, None)
    assert checkpoint_key(moved, recipe, prompts(), versions) == same[0] == same[1]
    others = [
        checkpoint_key(Model(base.path, base.name, "1" * 64, None), recipe, prompts(), versions),
        checkpoint_key(base, recipe, prompts()[:-1], versions),
        checkpoint_key(base, recipe, prompts(), {**versions, "llmcompressor": "9"}),
        *(
            checkpoint_key(base, recipe_of(scheme, config), prompts(), versions)
            for scheme, config in [
                (Scheme.int8, QuantizationConfig(smoothing=0.5)),
                (Scheme.int8, QuantizationConfig(seed=1)),
                (Scheme.int8, QuantizationConfig(ignore=[])),
                (Scheme.fp8, QuantizationConfig()),
            ]
        ),
    ]
    assert len({same[0], *others}) == 1 + len(others)


def test_the_default_cache_follows_batchq_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHQ_CACHE", str(tmp_path))
    assert cache_of(QuantizationConfig()) == str(tmp_path / "checkpoints")
    assert cache_of(QuantizationConfig(cache="s3://bucket/x/")) == "s3://bucket/x"


# ---- the cache on disk ----


def test_a_second_time_is_found_and_nothing_runs(
    base: Model, shelf: QuantizationConfig, int8: tuple[Checkpoint, list[str]], tmp_path: Path
) -> None:
    told: list[str] = []
    again = make(base, Scheme.int8, shelf, tmp_path / "never.log", told)
    assert again.cached and again.path == int8[0].path and again.bytes == int8[0].bytes
    assert not told and not (tmp_path / "never.log").exists()


@pytest.mark.parametrize("damage", ["no card", "half a card", "short", "flipped", "missing"])
def test_damage_is_noticed(fp8: Checkpoint, tmp_path: Path, damage: str) -> None:
    folder = Path(shutil.copytree(fp8.path, tmp_path / "copy"))
    assert is_whole(folder)
    weights, card = folder / "model.safetensors", folder / "batchq.json"
    match damage:
        case "no card":
            card.unlink()
        case "half a card":
            card.write_text(card.read_text()[:100])
        case "short":
            os.truncate(weights, weights.stat().st_size - 1)
        case "flipped":
            whole = bytearray(weights.read_bytes())
            whole[-9] ^= 4
            weights.write_bytes(whole)
        case "missing":
            (folder / "tokenizer.json").unlink()
    assert not is_whole(folder)


def test_a_damaged_checkpoint_is_made_again_and_that_is_said(
    base: Model, fp8: Checkpoint, tmp_path: Path, log: Path
) -> None:
    spoiled = QuantizationConfig(cache=str(tmp_path))
    folder = Path(shutil.copytree(fp8.path, tmp_path / fp8.key))
    os.truncate(folder / "model.safetensors", 1000)
    told: list[str] = []
    made = make(base, Scheme.fp8, spoiled, log, told)
    assert not made.cached and Path(made.path) == folder and is_whole(folder)
    assert any("damaged" in line for line in told)


# ---- the cache in an object store ----


def test_a_checkpoint_in_an_object_store_serves_every_machine(
    base: Model, fp8: Checkpoint, s3: S3, tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    config = QuantizationConfig(cache=f"{s3.make_bucket('checkpoints')}/{uuid.uuid4().hex}")
    place = f"{config.cache}/{fp8.key}"

    def on_machine(name: str, told: list[str] | None = None) -> Checkpoint:
        monkeypatch.setenv("BATCHQ_CACHE", str(tmp_path / name))
        return make(base, Scheme.fp8, config, log, told)

    first = on_machine("first")
    assert not first.cached and is_whole(Path(first.path))
    assert on_machine("first").cached
    second = on_machine("second")
    assert second.cached and second.path != first.path and second.bytes == first.bytes
    assert (Path(second.path) / "batchq.json").read_bytes() == (Path(first.path) / "batchq.json").read_bytes()

    # a replica on another node fetches it, without the model it was made of; one that shares the disk doesn't
    monkeypatch.setenv("BATCHQ_CACHE", str(tmp_path / "node"))
    elsewhere = ModelConfig(path="/on/the/driver")
    brought = Path(bring("/on/the/driver/checkpoint", Origin(elsewhere, config.cache, fp8.key)))
    assert is_whole(brought) and brought.is_relative_to(tmp_path / "node")
    assert bring(first.path, Origin(elsewhere, config.cache, fp8.key)) == first.path
    with pytest.raises(ModelError, match=r"isn't on this node .*quantization\.cache=/on/the/driver is a folder"):
        bring("/on/the/driver/checkpoint", Origin(elsewhere, "/on/the/driver", fp8.key))
    with pytest.raises(ModelError, match="no such folder"):
        bring("/on/the/driver/model", Origin(elsewhere, config.cache))

    # a build that was never committed is nobody's; a committed one with a lost file is made again and replaces it
    build = json.loads(storage.read(f"{place}/batchq.json"))["build"]
    storage.put(f"{place}/other/model.safetensors", b"half")
    assert on_machine("third").cached
    storage.delete(f"{place}/{build}/model.safetensors")
    told: list[str] = []
    assert not on_machine("fourth", told).cached
    assert any("damaged" in line for line in told)
    assert on_machine("fifth").cached


def test_the_build_that_was_committed_first_is_served_by_all(
    fp8: Checkpoint, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    cache, key = f"{s3.make_bucket('checkpoints')}/{uuid.uuid4().hex}", "k"

    def build(note: str, meanwhile: str | None = None) -> tuple[Path, bool]:
        def fill(folder: Path) -> None:
            if meanwhile:  # while this machine is at work, another one commits
                monkeypatch.setenv("BATCHQ_CACHE", str(tmp_path / meanwhile))
                build(meanwhile)
                monkeypatch.setenv("BATCHQ_CACHE", str(tmp_path / note))
            shutil.copytree(fp8.path, folder, dirs_exist_ok=True)
            card = json.loads((folder / "batchq.json").read_text())
            (folder / "batchq.json").write_text(json.dumps({**card, "note": note}))

        monkeypatch.setenv("BATCHQ_CACHE", str(tmp_path / note))
        return checkpoint._in_store(cache, key, fill, print)

    folder, _ = build("slow", meanwhile="quick")
    assert folder.is_relative_to(tmp_path / "slow")
    assert json.loads((folder / "batchq.json").read_text())["note"] == "quick"
    builds = {found.uri.split(f"/{key}/")[1].split("/")[0] for found in storage.list_objects(f"{cache}/{key}")}
    assert len(builds) == 2  # the card and the one build that it names


# ---- what goes wrong ----


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_an_interpreter_that_will_not_do(tmp_path: Path, base: Model, log: Path) -> None:
    bare = script(tmp_path / "bare", f'exec "{sys.executable}" -S "$@"')  # without site-packages
    silent = script(tmp_path / "silent", "exit 0")
    for python, words in {
        str(tmp_path / "absent"): "no such interpreter",
        str(tmp_path): "no such interpreter",
        bare: "pip install llmcompressor",
        silent: "not a Python interpreter",
    }.items():
        with pytest.raises(ConfigError, match=words) as refused:
            make(base, Scheme.fp8, QuantizationConfig(python=python, cache=str(tmp_path / "cache")), log)
        assert f"quantization.python={python}" in str(refused.value) and "\n" not in str(refused.value)


def test_a_failure_is_one_line_and_the_log_has_the_rest(tiny: Path, tmp_path: Path, log: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "odd"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
    odd = resolve(ModelConfig(path=str(folder)))
    cache = tmp_path / "cache"
    with pytest.raises(QuantizeError, match="unheard_of") as failed:
        make(odd, Scheme.fp8, QuantizationConfig(cache=str(cache)), log)
    assert str(log) in str(failed.value) and "\n" not in str(failed.value)
    assert "Traceback" in log.read_text()
    assert not [path for path in cache.rglob("*") if path.name != BUILDING and path.suffix != ".lock"]


def test_a_killed_process_is_said_and_leaves_nothing(base: Model, tmp_path: Path, log: Path) -> None:
    killed = script(tmp_path / "killed", f'[ "$1" = -c ] && exec "{sys.executable}" "$@"\nkill -9 $$')
    config = QuantizationConfig(cache=str(tmp_path / "cache"), python=killed)
    with pytest.raises(QuantizeError, match="killed by signal 9"):
        make(base, Scheme.int8, config, log)
    assert not list((tmp_path / "cache").rglob("*.json"))


DRIVER = """
import sys
from pathlib import Path
from batchq.config import ModelConfig, QuantizationConfig, Scheme
from batchq.model.source import resolve
from batchq.quantize.checkpoint import make_checkpoint
base, out = resolve(ModelConfig(path=sys.argv[1])), Path(sys.argv[2])
config = QuantizationConfig(cache=str(out), python=sys.argv[3])
made = make_checkpoint(base, Scheme.fp8, config, list, out / "log", lambda text: print(text, flush=True))
print(made.path, "found" if made.cached else "made")
"""


def driver(base: Model, cache: Path, python: str = sys.executable) -> subprocess.Popen[str]:
    """A process that wants the model in FP8 and prints each step, then where it is."""
    command = [sys.executable, "-c", DRIVER, base.path, str(cache), python]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_llm_compressor_ends_with_its_driver(base: Model, tmp_path: Path) -> None:
    """A driver that is killed outright can't clean up; the process it started must not go on for hours."""
    pid = tmp_path / "pid"
    python = script(tmp_path / "python", f'[ "$1" = -c ] || echo $$ > "{pid}"\nexec "{sys.executable}" "$@"')
    with driver(base, tmp_path / "cache", python) as process:
        assert process.stdout
        assert any("loading llm-compressor" in line for line in process.stdout)
        child = os.pidfd_open(int(pid.read_text()))
        process.send_signal(signal.SIGKILL)
    assert select.select([child], [], [], 30)[0], "still running"
    os.close(child)


def test_two_at_once_build_once_after_kills_at_every_step(base: Model, tmp_path: Path) -> None:
    """Whatever a killed driver left is not taken for a checkpoint, and does not stand in anybody's way."""
    cache = tmp_path / "cache"
    for step in ("quantizing", "loading llm-compressor", "loading the model", "saving"):
        with driver(base, cache) as process:
            assert process.stdout
            assert any(step in line for line in process.stdout)
            process.send_signal(signal.SIGKILL)
        assert not [card for card in cache.glob("*/batchq.json") if is_whole(card.parent)]
    said = [process.communicate()[0] for process in [driver(base, cache), driver(base, cache)]]
    (one, how), (other, how_else) = (text.splitlines()[-1].split() for text in said)
    assert one == other and is_whole(Path(one))
    assert {how, how_else} == {"made", "found"}
    assert [p.parent for p in cache.rglob("*.safetensors")] == [Path(one)], "nothing of the killed is left"


def test_int8_without_prompts_is_refused(base: Model, tmp_path: Path, log: Path) -> None:
    config = QuantizationConfig(cache=str(tmp_path))
    nothing: list[list[list[int]]] = [[], [[], []]]
    for none in nothing:
        with pytest.raises(ConfigError, match="prompts to calibrate on"):
            make_checkpoint(base, Scheme.int8, config, partial(list[list[int]], none), log, print)
