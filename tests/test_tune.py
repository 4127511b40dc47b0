"""tune: the fastest of the settings that were tried."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from batchq.cli import main
from batchq.config import Config
from batchq.job import tune
from batchq.machine import hardware
from tests.helpers import rows_of, write_jsonl
from tests.machines import GIB, cpu
from tests.test_settings import forgetful, job, served

__all__ = ["forgetful"]

SPEEDS = "+engine.options.tokens_per_s={2048: 5000, 4096: 25000}"  # with 8192 it doesn't start


def test_the_fastest_is_kept_used_and_forgotten(
    project: Path, forgetful: Path, compose: Callable[..., Config], tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(300))
    asked = ["job=mine", "engine=fake", SPEEDS]
    assert main(["tune", *asked, "tune.engines=3"]) == 0
    out, told = capsys.readouterr()
    assert "max_num_batched_tokens 4,096" in out and "times what is chosen without" in out
    assert told.count(" tokens/s (") == 2 and told.count("didn't run: the fake engine doesn't start") == 1
    assert not (project / "out").exists()

    assert main(["plan", *asked]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if "max_num_batched_tokens" in x)
    assert "4,096  tuned on 20" in line and "tune again" not in line
    here = hardware.detect()
    for overrides, tokens in {(): 4096, ("engine.max_num_batched_tokens=512",): 512, ("tune.use=false",): 2048}.items():
        config: Config = compose(*overrides)
        assert served(config, here).settings.engine.max_num_batched_tokens == tokens
    assert main(["run", *asked]) == 0
    assert main(["clean", *asked, "clean.cache_days=0.0000001"]) == 0
    assert "tuned settings" in capsys.readouterr().out and not list(forgetful.glob("*/*.json"))


def test_a_try_is_bounded_in_time_and_in_engines(
    project: Path, forgetful: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At 2,000 tokens/s the rows would take a minute an engine. What is chosen without trying is twice as fast."""
    write_jsonl(project / "rows.jsonl", rows_of(3000))
    slow = ["engine=fake", "+engine.options.tokens_per_s={2048: 2000, 4096: 1000}", "engine.in_flight=4"]
    assert main(["tune", "job=mine", *slow, "tune.seconds=1", "tune.engines=2"]) == 0
    out, told = capsys.readouterr()
    assert "nothing else was faster by 2%" in out and "2 engines in" in out
    asked = [int(rows.replace(",", "")) for rows in re.findall(r"\(([\d,]+) rows in", told)]
    assert len(asked) == 2 and all(0 < rows < 1000 for rows in asked)


def test_without_rows_or_engines_a_try_is_one_line(
    project: Path, forgetful: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(5))
    assert main(["tune", "job=mine", "engine=fake"]) == 2
    assert "tune: only 5 rows of this job can be asked" in capsys.readouterr().err
    write_jsonl(project / "rows.jsonl", rows_of(50))
    assert main(["tune", "job=mine", "engine=fake", "+engine.options.tokens_per_s={1: 1}"]) == 1
    assert "no engine ran" in capsys.readouterr().err
    assert not list(forgetful.glob("tune/*"))


def test_on_a_cpu_compiling_is_tried_first() -> None:
    assert tune._axes(job(), cpu(memory=64 * GIB))[0] == ("enforce_eager", [False])
