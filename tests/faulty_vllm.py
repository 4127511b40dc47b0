"""For tests only: a worker extension, so code that vLLM runs in its engine process, which a row can kill.

engine.options.worker_extension_cls=tests.faulty_vllm.Faulty, with the row's token id in BATCHQ_TEST_KILL_TOKEN
"""

from __future__ import annotations

import os
import signal
from typing import Any

from vllm.v1.worker.gpu_worker import Worker

from batchq.engine.vllm_process import Extension

_execute = Worker.execute_model


def _execute_or_die(self: Any, scheduled: Any, *more: Any, **named: Any) -> Any:
    token = int(os.environ["BATCHQ_TEST_KILL_TOKEN"])
    if any(token in request.prompt_token_ids for request in scheduled.scheduled_new_reqs):
        os.kill(os.getpid(), signal.SIGKILL)
    return _execute(self, scheduled, *more, **named)


_worker: Any = Worker
_worker.execute_model = _execute_or_die


class Faulty(Extension):
    """As the real one."""
