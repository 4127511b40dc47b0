"""Metrics: while a run labels, and what outlives it: a file for node exporter, a push, and neither at its expense."""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from batchq.account import ledger
from batchq.account.events import Kind
from batchq.account.usage import ReplicaAccount
from batchq.cli import main
from batchq.config import Config, MetricsConfig
from batchq.config.metrics import check_metrics
from batchq.errors import ConfigError, StorageError
from batchq.job import session
from batchq.job.session import open_session
from batchq.telemetry import delivery, metrics
from batchq.telemetry.metrics import LAST, LIVE, Sample, exposition
from tests.helpers import rows_of, write_jsonl
from tests.jobs import OneWorker
from tests.receiver import receiver

ROOT = Path(__file__).parent.parent
PRICED = "pricing.per_hour.cpu_core=36"
LINE = re.compile(r'(\w+)\{(\w+="[^"]*"(?:,\w+="[^"]*")*)\} (\S+)')


class Watched(OneWorker):
    """Keeps what would be exported."""

    seen: list[list[Sample]]

    def export(self, job: str, samples: Iterable[Sample]) -> None:
        type(self).seen.append(list(samples))


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watched, "seen", [], raising=False)
    monkeypatch.setattr(session, "Pool", Watched)
    monkeypatch.delenv("BATCHQ_PUSHGATEWAY", raising=False)


def run(*overrides: str) -> int:
    return main(["job=mine", "engine=fake", PRICED, *overrides])


def values(text: str) -> dict[tuple[str, str], float]:
    """By name and labels."""
    found = {(m[1], m[2]): float(m[3]) for m in LINE.finditer(text)}
    assert len(found) == sum(not line.startswith("#") for line in text.splitlines())
    return found


def test_a_run_tells_how_far_it_is(project: Path) -> None:
    blank = [{"id": 100 + i, "text": "", "gold": None} for i in range(3)]
    write_jsonl(project / "rows.jsonl", [*rows_of(57), *blank])
    assert run("output.max_error_rate=1", "pricing.budget=1000") == 0
    first, *_, last = Watched.seen
    got = {(s.metric.name, *s.labels.values()): s.value for s in last}
    assert (got["batchq_rows_total", "answer"], got["batchq_rows_total", "failure"]) == (57, 3)
    assert got["batchq_failures_total", "empty"] == 3
    assert got["batchq_shards",] == got["batchq_committed_shards",] == len(Watched.seen) == 3
    assert got["batchq_progress_ratio",] == 1
    assert got["batchq_cost_total", "USD"] == pytest.approx(
        sum(v for k, v in got.items() if k[0] == "batchq_replica_seconds_total") / 100
    )
    assert got["batchq_tokens_total", "prompt_computed"] > 0 < got["batchq_tokens_total", "output"]
    told = {s.metric for samples in Watched.seen for s in samples}
    assert told | {metrics.ETA, metrics.SLACK} == set(LIVE), "a metric that no run tells"
    for sample in (sample for samples in Watched.seen for sample in samples):
        assert tuple(sample.labels) == sample.metric.labels
    assert {s.metric: s.value for s in first}[metrics.COMMITTED] == 1


def test_what_outlives_a_run_is_written_and_the_last_success_stays(project: Path) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(40))
    folder = project / "collector"
    folder.mkdir()
    before = time.time()
    assert run(f"metrics.textfile={folder}") == 0
    (file,) = folder.iterdir()
    assert file.name == "batchq_mine.prom" and file.stat().st_mode & 0o777 == 0o644
    good = values(file.read_text())
    job = 'job_name="mine"'
    assert before <= good["batchq_last_success_timestamp_seconds", job] <= time.time()
    assert good["batchq_last_exit_code", job] == 0 and good["batchq_last_rows", job] == 40
    assert good["batchq_last_cost", f'{job},currency="USD"'] > 0
    (record,) = ledger.read_runs(str(project / "out"))
    tokens = sum(value for (name, _), value in good.items() if name == "batchq_last_tokens")
    assert tokens == sum(replica.counters.tokens for replica in record.replicas)
    assert {name for name, _ in good} | {metrics.RECOVERY.name} == {metric.name for metric in LAST}

    assert run(f"metrics.textfile={folder}", "output.path=other", "pricing.budget=1e-9") == 6
    (file,) = folder.iterdir()
    bad = values(file.read_text())
    assert bad["batchq_last_exit_code", job] == 6
    for kept in ("batchq_last_success_timestamp_seconds",):
        assert bad[kept, job] == good[kept, job]
    assert bad["batchq_last_end_timestamp_seconds", job] > good["batchq_last_end_timestamp_seconds", job]


def test_what_the_gate_measured_stays_until_it_measures_again(project: Path, compose: Callable[..., Config]) -> None:
    folder = project / "collector"
    folder.mkdir()
    config = compose(f"metrics.textfile={folder}")
    for judged in (True, False):
        with open_session(config, "run") as opened:
            if judged:
                opened.events.emit(Kind.gated, scheme="fp8", recovery=0.993)
            opened.events.emit(Kind.failed, exit_code=1)
        told = values((folder / "batchq_mine.prom").read_text())
        assert told["batchq_last_gate_recovery_ratio", 'job_name="mine",scheme="fp8"'] == 0.993
        assert told["batchq_last_exit_code", 'job_name="mine"'] == 1


def test_a_run_whose_store_takes_no_record_tells_its_end_all_the_same(
    project: Path, compose: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    """As with a key that was revoked while it labelled: the metrics don't lie in that store."""
    (folder := project / "collector").mkdir()
    (project / "out/meta").mkdir(parents=True)
    (project / "out/meta/runs").touch()  # no folder, so no record can lie in it
    with (
        pytest.raises(StorageError, match="revoked"),
        open_session(compose(f"metrics.textfile={folder}"), "run") as opened,
    ):
        opened.invocation.add(ReplicaAccount("cpu_core", 2, {"infer": 10.0}))
        raise StorageError("the key was revoked")
    assert "how this run ended isn't on record: " in capsys.readouterr().err
    assert values((folder / "batchq_mine.prom").read_text())["batchq_last_exit_code", 'job_name="mine"'] == 1


def test_a_job_has_a_file_of_its_own() -> None:
    names = {delivery.file_name(job) for job in ("a/b", "a_b", "a b", "a.b", "../etc")}
    assert len(names) == 5 and all(re.fullmatch(r"batchq_[\w.-]+\.prom", name) for name in names)


def test_labels_are_escaped() -> None:
    text = exposition([Sample(metrics.COST, 1, {"currency": 'a"b\\c\nd'})], "j")
    assert text.splitlines()[-1] == 'batchq_cost_total{job_name="j",currency="a\\"b\\\\c\\nd"} 1.0'


def test_every_metric_has_a_name_by_prometheus_rules() -> None:
    for metric in (*LIVE, *LAST):
        assert re.fullmatch(r"batchq_[a-z]+(_[a-z]+)*", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert metric.words.endswith(".") and "job_name" not in metric.labels
    assert len({metric.name for metric in (*LIVE, *LAST)}) == len((*LIVE, *LAST))


def test_the_page_has_every_metric() -> None:
    lines = re.findall(r"^\| `(batchq_\w+)` \| (\w+) \|(.*)\| (.*) \|$", (ROOT / "docs/metrics.md").read_text(), re.M)
    ours = [(m.name, m.kind, ", ".join(f"`{label}`" for label in m.labels), m.words) for m in (*LIVE, *LAST)]
    assert [(name, kind, labels.strip(), words) for name, kind, labels, words in lines] == ours


# ---- a Pushgateway ----


def test_a_push_goes_to_the_jobs_group_with_the_password_of_the_environment(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(20))
    with receiver() as server:
        monkeypatch.setenv("BATCHQ_PUSHGATEWAY", f"http://me:canary%2F@{server.address}/base/")
        assert run("job.name=a/b") == 0
    (post,) = server.got
    assert post.path == "/base/metrics/job/batchq/job_name@base64/YS9i"
    assert post.authorization == "Basic " + base64.b64encode(b"me:canary/").decode()
    assert values(post.body.decode())["batchq_last_rows", 'job_name="a/b"'] == 20
    assert "canary" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder, url: [f"metrics.textfile={folder}"], "not written: "),
        (lambda folder, url: [f"metrics.pushgateway={url}"], "127.0.0.1 refused them: HTTP 503"),
        (lambda folder, url: ["metrics.pushgateway=http://127.0.0.1:9"], "127.0.0.1 didn't take them: "),
    ],
)
def test_what_can_not_be_delivered_is_a_warning(
    spoil: Callable[[Path, str], list[str]],
    said: str,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(20))
    folder = project / "collector"
    (folder / "batchq_mine.prom").mkdir(parents=True)
    with receiver(503) as server:
        assert run(*spoil(folder, f"http://{server.address}")) == 0
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "metrics." in line)
    assert said in line
    assert [path.name for path in folder.iterdir()] == ["batchq_mine.prom"], "a temporary file is left behind"


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (MetricsConfig(textfile="/no/such"), "metrics.textfile=/no/such: no such folder"),
        (MetricsConfig(pushgateway="gateway:9091"), "metrics.pushgateway: must be a URL"),
        (MetricsConfig(pushgateway="http://me:canary@gateway:9091"), "BATCHQ_PUSHGATEWAY in the environment"),
    ],
)
def test_a_setting_that_can_not_be_is_refused(config: MetricsConfig, named: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(named)) as refused:
        check_metrics(config)
    assert "canary" not in str(refused.value)
