"""Events as POSTs to one URL, by a thread of their own: the run neither waits for them nor fails by them."""

from __future__ import annotations

import http.client
import random
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

TIMEOUT_SECONDS = 5.0  # of a connection, and of each read from it
PAUSES = (0.5, 2.0)  # seconds before the second attempt and the third, the last; each time half of it to all, by chance
CLOSE_SECONDS = 5.0  # what isn't delivered yet is given at the end
WAITING = 256  # events at most; one more goes undelivered
AGAIN = (408, 425, 429)  # answers below 500 that another attempt may change


class _Refused(Exception):
    """Not delivered; `final` if another attempt would come to the same."""

    def __init__(self, why: str, final: bool) -> None:
        super().__init__(why)
        self.final = final


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A POST that is sent elsewhere would arrive there as a GET, without its event."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Webhook:
    """Posts in the order of events. What can't be delivered is counted, and told once, at the end; nothing of the URL
    but its host is shown, since the rest may hold a secret."""

    def __init__(self, url: str, warn: Callable[[str], None]) -> None:
        self._url, self._warn = url, warn
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._waiting: deque[tuple[bytes, bool]] = deque()
        self._some = threading.Condition()
        self._closing = threading.Event()
        self._all = self._lost = 0
        self._why = ""
        self._thread = threading.Thread(target=self._deliver, name="batchq-webhook", daemon=True)
        self._thread.start()

    def post(self, body: bytes, passing: bool = False) -> None:
        """Hand over one event, without waiting. `passing`: the next of its kind says more, so it goes at the end."""
        with self._some:
            self._all += 1
            if len(self._waiting) == WAITING:
                self._lose("too many were waiting")
            else:
                self._waiting.append((body, passing))
                self._some.notify()

    def close(self) -> None:
        """Wait for what isn't delivered yet, CLOSE_SECONDS at most; warn if something wasn't."""
        with self._some:
            self._waiting = deque(each for each in self._waiting if not each[1])
            self._closing.set()
            self._some.notify()
        self._thread.join(CLOSE_SECONDS)
        with self._some:
            if self._thread.is_alive():
                for _ in range(len(self._waiting) + 1):  # and the one that it is at
                    self._lose(self._why or "no answer in time")
                self._waiting.clear()
            if self._lost:
                host = urlsplit(self._url).hostname
                self._warn(f"events: {self._lost} of {self._all} couldn't be delivered to {host}: {self._why}")

    def _lose(self, why: str) -> None:
        self._lost += 1
        self._why = why

    def _deliver(self) -> None:
        while True:
            with self._some:
                self._some.wait_for(lambda: self._waiting or self._closing.is_set())
                if not self._waiting:
                    return
                body, _ = self._waiting.popleft()
            if why := self._undelivered(body):
                with self._some:
                    self._lose(why)

    def _undelivered(self, body: bytes) -> str:
        """Try a few times; why it wasn't delivered, empty if it was."""
        for pause in (*PAUSES, None):
            try:
                self._send(body)
                return ""
            except _Refused as error:
                if error.final or pause is None:
                    return str(error)
            time.sleep(pause * random.uniform(0.5, 1))
        raise AssertionError("the last attempt returns")

    def _send(self, body: bytes) -> None:
        headers = {"Content-Type": "application/json", "User-Agent": "batchq"}
        request = urllib.request.Request(self._url, body, headers, method="POST")
        try:
            self._opener.open(request, timeout=TIMEOUT_SECONDS).close()
        except urllib.error.HTTPError as error:
            error.close()
            raise _Refused(f"HTTP {error.code}", error.code < 500 and error.code not in AGAIN) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise _Refused(getattr(reason, "strerror", None) or type(reason).__name__, False) from None
