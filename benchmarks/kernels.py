"""Where the engine's time goes: its kernels by kind, while it answers the prompts of benchmarks/peers.py.

    python benchmarks/kernels.py --model weights/8b --quantization fp8 --rows 2000 --work out/peers
    python benchmarks/kernels.py --model weights/8b --rows 2000 --work out/peers        # BF16

`LLM.generate` on token ids, with batchq's limits, the engine in this process and torch's profiler around it, after a
first round that isn't profiled. `--rows` and `--work` decide the prompts as they do there; the first `--asked` of them
are asked. A kind's share is of the wall clock; on a GPU one kernel runs at a time, so what is missing of the whole is
the GPU waiting. For matrix products TFLOP/s are 2 x the parameters of the layers' matrices x the uncached tokens over
the time of their kernels alone, and the share of the GPU's dense peak that this is.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(1, str(ROOT))

from benchmarks.case import prepare  # noqa: E402
from benchmarks.clock import say  # noqa: E402

# The first that fits a kernel's name. torch.compile names a kernel after all that it fused, the product behind it
# included: what quantizes the output of a norm or of SiLU is counted there, and "quantizing" is what does only that.
KINDS = {
    "attention": r"flash|attention|attn|reshape_and_cache|mha",
    "SiLU": r"silu|sigmoid|act_and_mul",
    "norms": r"norm|rsqrt",
    "rotary embedding": r"rotary|rope|split_with_sizes",
    "quantizing": r"quant|^triton.*abs_",
    "other fused operations": r"^triton",
    "matrix products": r"gemm|nvjet|cutlass|matmul|addmm|mm\b|s16816|xmma|cublas|linear",
    "sampling": r"softmax|topk|sort|logprob|argmax|gumbel|sample|temperature|penalt",
    "copies": r"memcpy|memset|copy|index|gather|embedding",
}
PRODUCTS = "matrix products"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder, such as benchmarks/shapes.py makes, or wheel://...")
    parser.add_argument("--quantization", default="none", help="of conf/quantization")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=1000, help="of a prompt, about")
    parser.add_argument("--asked", type=int, default=256)
    parser.add_argument("--set", action="append", default=[], help="an override of the job")
    parser.add_argument("--work", type=Path, default=Path("out/peers"))
    parser.add_argument("--top", type=int, default=12, help="kernels that are shown by name")
    args = parser.parse_args()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    args.work.mkdir(parents=True, exist_ok=True)
    work, model = args.work.absolute(), args.model if "://" in args.model else str(Path(args.model).absolute())
    case = prepare(work, model, args.rows, args.tokens, args.quantization, args.set)

    import torch
    from torch.profiler import ProfilerActivity, profile
    from vllm import LLM, SamplingParams

    scores = list(case.sampling["score_ids"])
    params = SamplingParams(
        max_tokens=1, temperature=0.0, logprob_token_ids=scores, logprobs=len(scores), detokenize=False
    )
    prompts: list[Any] = [{"prompt_token_ids": row["ids"]} for row in case.asked()[: args.asked]]
    llm = LLM(model=case.model, **case.engine(limits=True))
    llm.generate(prompts, params, use_tqdm=False)
    llm.reset_prefix_cache()
    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
        began = time.perf_counter()
        answers = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began

    tokens = sum(len(a.prompt_token_ids or ()) - (a.num_cached_tokens or 0) for a in answers)
    times = {
        event.key: ((event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6, event.count)
        for event in seen.key_averages()
    }
    say(f"{case.name}: {len(answers)} prompts, {tokens:,} uncached tokens in {seconds:.2f} s under the profiler")
    show(times, seconds, case.flop_per_token * tokens, case.peak, args.top)


def show(times: dict[str, tuple[float, int]], seconds: float, flop: float, peak: float | None, top: int) -> None:
    """`times`: seconds and calls by kernel; `flop` of the layers' products; `peak` a second."""
    kinds = by_kind(times)
    for kind, spent in sorted(kinds.items(), key=lambda found: -found[1]):
        rate = ""
        if kind == PRODUCTS and spent:
            rate = f"  {flop / spent / 1e12:,.0f} TFLOP/s" + (
                f", {flop / spent / peak:.1%} of the peak" if peak else ""
            )
        print(f"{kind:<30}{spent:>8.3f} s{spent / seconds:>8.1%}{rate}")
    idle = seconds - sum(kinds.values())
    print(f"{'nothing runs':<30}{idle:>8.3f} s{idle / seconds:>8.1%}")
    if peak:
        print(f"{'the whole':<30}{seconds:>8.3f} s{'':>8}  {flop / seconds / peak:.1%} of the peak")
    print()
    for name, (spent, calls) in sorted(times.items(), key=lambda found: -found[1][0])[:top]:
        print(f"{spent:>8.3f} s {calls:>7,} x  {kind_of(name):<30} {name[:110]}")


def by_kind(times: dict[str, tuple[float, int]]) -> dict[str, float]:
    """Seconds by kind, of seconds and calls by kernel."""
    kinds: dict[str, float] = defaultdict(float)
    for name, (spent, _) in times.items():
        kinds[kind_of(name)] += spent
    return kinds


def kind_of(kernel: str) -> str:
    return next((kind for kind, words in KINDS.items() if re.search(words, kernel, re.IGNORECASE)), "other")


if __name__ == "__main__":
    main()
