"""A report as files, by what their names end in."""

from __future__ import annotations

import json
from collections.abc import Sequence

from batchq.report import pages, spreadsheet
from batchq.report.facts import Summary
from batchq.report.survey import totals


def output_files(summary: Summary) -> dict[str, str]:
    """One output's, as "html", "csv" and "json": what goes into its meta/report.*."""
    return {
        "html": pages.output_page(summary),
        "csv": spreadsheet.output_csv(summary),
        "json": _json(summary),
    }


def survey_files(outputs: Sequence[Summary], prefix: str) -> dict[str, str]:
    """The same files for all outputs below a prefix."""
    return {
        "html": pages.survey_page(outputs, prefix),
        "csv": spreadsheet.survey_csv(outputs),
        "json": _json({"outputs": list(outputs), "totals": totals(outputs)}),
    }


def _json(value: Summary) -> str:
    return json.dumps(value, indent=1, allow_nan=False)
