"""Pictures of a grid of cells, readable on light and dark backgrounds."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trainers.cluster_tables import chosen

COLOURS = {
    "plain": "#222222",
    "increasing": "#e08214",
    "decreasing": "#3b7dd8",
    "stretched": "#8c8c8c",
    "adam": "#2a9d6f",
    "adam-increasing": "#b1509b",
}
_OTHERS = ("#8c6d31", "#17becf", "#d62728", "#bcbd22", "#7f3c8d", "#5254a3")
_DASHED = ("plain", "stretched", "adam")  # what does not orthogonalise


def clusters_figures(rows: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    """Draw loss on validation rows against epochs, two figures per task.

    Args:
        rows: Finished cells.

    Returns:
        Name -> figure: ``curves-<task>`` has every rule at its chosen learning rate,
        ``rates-<task>`` every cell.
    """
    figures = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        name = task.rpartition("/")[2]
        figures[f"curves-{name}"] = _figure(
            chosen(own),
            down=lambda row: f"{row['hidden']} hidden",
            across=lambda row: f"clusters of {row['clustering']} ({row['members']})",
            title=f"{name}: loss on validation rows, each rule at its chosen rate",
        )
        figures[f"rates-{name}"] = _figure(
            own,
            down=lambda row: f"{row['hidden']} hidden, {row['clustering']} ({row['members']})",
            across=lambda row: f"learning rate {row['lr']:g}",
            title=f"{name}: loss on validation rows",
        )
    return figures


def _figure(rows: Sequence[dict[str, Any]], down: Any, across: Any, title: str) -> Figure:
    """A panel for every pair of a place down and a place across."""
    lines, columns = (list(dict.fromkeys(map(place, rows))) for place in (down, across))
    figure = Figure(
        figsize=(3.6 * len(columns) + 0.4, 2.5 * len(lines) + 1.0),
        layout="constrained",
        facecolor="white",
    )
    panels = figure.subplots(len(lines), len(columns), squeeze=False, sharex=True, sharey=True)
    for line, place in enumerate(lines):
        for column, other in enumerate(columns):
            axes = panels[line][column]
            for row in rows:
                if (down(row), across(row)) == (place, other):
                    _draw(axes, row)
            axes.grid(linewidth=0.4, alpha=0.6)
            axes.spines[["top", "right"]].set_visible(False)
            if line == 0:
                axes.set_title(other, fontsize=9)
            if column == 0:
                axes.set_ylabel(place, fontsize=9)
            if line == len(lines) - 1:
                axes.set_xlabel("epochs", fontsize=9)
    lowest = min(min(row["curve"][0]) for row in rows)
    start = max(row["curve"][2][0] for row in rows)
    panels[0][0].set_ylim(0.9 * lowest, 1.05 * start)
    handles = {}
    for axes in panels.flatten():
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=6, frameon=False,
        fontsize=9,
    )  # fmt: skip
    runs = len(rows[0]["best_epoch"])
    figure.suptitle(f"{title}\nmedian and 10 to 90 % of {runs} runs", fontsize=10)
    return figure


def _draw(axes: Axes, row: dict[str, Any]) -> None:
    low, middle, high = row["curve"]
    colour = COLOURS.get(row["rule"]) or _OTHERS[sum(map(ord, row["rule"])) % len(_OTHERS)]
    dashes = "--" if row["rule"] in _DASHED else "-"
    label = row["rule"]
    epochs = range(len(middle))
    axes.plot(epochs, middle, dashes, color=colour, linewidth=1.4, label=label)
    axes.fill_between(epochs, low, high, color=colour, alpha=0.12, linewidth=0)
