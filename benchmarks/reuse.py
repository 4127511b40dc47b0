"""What it takes to find a former run's answers: the index of its keys, made and looked up.

    python benchmarks/reuse.py                       # 100 million keys; 8 GB of disk, twenty minutes on two cores
    python benchmarks/reuse.py --keys 1000000 --folder /tmp/former

Writes parts as an output of three labels has them, of 4,096 rows, with keys drawn at random. A process of its own
makes the index; another opens it, and looks up keys in their former order and keys of any parts, with their answers,
keys in any order without, and keys that nobody has asked. Memory is each process's peak, looked at 50 times per second:
without the pages of files that are mapped, which all processes share and the system may drop, and with them.
"""

from __future__ import annotations

import argparse
import binascii
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa

from batchq import storage
from batchq.config import TaskConfig
from batchq.output import layout, parts
from batchq.output.schema import COUNTS
from batchq.task import answers
from batchq.worker.reuse import Reuse

TASK = TaskConfig(prompt="{{ text }}", labels=["good", "bad", "fine"])
PART = 4096  # rows
BATCH = 256  # keys looked up at a time, as a worker does
LOOKUPS, ANYWHERE = 500_000, 1024  # keys that are looked up, at most; and keys of any parts, with their answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=100_000_000)
    parser.add_argument("--folder", type=Path, help="where the output is kept for another time")
    parser.add_argument("--step", choices=("make", "look-up"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        (make if args.step == "make" else look_up)(str(args.folder), args.keys)
        return
    with tempfile.TemporaryDirectory(prefix="batchq-reuse-") as scratch:
        folder = args.folder or Path(scratch, "former")
        print(f"{args.keys:,} keys · {hardware()}", flush=True)
        began = time.monotonic()
        write(folder, args.keys)
        print(f"written    {size(folder) / 1e9:.2f} GB in {time.monotonic() - began:,.0f} s", flush=True)
        cache = Path(scratch, "cache")
        for step in ("make", "look-up"):
            command = [sys.executable, __file__, "--step", step, "--keys", str(args.keys), "--folder", str(folder)]
            subprocess.run(command, check=True, env={**os.environ, "BATCHQ_CACHE": str(cache)})
            if step == "make":
                print(f"index      {size(cache) / 1e9:.2f} GB on disk", flush=True)


def write(folder: Path, keys: int) -> None:
    """The parts of an output, one at a time, those that aren't there yet."""
    storage.put(layout.plan(str(folder)), b"{}")
    columns: dict[str, Any] = {field.name: pa.nulls(PART, field.type) for field in answers.of(TASK).fields()}
    columns["label"] = pa.array([TASK.labels[i % 3] for i in range(PART)])
    columns["label_probability"] = pa.array(np.full(PART, 0.9), columns["label_probability"].type)
    columns |= {field.name: pa.array(np.full(PART, 100), field.type) for field in COUNTS}
    for number in range(-(-keys // PART)):
        path = folder / f"data/part-{number:05d}.parquet"
        if not path.exists():
            named = {"batchq_key": pa.array(keys_of(number)), **columns}
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(parts.serialize(pa.table(named), {}))


def keys_of(number: int) -> list[str]:
    """A part's keys, the same each time; of a number that no part has, keys that nobody has asked."""
    text = binascii.hexlify(np.random.default_rng(number).bytes(16 * PART)).decode()
    return [text[at : at + 32] for at in range(0, len(text), 32)]


def make(folder: str, keys: int) -> None:
    with watched("made"):
        made = Reuse(folder, TASK)
    assert len(made) == -(-keys // PART) * PART


def look_up(folder: str, keys: int) -> None:
    count = -(-keys // PART)
    with watched("opened"):
        former = Reuse(folder, TASK)
    several = range(0, count, max(1, count * PART // LOOKUPS))
    in_order = [keys_of(number) for number in several]
    shuffled = [key for keys in in_order for key in keys]
    random = Random(0)
    random.shuffle(shuffled)
    anywhere = [random.choice(keys_of(random.randrange(count))) for _ in range(ANYWHERE)]
    unknown = [key for number in range(count, count + len(in_order)) for key in keys_of(number)]
    with watched("in order", len(in_order) * PART):
        for known in in_order:
            for at in range(0, PART, BATCH):
                assert len(former.find(known[at : at + BATCH])) == BATCH
    with watched("anywhere", ANYWHERE):
        for at in range(0, ANYWHERE, BATCH):
            assert len(former.find(anywhere[at : at + BATCH])) == len(set(anywhere[at : at + BATCH]))
    with watched("shuffled, without the answers", len(shuffled)):
        for at in range(0, len(shuffled), BATCH):
            batch = shuffled[at : at + BATCH]
            assert sum(len(hits) for _, hits, _ in former._index.find(batch)) == len(batch)
    with watched("never asked", len(unknown)):
        for at in range(0, len(unknown), BATCH):
            assert not former.find(unknown[at : at + BATCH])


@contextmanager
def watched(what: str, lookups: int = 0) -> Iterator[None]:
    """Print how long it takes, and the process's peak memory meanwhile."""
    peaks, ended = {"own": 0, "all": 0}, threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            status = Path("/proc/self/status").read_text()
            held = {name: int(kb) for name, kb in re.findall(r"(Rss\w+):\s+(\d+) kB", status)}
            peaks["own"] = max(peaks["own"], held["RssAnon"])
            peaks["all"] = max(peaks["all"], sum(held.values()))

    thread = threading.Thread(target=watch)
    thread.start()
    began = time.monotonic()
    yield
    seconds = time.monotonic() - began
    ended.set()
    thread.join()
    rate = f", {lookups / seconds:,.0f} keys/s" if lookups else ""
    memory = f"{peaks['own'] / 1000:,.0f} MB, with files {peaks['all'] / 1000:,.0f} MB"
    print(f"{what:<10} {seconds:,.1f} s{rate} · peak {memory}", flush=True)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def hardware() -> str:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores of {cpu[1] if cpu else platform.processor()}, {memory:.0f} GiB"


if __name__ == "__main__":
    main()
