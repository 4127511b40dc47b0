"""`batchq status`: how far the run at output.path is, from the store alone."""

from __future__ import annotations

from batchq import storage
from batchq.account import ledger
from batchq.config import Config
from batchq.machine.progress import visible
from batchq.report import facts
from batchq.report.outcome import load, summarise


def status(config: Config) -> str:
    """How far the run at output.path is, from the store alone. Raises BatchqError if nothing is there."""
    plan, committed = load(config)
    output = storage.normalize(config.output.path)
    runs = [run for run in ledger.read_runs(output) if run.verb == "run"]
    state = runs[-1].state if runs else "planned"
    summary = summarise(config, plan, committed, config.model.path, [])
    words = {"running": "running, or killed since"}.get(state, state)
    cut = f" · {summary['truncated']:,} cut off" if summary["truncated"] else ""
    date = f" · {config.input.date}" if config.input.date else ""
    lines = [
        f"batchq · {plan.job}{date} · {summary['shards_done']} of {summary['shards']} shards committed"
        f" · last invocation: {words}",
        f"  model      {summary['model']} · {summary['quantization']}: {summary['why']}",
        f"  rows       {summary['rows']:,} = {summary['answers']:,} answers + {summary['failures']:,} failures{cut}",
        f"  cost       {facts.cost(summary)}",
        f"  output     {output}",
    ]
    if summary["runs"] and summary["runs"][-1]["reason"]:
        lines.insert(1, visible(f"  ended      {facts.ended(summary['runs'][-1])}"))
    return "\n".join(lines)
