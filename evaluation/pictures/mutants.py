"""The picture of a comparison of mutants: accuracy, and beside it time and size."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from evaluation.pictures.tables import Row
from zoo.style import COLOURS, GREY, INK, SMALL, TITLE, new_figure, tidy

PARTS = {  # what a row is -> its colour, and parts of names; the first that fits counts
    "several networks": (COLOURS[3], ("ensemble",)),
    "fused": (COLOURS[0], ("mutant", "joined", "halves")),
    "merged": (COLOURS[1], ("average", "cluster", "gnn", "autoencoder")),
    "control": (GREY, ("",)),
}


def mutants_figure(rows: Sequence[Row], *, title: str) -> Figure:
    """Accuracy of every method, and beside it the seconds and the parameters that it costs.

    Args:
        rows: Rows of ``leaderboard.json``, of one number of members.
        title: Headline.

    Returns:
        The figure; methods are sorted by accuracy and coloured by what they do.
    """
    rows = sorted(rows, key=lambda row: row["accuracy_mean"])
    figure = new_figure(10, 0.21 * len(rows) + 1.5)
    panels = figure.subplots(1, 3, sharey=True, width_ratios=(3, 1.2, 1.2))
    for kind, (colour, _) in PARTS.items():
        own = [place for place, row in enumerate(rows) if _part(row) == kind]
        style = {"fmt": "o", "markersize": 4, "linewidth": 1, "color": colour}
        spread = [100 * rows[i]["accuracy_std"] for i in own]
        means = [100 * rows[i]["accuracy_mean"] for i in own]
        panels[0].errorbar(means, own, xerr=spread, label=kind, **style)
        panels[1].errorbar([max(rows[i]["seconds"], 1e-3) for i in own], own, **style)
        panels[2].errorbar([rows[i]["parameters"] for i in own], own, **style)
    for axes, label in zip(
        panels, ("test accuracy in %, mean ± std", "seconds", "parameters"), strict=True
    ):
        tidy(axes, x=label)
    for axes in panels[1:]:
        axes.set_xscale("log")
        axes.margins(x=0.2)
        axes.xaxis.set_minor_formatter(NullFormatter())
    panels[0].set_ylim(-0.7, len(rows) - 0.3)
    panels[0].set_yticks(range(len(rows)), [row["method"] for row in rows], fontsize=SMALL)
    for label, row in zip(panels[0].get_yticklabels(), rows, strict=True):
        label.set_color(PARTS[_part(row)][0])
    panels[0].legend(loc="upper left", fontsize=SMALL, frameon=False)
    figure.suptitle(title, fontsize=TITLE, color=INK)
    return figure


def _part(row: Row) -> str:
    found = next(k for k, (_, parts) in PARTS.items() if any(p in row["method"] for p in parts))
    return "control" if row["control"] and found != "several networks" else found
