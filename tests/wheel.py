"""The wheel as somebody else would use it: installed into an environment of its own, away from this checkout.

    python -m tests.wheel dist        # `make wheel-test`

A user's folder has a job, a tokenizer and some rows; the fake engine answers them. What is heavy (torch, Ray, vLLM) is
shared with the environment that runs this, by a path file, which doesn't follow the editable install there.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

from tests.helpers import LABELS, rows_of, write_jsonl
from tests.tiny import make_tiny_model

ROWS = 50
JOB = f"""# @package _global_
job: {{name: mine}}
task:
  prompt: |
    Is this {{{{ choices }}}}?
    {{{{ text }}}}
  labels: [{", ".join(LABELS)}]
model: {{path: tiny}}
quantization: {{scheme: none}}
engine: {{max_model_len: 256}}
input: {{path: rows.jsonl}}
output: {{path: out, rows_per_shard: 20}}
"""
LOOK = """
import pathlib, sys, pyarrow.parquet as pq, batchq
ours = pathlib.Path(batchq.__file__).resolve()
assert ours.is_relative_to(pathlib.Path(sys.prefix).resolve()), f"batchq is imported from {ours}"
rows = pq.read_table("out/data").to_pylist()
assert len({row["batchq_id"] for row in rows}) == len(rows) == int(sys.argv[1]), f"{len(rows)} rows"
assert all(row["label"] for row in rows), "a row has no label"
"""


def main(dist: Path) -> None:
    wheel = max(dist.glob("batchq-*.whl"), key=lambda path: path.stat().st_mtime).absolute()
    with tempfile.TemporaryDirectory(prefix="batchq-wheel-") as made:
        folder = Path(made)
        python = environment(folder / "env", wheel)
        (folder / "conf/job").mkdir(parents=True)
        (folder / "conf/job/mine.yaml").write_text(JOB)
        make_tiny_model(folder / "tiny")
        write_jsonl(folder / "rows.jsonl", rows_of(ROWS))
        said = run(folder, python, "-m", "batchq", "job=mine", "engine=fake")
        assert f"rows       {ROWS} = {ROWS} answers + 0 failures" in said, said
        run(folder, python, "-c", LOOK, str(ROWS))
    print(f"{wheel.name}: installed by itself, labelled {ROWS} of {ROWS} rows")


def environment(folder: Path, wheel: Path) -> Path:
    """A new environment with nothing of its own but the wheel; returns its interpreter."""
    venv.create(folder, with_pip=False)
    python = folder / "bin/python"
    (site,) = folder.glob("lib/python*/site-packages")
    shared = [path for path in sys.path if path.endswith("site-packages")] or [sysconfig.get_path("purelib")]
    (site / "shared.pth").write_text("\n".join(shared))
    uv = Path(sys.executable).with_name("uv")
    subprocess.run([uv, "pip", "install", "-q", "--no-deps", "--offline", "--python", python, wheel], check=True)
    return python


def run(folder: Path, *command: str | Path) -> str:
    """What a command says that ends in exit code 0, with nothing of this checkout in its environment."""
    ours = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "BATCHQ_CONF")}
    ours |= {"BATCHQ_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=ours, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"exit code {done.returncode} of {command[1:]}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


if __name__ == "__main__":
    main(Path(sys.argv[1]))
