"""batchq against the engine it drives: the same token ids through `LLM.generate`, same settings, same cores.

    python benchmarks/engine.py                       # 2,000 calls, three runs of each, alternating
    python benchmarks/engine.py --rows 20000 quantization=none

Both sides start a fresh engine each time, and only the time from the first request to the last answer counts. Of
batchq that is all the time after its engine was ready (reading, rendering, tokenising, committing and waiting
included; "idle" is that part of it in which no row was in flight), as its own report accounts for it; of
`LLM.generate`, the call, with every token id list made beforehand.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from batchq import cli, input
from batchq.config import Config
from batchq.engine.protocol import EngineSpec, Sampling
from batchq.job.scheme import choose_scheme
from batchq.job.served import ensure_checkpoint
from batchq.job.session import open_session
from batchq.machine import hardware
from batchq.model.source import resolve
from batchq.model.tokenizer import open_tokenizer
from batchq.plan.draft import make_plan
from batchq.sizing.settings import Weights, engine_spec
from batchq.task.task import Task

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--raw", type=Path, help=argparse.SUPPRESS)  # the other side, in a process of its own
    parser.add_argument("overrides", nargs="*", help="of the job, such as quantization=none")
    args = parser.parse_args()
    if args.raw:
        generate(args.raw)
        return
    with tempfile.TemporaryDirectory(prefix="batchq-engine-") as scratch:
        compare(Path(scratch), args.rows, args.runs, args.overrides)


def compare(work: Path, rows: int, runs: int, overrides: list[str]) -> None:
    """Run both sides in turn and print each run and the ratio of the medians."""
    corpus, output = work / "calls", work / "out"
    builder = ROOT / "jobs/sentiment_transcripts/corpus.py"
    subprocess.run([sys.executable, builder, corpus, "--rows", str(rows)], check=True)
    job = ["job=sentiment_transcripts", f"input.path={corpus}", f"output.path={output}"]
    job += ["output.rows_per_shard=512", "gate=off", *overrides]
    request = work / "request.json"
    tokens = prepare(cli.compose(job), request)
    print(f"{'run':<4} {'batchq s':>9} {'idle':>6} {'tokens/s':>9} {'raw s':>9} {'tokens/s':>9}", flush=True)
    ours: list[float] = []
    raw: list[float] = []
    for run in range(1, runs + 1):
        call([sys.executable, "-m", "batchq", *job], work / "log")
        (record,) = (json.loads(path.read_text()) for path in (output / "meta/runs").glob("*.json"))
        phases = next(r["phases"] for r in record["replicas"] if r["phases"]["infer"])
        ours.append(phases["infer"] + phases["idle"])
        shutil.rmtree(output)
        call([sys.executable, __file__, "--raw", str(request)], work / "log")
        raw.append(json.loads(request.with_suffix(".seconds").read_text()))
        print(
            f"{run:<4} {ours[-1]:>9.2f} {phases['idle']:>6.2f} {tokens / ours[-1]:>9,.0f} {raw[-1]:>9.2f} "
            f"{tokens / raw[-1]:>9,.0f}",
            flush=True,
        )
    ratio = statistics.median(raw) / statistics.median(ours)
    print(f"batchq at {ratio:.3f} of LLM.generate: medians of {runs} runs, {rows:,} rows, {tokens:,} prompt tokens")


def call(command: list[str], log: Path) -> None:
    with log.open("wb") as chatter:
        done = subprocess.run(command, cwd=ROOT, stdout=chatter, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(log.read_text(errors="replace")[-3000:])


def prepare(config: Config, request: Path) -> int:
    """Write what `generate` needs: the engine's arguments and every prompt's token ids. Returns their number."""
    model, here = resolve(config.model), hardware.detect()
    with open_session(config, "quantize") as session:
        scheme = choose_scheme(session, model).scheme
        draft = make_plan(config, model.digest, scheme, "")
        checkpoint = ensure_checkpoint(session, draft, model, scheme)
    spec = dataclasses.replace(
        engine_spec(config, Weights(checkpoint.path, checkpoint.bytes), here), cores=() if here.gpus else here.cores
    )
    task = Task(config.task, open_tokenizer(model.path), draft.columns, config.model.chat_template)
    prompts: list[list[int]] = []
    for shard in draft.shards:
        asked = task.encode([task.render(row.columns) for row in input.rows_of(draft, shard, draft.columns)])
        prompts += [prompt.token_ids for prompt in asked]
    sampling = dataclasses.asdict(task.sampling)
    request.write_text(json.dumps({"spec": dataclasses.asdict(spec), "sampling": sampling, "prompts": prompts}))
    return sum(map(len, prompts))


def generate(request: Path) -> None:
    """The raw side: one engine, one call with all prompts; writes its seconds."""
    from batchq.engine import vllm, vllm_process

    asked = json.loads(request.read_text())
    spec = EngineSpec(**{**asked["spec"], "cores": tuple(asked["spec"]["cores"])})
    sampling: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in asked["sampling"].items()}
    vllm_process.set_environment(spec)
    from vllm import LLM, EngineArgs
    from vllm.inputs import TokensPrompt

    llm = LLM(**vllm.engine_arguments(spec, EngineArgs))
    params = vllm.VllmEngine(spec).sampling_params(Sampling(**sampling))
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in asked["prompts"]]
    llm.generate(prompts[:8], params, use_tqdm=False)
    llm.reset_prefix_cache()
    began = time.perf_counter()
    answers = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - began
    assert len(answers) == len(prompts)
    request.with_suffix(".seconds").write_text(json.dumps(seconds))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
