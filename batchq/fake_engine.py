"""The Engine protocol without a model: deterministic answers, and faults that a test can order.

Options (all off by default): `latency_s` a request; `tokens_per_s` for a whole engine;
`refuse_token` refuses the row whose prompt holds this id; `nan_token` scores it NaN;
`exit_after` kills the process, `die_after` raises EngineError, after that many answers; with
`once`, a path, a fault strikes only while that file doesn't exist, and makes it.
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

from batchq.engine import Completion, EngineSpec, Sampling
from batchq.errors import EngineError, RowError

OPTIONS = ("latency_s", "tokens_per_s", "refuse_token", "nan_token", "exit_after", "die_after", "once")


class FakeEngine:
    def __init__(self, spec: EngineSpec) -> None:
        unknown = sorted(set(spec.options) - set(OPTIONS))
        if unknown:
            raise EngineError(f"engine.options.{unknown[0]}: the fake engine knows {', '.join(OPTIONS)}")
        self.options: dict[str, Any] = dict(spec.options)
        self.answered = 0
        self._free_at = 0.0  # when the engine has worked off what it was given, on the loop's clock

    async def start(self) -> dict[str, float]:
        return {"load": 0.0, "compile": 0.0}

    async def ask(self, prompt: list[int], sampling: Sampling) -> Completion:
        option = self.options.get
        if (token := option("refuse_token")) is not None and token in prompt:
            raise RowError("engine_refused", "the engine refused this prompt")
        loop = asyncio.get_running_loop()
        if rate := option("tokens_per_s"):
            self._free_at = max(self._free_at, loop.time()) + len(prompt) / float(rate)
            await asyncio.sleep(self._free_at - loop.time())
        if latency := option("latency_s"):
            await asyncio.sleep(float(latency))
        self.answered += 1
        self._strike()
        seed = zlib.crc32(np.asarray(prompt, dtype=np.int32).tobytes())
        if sampling.score_ids:
            weights = [1 + (seed >> (3 * i)) % 97 for i in range(len(sampling.score_ids))]
            scores = [math.log(0.9 * w / sum(weights)) for w in weights]
            if (token := option("nan_token")) is not None and token in prompt:
                scores[0] = math.nan
            return Completion(tuple(scores), "", "length", len(prompt), 0, 1)
        ids = tuple(prompt[-min(3, sampling.max_tokens) :])
        known = -0.5 * len(prompt) if sampling.score_prompt else None
        return Completion((), f"answer {seed:08x}", "stop", len(prompt), 0, len(ids), ids, known)

    def _strike(self) -> None:
        """Carry out the fault that is due, if any."""
        kill = self.options.get("exit_after")
        die = self.options.get("die_after")
        if not (kill is not None and self.answered > int(kill)) and not (die is not None and self.answered > int(die)):
            return
        if flag := self.options.get("once"):
            try:
                Path(flag).touch(exist_ok=False)
            except FileExistsError:
                return
        if kill is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        raise EngineError("the fake engine died, as ordered")

    async def close(self) -> None:
        return None
