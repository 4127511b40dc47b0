"""Every scheme on sentences that people rated: how much of the baseline's accuracy it keeps, and what it weighs.

    python benchmarks/quality.py --rows 4000 none int8 int8_rtn w4a16 w4a16_awq      # two CPU cores
    python benchmarks/quality.py none fp8 int8 int8_rtn w8a16 w4a16@32 w4a16@64      # a GPU, all rows

    python benchmarks/quality.py none fp8 fp8+torch                                  # the products' two kernels

    python benchmarks/quality.py --choose none int8              # first: which wording the model follows best

The three sets of jobs/sentiment_transcripts/corpus.py, tweets, Amazon and film reviews, together: positive or negative
by the sign of the mean rating, rows rated exactly 0 left out. Calibration prompts come from other rows of the same
sets, and so do those by which `--choose` takes the wording: the unquantized model's accuracy decides, on rows that
serve for nothing else.

Each line is printed as it is known: accuracy, recovery with its 95% interval (paired bootstrap), the share of labels
that stay, mean KL of the distributions, bytes of the weights, prompt tokens/s of this engine while it answered, seconds
to quantize and to start. `@32` sets the group size of a 4-bit scheme; `fp8+torch` is FP8 with vLLM's linear_backend of
that name, by which batchq's cuBLAS products are meant.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

from batchq import cli
from batchq.config import Config, GateConfig, Scheme, TaskConfig
from batchq.engine.protocol import Completion
from batchq.errors import BatchqError
from batchq.machine import hardware
from batchq.model.source import Model, resolve
from batchq.model.tensors import read_tensors, stored_bytes
from batchq.model.tokenizer import open_tokenizer
from batchq.plan.sample import Sample
from batchq.pool import Pool, SampleListener, SampleRequest
from batchq.quantize import verdict
from batchq.quantize.checkpoint import Checkpoint, make_checkpoint
from batchq.sizing import settings
from batchq.sizing.fit import Fit
from batchq.sizing.settings import Weights
from batchq.task.task import Task
from jobs.sentiment_transcripts.corpus import rated_sentences

# Invented, not from the sets.
SHOTS = (
    ("I loved every minute of it and would buy it again.", "positive"),
    ("The battery died after two days and nobody answered my mails.", "negative"),
    ("Not bad at all, it does what it says.", "positive"),
    ("A dull plot and wooden acting.", "negative"),
    ("lol best day ever", "positive"),
    ("so tired of this rain :(", "negative"),
)
BRIEF = "You are a sentiment classifier. Your answers are one word long: positive or negative."
HELPFUL = "You are a helpful assistant."


def shown(first: str, second: str, count: int) -> str:
    """Examples, then the row, in the same form."""
    examples = [f"{first} {text}\n{second} {label}" for text, label in SHOTS[:count]]
    return "\n\n".join([*examples, f"{first} {{{{ text }}}}\n{second}"])


# (system message, prompt, beginning of the answer)
ASKED = {
    "somebody wrote": (BRIEF, "Somebody wrote:\n\n{{ text }}\n\nThe sentiment of the writer, in one word:"),
    "is this": (BRIEF, "{{ text }}\n\nIs the sentiment of this text positive or negative?"),
    "classify": ("", "Classify the sentiment of this text as positive or negative.\n\n{{ text }}"),
    "in the system": ("Classify the sentiment of what the user says as positive or negative.", "{{ text }}"),
    "helpful": (HELPFUL, "Is this review positive or negative?\n\n{{ text }}"),
    "feeling": ("", "{{ text }}\n\nHow does the writer feel, positive or negative?"),
    "quoted": ("", 'Someone said: "{{ text }}"\n\nIs this a positive or a negative statement?'),
    "2 examples": (BRIEF, shown("Text:", "Sentiment:", 2)),
    "4 examples": (BRIEF, shown("Text:", "Sentiment:", 4)),
    "6 examples": (BRIEF, shown("Text:", "Sentiment:", 6)),
    "6 examples, bare": ("", "Positive or negative?\n\n" + shown("Text:", "Sentiment:", 6)),
}
PREFIXES = ("", "Sentiment:", "The sentiment is", "The sentiment of this text is", "Overall, this is", "It is")
PROMPTS = [(*wording, prefix) for wording in ASKED.values() for prefix in PREFIXES]
# By --choose on one H200, 2026-11-24: right on 0.796 of 1,000 rows, "somebody wrote" without a prefix on 0.704.
CHOSEN = (*ASKED["in the system"], "Sentiment:")
TUNING = 1000  # rows that only the wording is chosen by
COLUMNS = (
    "scheme",
    "accuracy",
    "macro F1",
    "recovery",
    "95% interval",
    "agree",
    "KL",
    "MB",
    "tok/s",
    "quantize",
    "load",
)
WIDTHS = (13, 8, 8, 8, 16, 7, 7, 7, 8, 8, 6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("schemes", nargs="+", help="of batchq/model/scheme.py, `none` first")
    parser.add_argument("--rows", type=int, help="to judge by; all but the calibration rows if not given")
    parser.add_argument("--samples", type=int, default=128, help="calibration prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="models quantized at a time")
    parser.add_argument("--choose", action="store_true", help=f"compare {len(PROMPTS)} wordings first")
    parser.add_argument("--set", action="append", default=[], help="an override of the job")
    args = parser.parse_args()
    nowhere = ["input.path=none", "output.path=none"]
    config = cli.compose(["job=sentiment_transcripts", "engine.max_model_len=512", *nowhere, *args.set])
    config.quantization.samples = args.samples
    model = resolve(config.model)
    tokenizer = open_tokenizer(model.path)
    config.task = worded(config, CHOSEN)
    if args.choose:
        config.task = choose(config, model, tokenizer, args.seed)
    task = Task(config.task, tokenizer, ["text", "gold"])
    sample, calibration = rows(task, args.rows, args.samples, args.seed)
    golds = [g == "positive" for g in sample.golds]
    print(
        f"{model.name}, {len(golds):,} rows, {sum(map(len, sample.prompts)):,} prompt tokens, {sum(golds):,} positive; "
        f"{len(calibration)} calibration prompts of {sum(map(len, calibration)):,} tokens",
        flush=True,
    )
    line(*COLUMNS)
    with (
        tempfile.TemporaryDirectory(prefix="batchq-quality-") as logs,
        Pool(config.cluster, config.engine, Path(logs)) as pool,
        ThreadPoolExecutor(args.jobs) as ahead,
    ):
        compare(config, args.schemes, sample, calibration, pool, Path(logs), ahead, model, task)


def worded(config: Config, wording: tuple[str, str, str]) -> TaskConfig:
    system, prompt, prefix = wording
    labels = ["positive", "negative"]
    return dataclasses.replace(
        config.task, system=system, prompt=prompt, answer_prefix=prefix, labels=labels, gold="gold"
    )


def choose(config: Config, model: Model, tokenizer: Any, seed: int) -> TaskConfig:
    """The wording by which the unquantized model is right most often, of all in PROMPTS; prints the ten best."""
    tuning = shuffled(seed)[-TUNING:]
    tasks = [Task(worded(config, wording), tokenizer, ["text", "gold"]) for wording in PROMPTS]
    with (
        tempfile.TemporaryDirectory(prefix="batchq-quality-") as logs,
        Pool(config.cluster, config.engine, Path(logs)) as pool,
    ):
        here = hardware.detect()
        stored = stored_bytes(read_tensors(model.path))
        spec = settings.engine_spec(config, Weights(model.path, stored), here)
        labels = sorted({i for task in tasks for i in task.sampling.score_ids})  # a prefix may change their tokens
        asked = [p for task in tasks for p in task.encode([task.render({"text": s.text}) for s in tuning])]
        sampling = dataclasses.replace(tasks[0].sampling, score_ids=tuple(labels))
        answers, _ = pool.answer_sample(
            spec,
            SampleRequest(asked, sampling, 2 * spec.max_num_seqs, log="choose.log"),
            here,
            threading.Event(),
            SampleListener(lambda _: None, print, lambda _: None, lambda _: None),
        )
    right = []
    for i, task in enumerate(tasks):
        good, bad = (labels.index(token) for token in task.sampling.score_ids)
        given = answers[i * TUNING : (i + 1) * TUNING]
        said = [isinstance(a, Completion) and a.logprobs[good] > a.logprobs[bad] for a in given]
        right.append(sum(p == (s.rating > 0) for p, s in zip(said, tuning, strict=True)))
    best = sorted(range(len(right)), key=lambda i: -right[i])
    print(f"{len(PROMPTS)} wordings, accuracy on {TUNING:,} other rows")
    for i in best[:10]:
        name = list(ASKED)[i // len(PREFIXES)]
        print(f"  {right[i] / TUNING:.3f}  {name}, answer begins with {PROMPTS[i][2]!r}", flush=True)
    return tasks[best[0]].config


def shuffled(seed: int) -> list[Any]:
    """All rated sentences but those rated exactly 0."""
    rated = [s for s in rated_sentences() if s.rating]
    Random(seed).shuffle(rated)
    return rated


def rows(task: Task, wanted: int | None, samples: int, seed: int) -> tuple[Sample, list[list[int]]]:
    """Rows to judge by, and the prompts to calibrate on, from other rows."""
    rated = shuffled(seed)[:-TUNING]
    encoded = task.encode([task.render({"text": s.text}) for s in rated])
    golds: list[str | None] = ["positive" if s.rating > 0 else "negative" for s in rated]
    stop = len(rated) if wanted is None else samples + wanted
    return Sample(encoded[samples:stop], golds[samples:stop]), [prompt.token_ids for prompt in encoded[:samples]]


def compare(
    config: Config,
    names: list[str],
    sample: Sample,
    calibration: list[list[int]],
    pool: Pool,
    logs: Path,
    ahead: ThreadPoolExecutor,
    model: Model,
    task: Task,
) -> None:
    here = hardware.detect()
    fit = Fit(model, here, config)
    made: dict[str, Future[Checkpoint]] = {}
    configs = {}
    for name in names:
        word, _, group = name.partition("+")[0].partition("@")
        scheme = Scheme(word)
        configs[name] = dataclasses.replace(
            config.quantization, scheme=scheme, group_size=int(group) if group else None
        )
        if reason := fit.unserved(scheme):
            print(f"{name:<13} not served here: {reason}", flush=True)
            continue
        made[name] = ahead.submit(
            make_checkpoint, model, scheme, configs[name], lambda: calibration, logs / f"{name}.log", lambda _: None
        )
    wait(made.values())  # an engine sizes its memory by what it finds free
    before: Any = None
    for name, future in made.items():
        try:
            checkpoint = future.result()
            spec = settings.engine_spec(config, Weights(checkpoint.path, checkpoint.bytes), here)
            if backend := name.partition("+")[2]:
                spec = dataclasses.replace(spec, options={**spec.options, "linear_backend": backend})
            answers, spent = pool.answer_sample(
                spec,
                SampleRequest(sample.prompts, task.sampling, 2 * spec.max_num_seqs, log=f"{name}.log"),
                here,
                threading.Event(),
                SampleListener(lambda _: None, print, lambda _: None, lambda _: None),
            )
        except BatchqError as error:
            log = max(logs.glob(f"{name}*.log"), key=lambda p: p.stat().st_mtime, default=None)
            tail = " | ".join(log.read_text(errors="replace").strip().splitlines()[-3:])[-600:] if log else ""
            print(f"{name:<13} failed: {error}\n  {tail}", flush=True)
            continue
        before = before or answers
        v = verdict.judge(name, sample, before, answers, config.task.labels, GateConfig())
        seconds = spent.phases
        f1 = v.macro_f1[1] if v.macro_f1 else 0.0
        line(
            name,
            f"{v.quantized:.4f}",
            f"{f1:.4f}",
            f"{v.recovery:.4f}",
            f"[{v.low:.4f}, {v.high:.4f}]",
            f"{v.agreement:.4f}",
            f"{v.kl:.5f}",
            f"{checkpoint.bytes / 1e6:.1f}",
            f"{sum(map(len, sample.prompts)) / seconds['gate']:,.0f}",
            f"{checkpoint.seconds:.0f} s",
            f"{seconds['load'] + seconds['compile']:.0f} s",
        )


def line(*cells: str) -> None:
    print(
        " ".join(f"{c:<{w}}" if i == 0 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(cells, WIDTHS, strict=True))),
        flush=True,
    )


if __name__ == "__main__":
    began = time.monotonic()
    main()
    print(f"{time.monotonic() - began:.0f} s in all")
