"""The Engine protocol without a model: deterministic answers, and faults that a test can order.

Options (all off by default): `latency_s`, seconds per request; `tokens_per_s` of a whole engine, one number or
one for each max_num_batched_tokens (an engine doesn't start with one that has none);
`cut_every`, how many answers there are for each that is cut off;
`refuse_token` refuses the row whose prompt holds this id; `nan_token` scores it NaN.

Deaths: `exit_...` kills the process, `die_...` raises EngineError, `hang_...` never answers again;
`..._after` after that many answers, `..._token` at a row whose prompt holds this id. `oom_above`
raises EngineOutOfMemory, `exit_above` kills, when more rows than that are in flight. With `once`, a
path, a fault strikes only while that file doesn't exist, and makes it. `asked`, a path, gets a line
for every row that is asked.
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from batchq.engine.protocol import Completion, EngineSpec, Prompt, Sampling
from batchq.errors import EngineError, EngineOutOfMemory, RowError

FAULTS = tuple(f"{fault}_{when}" for fault in ("exit", "die", "hang") for when in ("after", "token"))
RARE = (*FAULTS, "oom_above", "exit_above", "asked")
OPTIONS = ("latency_s", "tokens_per_s", "cut_every", "refuse_token", "nan_token", "once", *RARE)


class FakeEngine:
    """The Engine protocol without a model. Raises EngineError for an option that it doesn't know."""

    def __init__(self, spec: EngineSpec) -> None:
        unknown = sorted(set(spec.options) - set(OPTIONS))
        if unknown:
            raise EngineError(f"engine.options.{unknown[0]}: the fake engine knows {', '.join(OPTIONS)}")
        self.options: dict[str, Any] = dict(spec.options)
        self.faulty = any(name in self.options for name in RARE)
        rate = self.options.get("tokens_per_s")
        self.rate = (
            {str(k): v for k, v in rate.items()}.get(str(spec.max_num_batched_tokens))
            if isinstance(rate, dict)
            else rate
        )
        self.answered = 0
        self.under_way = 0
        self.dead = False
        self._free_at = 0.0  # when the engine has worked off what it was given, on the loop's clock

    async def start(self) -> dict[str, float]:
        if isinstance(self.options.get("tokens_per_s"), dict) and not self.rate:
            raise EngineError("the fake engine doesn't start with so many tokens per step, as ordered")
        return {"load": 0.0, "compile": 0.0}

    async def ask(self, prompt: Prompt, sampling: Sampling) -> Completion:
        if self.faulty:
            await self._strike(prompt)
        option = self.options.get
        if (token := option("refuse_token")) is not None and token in prompt.token_ids:
            raise RowError("engine_refused", "the engine refused this prompt")
        loop = asyncio.get_running_loop()
        if self.rate:
            self._free_at = max(self._free_at, loop.time()) + len(prompt) / float(self.rate)
            await asyncio.sleep(self._free_at - loop.time())
        if latency := option("latency_s"):
            await asyncio.sleep(float(latency))
        if self.dead:
            raise EngineError("the fake engine is dead, as ordered")
        self.answered += 1
        seed = zlib.crc32(np.asarray(prompt.token_ids, dtype=np.int32).tobytes())
        if sampling.temperature and prompt.seed is not None:
            seed = zlib.crc32(str(prompt.seed).encode(), seed)
        if sampling.score_ids:
            weights = [1 + (seed >> (3 * i)) % 97 for i in range(len(sampling.score_ids))]
            scores = [math.log(0.9 * w / sum(weights)) for w in weights]
            if (token := option("nan_token")) is not None and token in prompt.token_ids:
                scores[0] = math.nan
            return Completion(tuple(scores), "", "length", len(prompt), 0, 1)
        ids = tuple(prompt.token_ids[-min(3, sampling.max_tokens) :])
        known = -0.5 * len(prompt) if sampling.score_prompt else None
        ended = "length" if (every := option("cut_every")) and self.answered % int(every) == 0 else "stop"
        return Completion((), f"answer {seed:08x}", ended, len(prompt), 0, len(ids), ids, known)

    async def _strike(self, prompt: Prompt) -> None:
        """Note the row, and carry out the fault that is due, if any."""
        if path := self.options.get("asked"):
            with open(path, "a") as file:
                file.write(f"{zlib.crc32(np.asarray(prompt.token_ids, dtype=np.int32).tobytes()):08x}\n")
        self.under_way += 1
        try:
            await asyncio.sleep(
                float(self.options.get("latency_s", 0))
            )  # whoever asks at once is in flight with this one
            await self._strike_now(prompt)
        finally:
            self.under_way -= 1

    async def _strike_now(self, prompt: Prompt) -> None:
        fault = "die" if self.dead else self._due(prompt)
        if fault is None:
            return
        if (flag := self.options.get("once")) and not self.dead:
            try:
                Path(flag).touch(exist_ok=False)
            except FileExistsError:
                return
        if fault == "exit":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "hang":
            await asyncio.Event().wait()
        self.dead = True
        if fault == "oom":
            raise EngineOutOfMemory("the fake engine is out of memory, as ordered")
        raise EngineError("the fake engine died, as ordered")

    def _due(self, prompt: Prompt) -> str | None:
        for name in FAULTS:
            fault, _, when = name.partition("_")
            if (order := self.options.get(name)) is not None and (
                order in prompt.token_ids if when == "token" else self.answered >= int(order)
            ):
                return fault
        for fault in ("oom", "exit"):
            if (most := self.options.get(f"{fault}_above")) is not None and self.under_way > int(most):
                return fault
        return None

    async def close(self) -> None:
        return None
