"""What an output has come to, over every invocation that worked on it: accounts, manifest, report files, exit code."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from batchq import account, failpoint, gate, ledger, plan, report, storage, write
from batchq.config import Config, EngineKind
from batchq.errors import BatchqError, NotFound
from batchq.gate import Verdict
from batchq.model.source import Model
from batchq.records import Plan


@dataclass(frozen=True, slots=True)
class Result:
    """What a run came to: `summary` is what meta/report.json holds, `text` the same for a terminal."""

    exit_code: int
    summary: dict[str, Any]
    text: str


def finish(config: Config, fixed: Plan, model: Model, state: str, output: str, new_inputs: list[str]) -> Result:
    """Account for what stands, write meta/manifest.json and meta/report.json, .html and .csv, say it."""
    standing = plan.standing(fixed, output)
    summary = summarise(config, fixed, model.name, state, output, new_inputs, standing)
    if not standing.remaining:
        storage.delete_prefix(
            storage.join(output, "meta/partial")
        )  # of attempts that were killed while they cleaned up
        manifest = {
            "fingerprint": fixed.fingerprint,
            "rows": summary["rows"],
            "answers": summary["answers"],
            "failures": summary["failures"],
            "parts": summary["parts"],
            "quarantined": summary["quarantined"],
        }
        failpoint.reach("outcome.finish.before_manifest")
        storage.put(storage.join(output, "meta/manifest.json"), json.dumps(manifest, indent=1).encode())
    failpoint.reach("outcome.finish.before_report")
    for kind, written in report.written(summary).items():
        storage.put(storage.join(output, f"meta/report.{kind}"), written.encode())
    rate = summary["failures"] / summary["rows"] if summary["rows"] else 0.0
    limit, code = config.output.max_error_rate, 0
    if rate > limit:
        code = 4
        text = report.terminal({**summary, "state": f"{summary['state']}, with too many failures"})
        text += f"\n  note       {rate:.1%} of the rows failed, above output.max_error_rate={limit}: exit code 4"
    else:
        text = report.terminal(summary)
    if summary["quarantined"]:
        code = 4
    return Result(code, summary, text)


def summarise(
    config: Config, fixed: Plan, model: str, state: str, output: str, new_inputs: list[str], standing: plan.Standing
) -> dict[str, Any]:
    """All numbers of one output, over every invocation that worked on it."""
    summary = account.summarise(standing.receipts, ledger.read_runs(output), config.pricing)
    id_column = config.input.id
    kept = id_column is not None and id_column in write.schema_from_text(fixed.schema).names
    return {
        "job": fixed.job,
        "state": state if not standing.remaining else f"{len(standing.remaining)} of {len(fixed.shards)} shards to go",
        "output": output,
        "model": model,
        "quantization": fixed.quantization,
        "why": why(fixed),
        "fingerprint": fixed.fingerprint,
        "shards": len(fixed.shards),
        "shards_done": len(fixed.shards) - len(standing.remaining),
        **summary,
        "gate": [dataclasses.asdict(v) | {"words": v.words()} for v in read_verdicts(output)],
        "reuse": fixed.reuse,
        "id_column": id_column,
        "duplicate_ids": write.count_duplicates(output, id_column) if kept and id_column else 0,
        "new_inputs": new_inputs,
        "quarantined": quarantined(fixed, standing),
    }


def why(fixed: Plan) -> str:
    """What answered, beyond the model's name."""
    if json.loads(fixed.ingredients["engine"])[0] == EngineKind.fake.value:
        return "NOT ASKED: engine=fake made these answers up"
    return "served as it is" if fixed.quantization == "none" else f"checkpoint {fixed.checkpoint[:12]}"


def quarantined(fixed: Plan, standing: plan.Standing) -> list[dict[str, Any]]:
    """Input files that couldn't be read, or not to their ends: name, why, and how many of their rows stand."""
    rows: Counter[str] = Counter()
    why = dict(fixed.unreadable)
    for receipt in standing.receipts:
        name = fixed.objects[fixed.shards[receipt.shard].object].name
        rows[name] += receipt.usage.rows
        if receipt.quarantined:
            why[name] = receipt.quarantined
    return [{"name": name, "why": why[name], "rows": rows[name]} for name in sorted(why)]


def status(config: Config) -> Result:
    """How far the run at output.path is, from the store alone. Raises BatchqError if nothing is there."""
    output = storage.normalize(config.output.path)
    stored = plan.load(output)
    if stored is None:
        raise BatchqError(f"{output}: no run has been planned there yet")
    standing = plan.standing(stored, output)
    runs = ledger.read_runs(output)
    state = runs[-1].state if runs else "planned"
    summary = summarise(config, stored, config.model.path, state, output, [], standing)
    words = {"running": "running, or killed since"}.get(state, state)
    lines = [
        f"batchq · {stored.job} · {summary['shards_done']} of {summary['shards']} shards committed"
        f" · last invocation: {words}",
        f"  model      {summary['model']} · {summary['quantization']}: {summary['why']}",
        f"  rows       {summary['rows']:,} = {summary['answers']:,} answers + {summary['failures']:,} failures",
        f"  cost       {report.cost(summary)}",
        f"  output     {output}",
    ]
    return Result(0, summary, "\n".join(lines))


def compose_report(config: Config) -> Result:
    """The report of what stands at output.path, written anew, at today's prices."""
    output = storage.normalize(config.output.path)
    stored = plan.load(output)
    if stored is None:
        raise BatchqError(f"{output}: no run has been planned there yet")
    model = Model(path="", name=config.model.path, digest=stored.model, quantized=None)
    return finish(config, stored, model, "complete", output, [])


def note_verdicts(output: str, verdicts: list[Verdict]) -> None:
    if verdicts:
        found = json.dumps([dataclasses.asdict(v) for v in verdicts], indent=1)
        storage.put(storage.join(output, "meta/gate.json"), found.encode())


def read_verdicts(output: str) -> list[Verdict]:
    try:
        return [gate.verdict_from_json(v) for v in json.loads(storage.read(storage.join(output, "meta/gate.json")))]
    except NotFound:
        return []
