"""What an output has come to, over every invocation that worked on it: accounts, manifest, report files, exit code."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from batchq import storage
from batchq.account import ledger
from batchq.account import summary as accounts
from batchq.account.cost import spent, with_prices
from batchq.config import Config, EngineKind
from batchq.errors import BatchqError, ExitCode, NotFound
from batchq.machine.progress import visible
from batchq.output import duplicates, layout, objects
from batchq.output.schema import schema_from_text
from batchq.plan.committed import Committed, read_committed
from batchq.plan.stored import load_plan
from batchq.quantize.verdict import Verdict, verdict_from_json
from batchq.records import Plan, Usage
from batchq.report import facts, files
from batchq.storage import failpoint


@dataclass(frozen=True, slots=True)
class Result:
    """What a run came to: `summary` is what meta/report.json holds, `text` the same for a terminal."""

    exit_code: int
    summary: dict[str, Any]
    text: str


def finish(config: Config, plan: Plan, committed: Committed, new_inputs: Sequence[str]) -> Result:
    """Account for what is committed, write meta/manifest.json and meta/report.json, .html and .csv, say it."""
    output = storage.normalize(config.output.path)
    summary = summarise(config, plan, committed, new_inputs)
    if not committed.remaining:
        storage.delete_prefix(layout.partial(output))  # of attempts that were killed while they cleaned up
        manifest = {
            "fingerprint": plan.fingerprint,
            "rows": summary["rows"],
            "answers": summary["answers"],
            "failures": summary["failures"],
            "parts": summary["parts"],
            "quarantined": summary["quarantined"],
            "read": summary["read"].removeprefix(f"{output}/"),  # the folder of the rows
        }
        failpoint.reach("outcome.finish.before_manifest")
        storage.put(layout.manifest(output), json.dumps(manifest, indent=1).encode())
    failpoint.reach("outcome.finish.before_report")
    _write(summary)
    excess = too_many(config, summary)
    notes = [why for _, why in excess]
    state = ", ".join([summary["state"], *(f"with too many {what}" for what, _ in excess)])
    if unreadable := len(summary["quarantined"]):
        notes.append(f"{unreadable} input files can't be read, or not to their ends")
    code = exit_code(config, plan, committed)
    ending = f": exit code {code}" if code else ""
    text = "\n".join([facts.terminal_text({**summary, "state": state}), *(f"  note       {n}{ending}" for n in notes)])
    return Result(code, summary, text)


def unfinished(config: Config) -> Result:
    """The same for a run that ended early, by whatever: also where it has no plan yet."""
    output = storage.normalize(config.output.path)
    if plan := load_plan(output):
        return finish(config, plan, read_committed(plan, output), [])
    summary = unplanned(config)
    _write(summary)
    return Result(ExitCode.COMPLETE, summary, facts.terminal_text(summary))


def _write(summary: dict[str, Any]) -> None:
    """Put meta/report.*, unless it says this already."""
    if _is_written(summary):
        return
    for kind, written in files.output_files(summary).items():
        storage.put(layout.report(summary["output"], kind), written.encode())


def unplanned(config: Config) -> dict[str, Any]:
    """All numbers of an output for which no plan is stored: only what was held for it."""
    output = storage.normalize(config.output.path)
    runs = ledger.read_runs(output)
    return {
        "job": config.job.name,
        "date": config.input.date,
        "state": accounts.state_words(0, 0, runs),
        "output": output,
        "read": objects.folder(output),
        "objects": 0,
        "model": config.model.path,
        "quantization": config.quantization.scheme.value,
        "why": "nothing was planned, so nothing was labelled",
        "fingerprint": "",
        "shards": 0,
        "shards_done": 0,
        **accounts.summarise((), runs, config.pricing),
        "gate": [],
        "reuse": "",
        "budget": config.pricing.budget,
        "gold_column": None,
        "id_column": config.input.id,
        "duplicate_ids": 0,
        "new_inputs": [],
        "quarantined": [],
    }


# What a report that is there already must agree in to stay as it is, byte for byte; the JSON is written last.
TOLD = ("state", "rows", "parts", "objects", "read", "shards_done", "wall_seconds", "device_seconds")


def _is_written(summary: dict[str, Any]) -> bool:
    """Whether meta/report.* already says this. Prices don't matter: what was booked is on record."""
    try:
        there = json.loads(storage.read(layout.report(summary["output"], "json")))
    except (NotFound, ValueError):
        return False
    now = json.loads(json.dumps(summary))
    told = [(run["id"], run["state"]) for run in now["runs"]]
    same = [(run.get("id"), run.get("state")) for run in there.get("runs", [])] == told
    bare = [[{k: v for k, v in each.items() if k != "cost"} for each in s.get("beside", [])] for s in (now, there)]
    appeared = not now["new_inputs"] or now["new_inputs"] == there.get("new_inputs")
    return same and bare[0] == bare[1] and appeared and all(now.get(k) == there.get(k) for k in TOLD)


def exit_code(config: Config, plan: Plan, committed: Committed) -> ExitCode:
    """What a run ends in that has come so far without an error."""
    usage = sum((receipt.usage for receipt in committed.receipts), Usage())
    notes = too_many(config, dataclasses.asdict(usage)) or quarantined(plan, committed)
    return ExitCode.TOO_MANY_FAILURES if notes and not committed.remaining else ExitCode.COMPLETE


def too_many(config: Config, summary: dict[str, Any]) -> list[tuple[str, str]]:
    """(what there is too much of for exit code 0, in words), for each limit of the configuration."""
    found = []
    for what, count, of, field, happened in (
        ("failures", "failures", "rows", "max_error_rate", "of the rows failed"),
        ("answers cut off", "truncated", "answers", "max_truncated_rate", "of the answers were cut off"),
    ):
        rate, limit = summary[count] / max(1, summary[of]), getattr(config.output, field)
        if rate > limit:
            found.append((what, f"{rate:.1%} {happened}, above output.{field}={limit}"))
    return found


def summarise(config: Config, plan: Plan, committed: Committed, new_inputs: Sequence[str]) -> dict[str, Any]:
    """All numbers of one output, over every invocation that worked on it."""
    output, shards = storage.normalize(config.output.path), len(plan.shards)
    runs = ledger.read_runs(output)
    summary = accounts.summarise(committed.receipts, runs, config.pricing)
    id_column = config.input.id
    has_ids = id_column is not None and id_column in schema_from_text(plan.schema).names
    left = len(committed.remaining)
    return {
        "job": plan.job,
        "date": config.input.date,
        "state": accounts.state_words(left, shards, runs),
        "output": output,
        "read": objects.folder(output),
        "objects": len(objects.listed(output)),
        "model": model_words(plan),
        "quantization": plan.quantization,
        "why": why(plan),
        "fingerprint": plan.fingerprint,
        "shards": shards,
        "shards_done": shards - left,
        **summary,
        "gate": [dataclasses.asdict(v) | {"words": v.words()} for v in verdicts(plan, output)],
        "reuse": plan.reuse,
        "budget": config.pricing.budget,
        "gold_column": json.loads(plan.ingredients["columns"])[3],
        "id_column": id_column,
        "duplicate_ids": duplicates.count(output, id_column) if has_ids and id_column else 0,
        "new_inputs": list(new_inputs),
        "quarantined": quarantined(plan, committed),
    }


def model_words(plan: Plan) -> str:
    """Name and revision of the model that was planned, whatever the configuration names today."""
    if not plan.model_name:  # planned before there was this field
        return f"a model whose name isn't on record (digest {plan.model[:12]})"
    return f"{plan.model_name}@{plan.model_revision}" if plan.model_revision else plan.model_name


def why(plan: Plan) -> str:
    """What answered, beyond the model's name."""
    if json.loads(plan.ingredients["engine"])[0] == EngineKind.fake.value:
        return "NOT ASKED: engine=fake made these answers up"
    return "served as it is" if plan.quantization == "none" else f"checkpoint {plan.checkpoint[:12]}"


def quarantined(plan: Plan, committed: Committed) -> list[dict[str, Any]]:
    """Input files that couldn't be read, or not to their ends: name, why, and how many of their rows are there."""
    rows: Counter[str] = Counter()
    why = dict(plan.unreadable)
    for receipt in committed.receipts:
        name = plan.objects[plan.shards[receipt.shard].object].name
        rows[name] += receipt.usage.rows
        if receipt.quarantined:
            why[name] = receipt.quarantined
    return [{"name": name, "why": why[name], "rows": rows[name]} for name in sorted(why)]


def compose_report(config: Config, reprice: bool = False) -> Result:
    """The report of what is committed at output.path; written where it isn't yet. With `reprice` it is only shown what
    that would cost at the list that is given now, beside what was booked. Raises BatchqError if no run has begun
    there."""
    output = storage.normalize(config.output.path)
    plan, runs = load_plan(output), ledger.read_runs(output)
    if plan is None and not any(run.verb == "run" for run in runs):
        load(config)  # says what other verbs held
    if not reprice:
        return unfinished(config)
    committed = read_committed(plan, output) if plan else None
    summary = summarise(config, plan, committed, []) if plan and committed else unplanned(config)
    anew = accounts.summarise(committed.receipts if committed else (), runs, config.pricing, anew=True)
    lines = [
        facts.title(summary),
        f"  booked     {facts.cost(summary)}",
        f"  repriced   {facts.cost({**summary, **anew})}",
    ]
    return Result(ExitCode.COMPLETE, summary, "\n".join(map(visible, [*lines, "  nothing was written"])))


def load(config: Config) -> tuple[Plan, Committed]:
    """The run at output.path. Raises BatchqError if none was planned there; it says what was spent all the same."""
    output = storage.normalize(config.output.path)
    plan = load_plan(output)
    if plan is not None:
        return plan, read_committed(plan, output)
    tried_words = ""
    if runs := ledger.read_runs(output):
        replicas = [replica for run in runs for replica in run.replicas]
        costs, whole = spent(with_prices(runs, config.pricing))
        seconds = sum(replica.device_seconds for replica in replicas)
        money = "".join(f" = {facts.money(amount)} {currency}" for currency, amount in costs.items() if whole)
        tried = Counter(f"{run.verb} ({run.state})" for run in runs)
        verbs = ", ".join(f"{count} x {which}" for which, count in tried.items())
        last = f"; the last one ended in exit code {runs[-1].exit_code}: {runs[-1].reason}" if runs[-1].reason else ""
        tried_words = f"; what was tried held {seconds:,.1f} device-seconds{money}: {verbs}{last}"
    raise BatchqError(f"{output}: no run has been planned there yet{tried_words}")


def verdicts(plan: Plan, output: str) -> list[Verdict]:
    """The gate's verdicts on this run. Version 0.1.0 stored them in meta/gate.json, beside the plan."""
    stored: Iterable[dict[str, Any]] = plan.verdicts
    if not stored:
        with contextlib.suppress(NotFound):
            stored = json.loads(storage.read(layout.gate(output)))
    return [verdict_from_json(v) for v in stored]
