"""infra/prometheus and infra/grafana: a real run on a real Ray, scraped by a real Prometheus.

There is no Grafana here. Every query of the dashboard and every expression of the rules is asked of Prometheus and has
to return series; what the panels show is drawn into .infra/dashboard.png and .infra/dashboard-narrow.png.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from batchq.telemetry.metrics import LAST, LIVE
from chaos.drivers import Job, end
from infra.check.check import ROOT, TOOLS, Check, How, Missing, installed, said
from infra.check.ray_jobs import free_ports, head

HERE = ROOT / "infra/prometheus"
DASHBOARD = ROOT / "infra/grafana/batchq.json"
PACKAGES = ("prometheus", "prometheus-pushgateway", "prometheus-node-exporter")  # of Debian
PATIENCE_S = 120.0
EVERY_S = 1  # seconds between scrapes here
ROWS, BLANK = 500, 8  # rows, and rows without text, which fail
BEFORE = 45  # seconds that the drawing shows before the run's end, at most


def program(name: str) -> str:
    """Raises Missing where Debian has none either."""
    if shutil.which(name) is None:
        try:
            said(["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES], timeout=300)
        except AssertionError as error:
            raise Missing(f"{name}: apt-get install {' '.join(PACKAGES)}") from error
    found = shutil.which(name)
    assert found, name
    return found


# ---- what the files say ----


def rules_hold(_: Path) -> str:
    promtool = program("promtool")
    said([promtool, "check", "rules", HERE / "rules.yml"])
    said([promtool, "check", "config", "--syntax-only", HERE / "prometheus.yml"])
    told = said([promtool, "test", "rules", HERE / "rules_test.yml"])
    assert "SUCCESS" in told, told
    tested = set(re.findall(r"alertname: (\w+)", (HERE / "rules_test.yml").read_text()))
    assert tested == set(alerts()), f"not tested: {set(alerts()) - tested}"
    return f"{len(alerts())} alerts, each with a unit test"


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((HERE / "rules.yml").read_text())["groups"]
    return list(group["rules"])


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def names_are_batchqs(_: Path) -> str:
    """Every metric that a rule or a panel names is one of batchq's, or a rule's own; each has a heading to go to."""
    known = {f"ray_{metric.name}" for metric in LIVE} | {metric.name for metric in LAST}
    known |= {rule["record"] for rule in rules() if "record" in rule}
    asked = [rule["expr"] for rule in rules()]
    asked += [target["expr"] for panel in panels() for target in panel["targets"]]
    used = {name for text in asked for name in re.findall(r"(?:job_name:|ray_)?batchq_\w+(?::\w+)?", text)}
    assert used <= known, f"no such metrics: {used - known}"
    told = (ROOT / "docs/runbook.md").read_text().lower()
    for name, rule in alerts().items():
        assert rule["annotations"]["runbook"] == f"docs/runbook.md#{name.lower()}", name
        assert f"`{name}`" in (ROOT / "docs/metrics.md").read_text(), name
        assert f"### {name.lower()}\n" in told, f"docs/runbook.md has no section {name}"
    dashboard = json.loads(DASHBOARD.read_text())
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    for panel in panels():
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]
    cells = [
        (x, y)
        for panel in dashboard["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24, "panels lie over each other"
    return f"{len(used)} metrics, {len(panels())} panels"


# ---- a run that is scraped ----


class Prometheus:
    """A server on loopback."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/api/v1"

    def ask(self, path: str, **values: str) -> list[dict[str, Any]]:
        with urllib.request.urlopen(f"{self.url}/{path}?{urllib.parse.urlencode(values)}", timeout=30) as reply:
            return list(json.load(reply)["data"]["result"])

    def now(self, query: str) -> list[dict[str, Any]]:
        return self.ask("query", query=query)


@contextmanager
def server(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


@contextmanager
def scraped(work: Path, discovery: Path, collector: Path) -> Iterator[tuple[Prometheus, str]]:
    """A Prometheus with our configuration and rules, on other ports; and the URL of a Pushgateway that it scrapes."""
    own, node, gateway = free_ports(3)
    config = yaml.safe_load((HERE / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": f"{EVERY_S}s", "evaluation_interval": f"{EVERY_S}s"}
    config["rule_files"] = [str(HERE / "rules.yml")]
    by_name = {each["job_name"]: each for each in config["scrape_configs"]}
    by_name["ray"]["file_sd_configs"] = [{"files": [str(discovery)], "refresh_interval": "1s"}]
    by_name["node"]["static_configs"] = [{"targets": [f"127.0.0.1:{node}"]}]
    by_name["pushgateway"]["static_configs"] = [{"targets": [f"127.0.0.1:{gateway}"]}]
    (work / "prometheus.yml").write_text(yaml.safe_dump(config))
    here = "--web.listen-address=127.0.0.1"
    with ExitStack() as running:
        exporter = [program("prometheus-node-exporter"), "--collector.disable-defaults", "--collector.textfile"]
        exporter += [f"--collector.textfile.directory={collector}", f"{here}:{node}"]
        running.enter_context(server(exporter, work / "node.log"))
        running.enter_context(server([program("prometheus-pushgateway"), f"{here}:{gateway}"], work / "gateway.log"))
        command = [program("prometheus"), f"--config.file={work}/prometheus.yml", f"--storage.tsdb.path={work}/tsdb"]
        running.enter_context(server([*command, f"{here}:{own}"], work / "prometheus.log"))
        yield Prometheus(own), f"http://127.0.0.1:{gateway}"


def soon(what: str, holds: Any) -> Any:
    """What `holds` returns once it is something."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := _or_none(holds)):
        assert time.monotonic() < deadline, f"{what}: not within {PATIENCE_S:.0f} s"
        time.sleep(0.3)
    return found


def _or_none(holds: Any) -> Any:
    try:
        return holds()
    except OSError:  # it isn't up yet
        return None


def asked(query: str) -> str:
    """As Grafana asks it, of all jobs; over times that a short run has."""
    return query.replace("$job", ".*").replace("$__rate_interval", "10s").replace("[5m]", "[10s]")


def every_query_has_data(work: Path) -> str:
    """One run on a cluster of one node, and what Prometheus has of it while it labels and afterwards."""
    (collector := work / "collector").mkdir()
    (port,) = free_ports(1)
    with (
        head(work, f"--metrics-export-port={port}", RAY_metrics_report_interval_ms="1000") as cluster,
        scraped(work, cluster.folder / "prom_metrics_service_discovery.json", collector) as (prometheus, gateway),
    ):
        job = Job(work / "job", ROWS)
        blank = "".join(json.dumps({"id": ROWS + i, "text": ""}) + "\n" for i in range(BLANK))
        rows = job.folder / "rows.jsonl"
        rows.write_text(blank + rows.read_text())
        job.environment = {k: v for k, v in cluster.environment.items() if os.environ.get(k) != v}
        told = ["pricing.per_hour.cpu_core=36", "pricing.budget=1000", "run.deadline=2h"]
        where = [f"metrics.textfile={collector}", f"metrics.pushgateway={gateway}"]
        ray = ["cluster=ray", f"cluster.address={cluster.gcs}", "cluster.replicas=1"]
        began = time.time()
        driver = job.start(*ray, *told, *where, "+engine.options.tokens_per_s=450")
        labelling = [t["expr"] for p in panels() for t in p["targets"] if "ray_" in t["expr"]]
        labelling += [rule["expr"] for rule in rules() if "record" in rule]
        missing = {asked(query) for query in labelling}

        def all_seen() -> bool:
            missing.difference_update({query for query in missing if prometheus.now(query)})
            return not missing or driver.poll() is not None

        soon("queries while it labels", all_seen)
        assert not missing, f"no data while it labelled: {missing}; {end(driver).err[-800:]}"
        ended = end(driver)
        assert ended.code == 0, ended.err[-1500:]
        over = [asked(t["expr"]) for p in panels() for t in p["targets"] if "ray_" not in t["expr"]]
        for query in over:
            soon(query, lambda query=query: prometheus.now(query))
        # Ray exports at its interval, and once more as the driver ends: the last scrape that had the run has it all.
        soon("every row is counted", lambda: counted(prometheus) == {"answer": ROWS, "failure": BLANK})
        for name in (metric.name for metric in LAST if metric.name != "batchq_last_gate_recovery_ratio"):
            from_both = f"count(count by (job) ({name})) == 2"  # node exporter and the Pushgateway
            soon(from_both, lambda query=from_both: prometheus.now(query))
        for name, rule in alerts().items():
            for half in rule["expr"].split(" and "):
                compared = re.sub(r"\s*[<>=]+ [\d.]+\s*$", "", half)
                assert prometheus.now(asked(compared)), f"{name} compares nothing: {compared}"
        draw(prometheus, max(began, time.time() - BEFORE))
    return f"{len(labelling) + len(over)} queries and {len(alerts())} alerts have data; {ROWS + BLANK} rows counted"


def counted(prometheus: Prometheus) -> dict[str, float]:
    found = prometheus.now("sum by (outcome) (max_over_time(ray_batchq_rows_total[5m]))")
    return {each["metric"]["outcome"]: float(each["value"][1]) for each in found}


# ---- pictures ----

DRAWER = Path(__file__).with_name("draw.py")


def draw(prometheus: Prometheus, began: float) -> None:
    """What each panel shows of these seconds, as Grafana would lay it out on a wide screen and on a narrow one."""
    shown = []
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        series = []
        for target in panel.get("targets", []):
            query, times = asked(target["expr"]), {"start": str(began), "end": str(time.time()), "step": "1"}
            for found in prometheus.ask("query_range", query=query, **times):
                labels = {"job_name": "", **found["metric"]}
                legend = target["legendFormat"].replace("{{", "{").replace("}}", "}").format_map(labels)
                series.append({"legend": legend, "values": found["values"]})
        shown.append({**panel, "series": series})
    TOOLS.mkdir(exist_ok=True)
    (TOOLS / "dashboard.json").write_text(json.dumps(shown))
    python = installed("drawing", "python", "matplotlib>=3.10,<4")
    said([python, DRAWER, TOOLS / "dashboard.json", TOOLS])


CHECKS = [
    Check("prometheus", "rules and panels name metrics of batchq's", How.SCHEMA, names_are_batchqs, quick=True),
    Check("prometheus", "rules, their unit tests, the configuration", How.SCHEMA, rules_hold),
    Check("prometheus", "a run that is scraped: every query has data", How.RAN, every_query_has_data),
]
