"""A model's own Python code: what it takes until it runs, and where it runs then."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batchq.config import TRUST, Config, ModelConfig, check
from batchq.errors import ConfigError, ModelError
from batchq.machine import hardware
from batchq.model.source import resolve
from batchq.sizing.settings import Weights, engine_spec
from tests.helpers import rows_of, write_jsonl

ROOT = Path(__file__).parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CODE = """
import os, pathlib
from transformers import PreTrainedTokenizerFast

class Mine(PreTrainedTokenizerFast):
    pass

with pathlib.Path(os.environ["RAN"]).open("a") as ran:
    ran.write(f"{os.getpid()}\\n")
"""


@pytest.fixture
def own(tmp_path: Path, tiny: Path) -> Path:
    """A model with a tokenizer of its own; each process that runs its code notes that in $RAN."""
    folder = tmp_path / "own"
    shutil.copytree(tiny, folder)
    (folder / "tokenization_mine.py").write_text(CODE)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "tokenization_mine.Mine"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


REFUSED: dict[str, tuple[list[str], str, str]] = {
    "no second yes": (["model.path=own"], "", f"set {TRUST}=own in the environment"),
    "another model": (["model.path=own"], "other", f"set {TRUST}=own in the environment"),
    "a general yes": (["model.path=own"], "true", f"set {TRUST}=own in the environment"),
    "another commit": (
        ["model.path=hf://a/b", f"model.revision={COMMIT}"],
        f"hf://a/b@{COMMIT[::-1]}",
        f"set {TRUST}=hf://a/b@{COMMIT} in the environment",
    ),
    "no commit named": (
        ["model.path=hf://a/b", f"model.revision={COMMIT}"],
        "hf://a/b",
        f"set {TRUST}=hf://a/b@{COMMIT} in the environment",
    ),
    "a branch": (["model.path=hf://a/b", "model.revision=main"], "hf://a/b@main", "needs model.revision, the commit's"),
    "not pinned": (["model.path=hf://a/b"], "hf://a/b", "needs model.revision, the commit's 40 hexadecimal digits"),
    "a bucket": (["model.path=s3://b/own"], "s3://b/own", "only for a local folder or a pinned hub model"),
    "a second model": (["model.path=own", "gate.baseline=other"], "own", "gate.baseline: not with"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_one_yes_is_not_enough(
    name: str, project: Path, compose: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides, said, expected = REFUSED[name]
    monkeypatch.setenv(TRUST, said)
    with pytest.raises(ConfigError) as refused:
        compose("model.trust_remote_code=true", *overrides)
    assert expected in str(refused.value)


def test_two_yeses_reach_the_engine(own: Path, compose: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import AsyncEngineArgs

    from batchq.engine.vllm import engine_arguments

    plain = engine_spec(compose(engine="vllm"), Weights(str(own), 0), hardware.detect())
    assert engine_arguments(plain, AsyncEngineArgs)["trust_remote_code"] is False
    monkeypatch.setenv(TRUST, str(own))
    config = compose(f"model.path={own}", "model.trust_remote_code=true", engine="vllm")
    spec = engine_spec(config, Weights(str(own), 0), hardware.detect())
    assert engine_arguments(spec, AsyncEngineArgs)["trust_remote_code"] is True
    monkeypatch.setenv(TRUST, f"hf://a/b@{COMMIT}")
    config.model = ModelConfig("hf://a/b", COMMIT, trust_remote_code=True)
    assert check(config) is config


def test_code_is_part_of_what_a_model_is(own: Path) -> None:
    trusting = ModelConfig(str(own), trust_remote_code=True)
    plain, before = resolve(ModelConfig(str(own))), resolve(trusting)
    assert (plain.trusted, before.trusted) == (False, True)
    (own / "tokenization_mine.py").write_text(CODE + "# another\n")
    assert resolve(trusting).digest != before.digest != plain.digest
    assert resolve(ModelConfig(str(own))).digest == plain.digest, "code that isn't run decides nothing"


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_from_a_third_place_is_refused(name: str, own: Path) -> None:
    settings = json.loads((own / name).read_text())
    settings["auto_map"] = {"AutoConfig": "some-one/else--configuration.Theirs"}
    (own / name).write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="its code comes from some-one/else, which isn't pinned"):
        resolve(ModelConfig(str(own), trust_remote_code=True))


def test_it_runs_where_it_is_trusted_and_nowhere_else(own: Path, project: Path) -> None:
    """In the driver, in llm-compressor's process and in the replica; the checkpoint takes it along."""
    write_jsonl(project / "rows.jsonl", rows_of(10))
    ran = project / "ran"

    def run(*overrides: str, **environment: str) -> Any:
        command = [sys.executable, "-m", "batchq", "job=mine", "engine=fake", f"model.path={own}", "gate=off"]
        kept = {k: v for k, v in os.environ.items() if k != TRUST}
        ours = {"PYTHONPATH": str(ROOT), "RAN": str(ran), "HF_MODULES_CACHE": str(project / "modules")}
        return subprocess.run(
            [*command, *overrides], capture_output=True, text=True, cwd=project, env={**kept, **ours, **environment}
        )

    untrusted = run()
    assert untrusted.returncode == 2 and "no tokenizer that can be read" in untrusted.stderr, untrusted.stderr
    assert not ran.exists()
    once = run("model.trust_remote_code=true")
    assert once.returncode == 2 and once.stderr.count("\n") == 1 and not ran.exists()
    cache = [f"quantization.cache={project / 'checkpoints'}", "quantization.scheme=w4a16", "quantization.samples=4"]
    trusted = run("model.trust_remote_code=true", "output.path=trusted", *cache, **{TRUST: str(own)})
    assert trusted.returncode == 0, trusted.stderr
    assert len(set(ran.read_text().split())) == 3
    assert len(list((project / "checkpoints").glob("*/tokenization_mine.py"))) == 1
