"""Draws the panels of infra/grafana with the series that infra/check/prometheus.py found for them.

    python infra/check/draw.py SERIES.json FOLDER

A script, run by an interpreter that has matplotlib: near to what Grafana shows, so that somebody can look at it.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

BACKGROUND, TEXT = "#181b1f", "#ccccdc"
COLOURS = {"green": "#73bf69", "red": "#f2495c", "yellow": "#fade2a", "text": TEXT}


def main(series: Path, folder: Path) -> None:
    panels = json.loads(series.read_text())
    times = [t for panel in panels for each in panel["series"] for t, _ in each["values"]]
    for panel in panels:
        panel["range"] = min(times), max(times)
    wide(panels, folder / "dashboard.png")
    narrow(panels, folder / "dashboard-narrow.png")


def wide(panels: list[dict[str, Any]], path: Path) -> None:
    """The grid of 24 columns."""
    rows = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in panels)
    figure = _figure(16, rows * 0.42)
    for panel in panels:
        grid = panel["gridPos"]
        left, bottom = grid["x"] / 24, 1 - (grid["y"] + grid["h"]) / rows
        _panel(figure, panel, (left, bottom, grid["w"] / 24, grid["h"] / rows), 16, rows * 0.42)
    figure.savefig(path, dpi=80, facecolor="#111217")


def narrow(panels: list[dict[str, Any]], path: Path) -> None:
    """One below the other, as on a telephone."""
    rows = sum(p["gridPos"]["h"] for p in panels)
    figure = _figure(5, rows * 0.38)
    above = 0
    for panel in panels:
        above += panel["gridPos"]["h"]
        _panel(figure, panel, (0, 1 - above / rows, 1, panel["gridPos"]["h"] / rows), 5, rows * 0.38)
    figure.savefig(path, dpi=70, facecolor="#111217")


def _figure(width: float, height: float) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"text.color": TEXT, "axes.labelcolor": TEXT, "xtick.color": TEXT, "ytick.color": TEXT})
    pyplot.rcParams.update({"font.size": 8, "axes.facecolor": BACKGROUND, "axes.edgecolor": "#3a3c42"})
    return pyplot.figure(figsize=(width, height))


def _panel(figure: Any, panel: dict[str, Any], box: tuple[float, ...], width: float, height: float) -> None:
    """`box` is left, bottom, width and height as shares of a figure of `width` by `height` inches."""
    x, y, w, h = box
    if panel["type"] == "row":
        figure.text(x + 0.1 / width, y + h / 2, panel["title"], va="center", weight="bold", fontsize=10)
        return
    gap_x, gap_y = 0.06 / width, 0.06 / height
    frame = figure.add_axes((x + gap_x, y + gap_y, w - 2 * gap_x, h - 2 * gap_y))
    frame.set_xticks([])
    frame.set_yticks([])
    inches = (w * width, h * height)
    frame.text(0.1 / inches[0], 1 - 0.1 / inches[1], panel["title"], transform=frame.transAxes, va="top", weight="bold")
    if not panel["series"]:
        frame.text(0.5, 0.45, "No data", transform=frame.transAxes, ha="center", va="center", color="#8e8e99")
    elif panel["type"] == "stat":
        _stat(frame, panel)
    else:
        inner = (x + 0.55 / width, y + 0.55 / height, w - 0.7 / width, h - 0.9 / height)
        _graph(figure.add_axes(inner), panel)


def _stat(frame: Any, panel: dict[str, Any]) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    for n, series in enumerate(panel["series"]):
        value = float(series["values"][-1][1])
        colour = [s["color"] for s in defaults["thresholds"]["steps"] if s["value"] is None or value >= s["value"]][-1]
        shown = _value(value, defaults["unit"], defaults.get("decimals"))
        for mapping in defaults.get("mappings", []):
            if known := mapping["options"].get(f"{value:g}"):
                shown, colour = known["text"], known["color"]
        at, size = 0.45 - 0.3 * n, 22 if len(shown) < 12 else 14
        frame.text(0.5, at, shown, transform=frame.transAxes, ha="center", fontsize=size, color=COLOURS[colour])
        frame.text(0.5, 0.1, series["legend"], transform=frame.transAxes, ha="center", color="#8e8e99")


def _graph(axes: Any, panel: dict[str, Any]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    defaults, all_series = panel["fieldConfig"]["defaults"], panel["series"]
    custom = defaults["custom"]
    first, last = panel["range"]
    times = sorted({t for series in all_series for t, _ in series["values"]})
    step = {"drawstyle": "steps-post"} if custom["lineInterpolation"] == "stepAfter" else {}
    stacked = [0.0] * len(times)
    for n, series in enumerate(all_series):
        at, colour = {t: float(v) for t, v in series["values"]}, _colour(series["legend"], n, panel)
        if custom["stacking"]["mode"] == "normal":
            above = [base + at.get(t, 0.0) for base, t in zip(stacked, times, strict=True)]
            look = {"color": colour, "alpha": custom["fillOpacity"] / 100, "linewidth": 0, "label": series["legend"]}
            axes.fill_between([t - first for t in times], stacked, above, step="post" if step else None, **look)
            stacked = above
        else:
            mine = [t for t in times if t in at]
            axes.plot([t - first for t in mine], [at[t] for t in mine], color=colour, label=series["legend"], **step)
    axes.set_xlim(0, last - first)
    axes.set_ylim(bottom=defaults.get("min"), top=defaults.get("max"))
    axes.grid(color="#2c2e33", linewidth=0.5)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=defaults.get("decimals") == 0))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: _value(v, defaults["unit"], defaults.get("decimals"))))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0f} s"))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncol=3, frameon=False, fontsize=7)


def _colour(legend: str, n: int, panel: dict[str, Any]) -> str:
    for override in panel["fieldConfig"]["overrides"]:
        if re.search(override["matcher"]["options"].strip("/"), legend):
            return COLOURS[override["properties"][0]["value"]["fixedColor"]]
    return f"C{n}"


def _value(value: float, unit: str, decimals: int | None) -> str:
    """As Grafana writes it, nearly."""
    if unit == "percentunit":
        return f"{value:.{decimals or 0}%}"
    if unit == "s":
        sign, value = "-" if value < 0 else "", abs(value)
        for name, seconds in (("d", 86400), ("h", 3600), ("min", 60)):
            if value >= seconds:
                return f"{sign}{value / seconds:.1f} {name}"
        return f"{sign}{value:.1f} s"
    if unit == "short" and value >= 1000:
        return f"{value / 1000:.3g} K"
    return (
        f"{value:,.{decimals}f}" if decimals is not None else f"{value:,.4g}" if unit != "locale" else f"{value:,.0f}"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
