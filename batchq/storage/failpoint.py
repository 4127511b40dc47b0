"""Places where a proof can make this process die, fail or freeze: `reach("write.commit.after_put")` at a step's name.

    BATCHQ_FAILPOINT=write.commit.after_put=kill        SIGKILL at the first time it is reached
    BATCHQ_FAILPOINT=storage.create.linked@3=raise      StorageError at the third time
    BATCHQ_FAILPOINT=write.spill.before_put=stop        SIGSTOP: frozen until somebody continues it

Several are separated by commas; each strikes once. Unset, a reached point costs one look into an empty dict; none
is in a place that is reached for every row.
"""

from __future__ import annotations

import os
import signal

from batchq.errors import ConfigError, StorageError

ACTIONS = ("kill", "raise", "stop")

_armed: dict[str, tuple[int, str]] = {}  # name -> (how often it has yet to be reached, what then)


def reach(name: str) -> None:
    """This process is at this step. Raises StorageError, or doesn't return, if a fault was ordered here."""
    if name in _armed:
        _strike(name)


def arm(orders: str) -> None:
    """Replace all orders by these, in the words of BATCHQ_FAILPOINT. Raises ConfigError."""
    _armed.clear()
    for order in filter(None, orders.split(",")):
        place, _, action = order.partition("=")
        name, _, number = place.partition("@")
        if action not in ACTIONS or not (number or "1").isdecimal():
            raise ConfigError(f"BATCHQ_FAILPOINT={order}: say NAME=ACTION or NAME@TIMES=ACTION; {', '.join(ACTIONS)}")
        _armed[name] = (int(number or 1), action)


def armed() -> list[str]:
    """Names of the steps at which a fault was ordered that hasn't struck."""
    return list(_armed)


def _strike(name: str) -> None:
    left, action = _armed[name]
    if left > 1:
        _armed[name] = (left - 1, action)
        return
    del _armed[name]
    if action == "raise":
        raise StorageError(f"{name}: failed, as BATCHQ_FAILPOINT ordered")
    os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)


arm(os.environ.get("BATCHQ_FAILPOINT", ""))
