"""Pictures of what comparisons found: rows of ``leaderboard.json`` in, figures out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from zoo.style import COLOURS, FAINT, GREY, INK, MARKERS, SMALL, TITLE, new_figure, tidy

Row = Mapping[str, Any]

KINDS = {
    "none": "no images",
    "unlabelled": "unlabelled images",
    "labelled": "labelled images",
    "segments": "all segments",
}
LEARNED = ("gnn", "autoencoder")
NAMED = (
    *("soft-vote ensemble", "best member", "average", "average, aligned"),
    *("trained on all segments (ceiling)",),
)
_Z = 1.96  # half width of a 95 % interval, in standard errors


def leaderboard_figure(
    rows: Sequence[Row], *, title: str, learned: Sequence[str] = LEARNED
) -> Figure:
    """Accuracy of every method, best on top, one panel per number of members.

    A thick bar is the 95 % interval of the mean, a thin one the standard deviation over families.
    Colours say what images a method needs; hollow dots are controls.

    Args:
        rows: Rows of ``leaderboard.json``; one method may come several times, with other images.
        title: Headline.
        learned: Methods that are set in bold, whatever stands behind a comma.

    Returns:
        The figure; it grows with the number of methods.
    """
    sizes = sorted({row["members"] for row in rows})
    best: dict[str, float] = {}
    for row in rows:
        reached = row["accuracy_mean"] - (row["members"] != sizes[-1])  # others below those
        best[row["method"]] = max(best.get(row["method"], -2.0), reached)
    methods = sorted(best, key=best.__getitem__)
    figure = new_figure(3.4 + 2.6 * max(1.4, len(sizes)), 0.19 * len(methods) + 1.5)
    panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    for axes, size in zip(panels, sizes, strict=True):
        own = [row for row in rows if row["members"] == size]
        for row in own:
            _bars(axes, row, methods.index(row["method"]))
        top = max(own, key=lambda row: row["accuracy_mean"] - row["control"])
        axes.axvline(100 * top["accuracy_mean"], color=GREY, linewidth=0.8, linestyle=":", zorder=0)
        tidy(axes, title=f"K = {size} members", grid="both")
        axes.grid(axis="y", linewidth=0.3, color=FAINT)
    controls = {row["method"] for row in rows if row["control"]}
    panels[0].set_yticks(range(len(methods)), methods, fontsize=SMALL)
    panels[0].set_ylim(-0.7, len(methods) - 0.3)
    for label, method in zip(panels[0].get_yticklabels(), methods, strict=True):
        label.set_fontweight("bold" if method.partition(", ")[0] in learned else "normal")
        label.set_fontstyle("italic" if method in controls else "normal")
    figure.supxlabel(
        "test accuracy in %: mean, its 95 % interval (thick), standard deviation over families "
        "(thin)",
        fontsize=SMALL,
        color=INK,
    )
    figure.suptitle(title, fontsize=TITLE, color=INK)
    _legend(figure, rows)
    return figure


def accuracy_figure(rows: Sequence[Row], *, title: str, methods: Sequence[str] = ()) -> Figure:
    """Accuracy against the number of members, a line per method with the interval of its mean.

    Args:
        rows: Rows of ``leaderboard.json``.
        title: Headline.
        methods: Which, in the order of the legend; by default the usual references and the best
            of the others, eight in all.

    Returns:
        The figure.
    """
    chosen = list(methods or _chosen(rows))
    figure = new_figure(7.6, 4.0)
    axes = figure.subplots()
    sizes = sorted({row["members"] for row in rows})
    for place, name in enumerate(chosen):
        own = sorted((r for r in rows if r["method"] == name), key=lambda r: r["members"])
        at = [sizes.index(row["members"]) for row in own]
        mean = np.array([100 * row["accuracy_mean"] for row in own])
        half = np.array([100 * _interval(row) for row in own])
        control = any(row["control"] for row in own)
        style = {"color": COLOURS[place % len(COLOURS)], "linewidth": 1.6}
        axes.fill_between(at, mean - half, mean + half, color=style["color"], alpha=0.15, lw=0)
        axes.plot(
            at,
            mean,
            marker=MARKERS[place % len(MARKERS)],
            markersize=5,
            markerfacecolor="white" if control else style["color"],
            linestyle="--" if control else "-",
            label=f"{name} (control)" if control else name,
            **style,
        )
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    tidy(axes, x="K, members that are merged", y="test accuracy in %, mean over families")
    figure.legend(fontsize=SMALL, frameon=False, loc="outside right center")
    figure.suptitle(title, fontsize=TITLE, color=INK)
    return figure


def cost_figure(
    rows: Sequence[Row],
    *,
    title: str,
    members: int | None = None,
    learned: Sequence[str] = LEARNED,
) -> Figure:
    """Seconds of a merge against accuracy; methods that no other beats in both are named.

    Args:
        rows: Rows of ``leaderboard.json``.
        title: Headline.
        members: Which number of members; the largest if not given.
        learned: Methods that are named in any case.

    Returns:
        The figure.
    """
    size = members or max(row["members"] for row in rows)
    own = sorted((r for r in rows if r["members"] == size), key=lambda r: _seconds(r))
    figure = new_figure(7.6, 4.6)
    axes = figure.subplots()
    axes.set_xscale("log")
    for row in own:
        colour = _colour(row)
        axes.plot(
            _seconds(row),
            100 * row["accuracy_mean"],
            "o",
            markersize=6,
            color=colour,
            markerfacecolor="white" if row["control"] else colour,
            alpha=0.95,
        )
    front = _front(own)
    axes.step(
        [_seconds(row) for row in front],
        [100 * row["accuracy_mean"] for row in front],
        where="post",
        color=GREY,
        linewidth=1,
        linestyle=":",
        zorder=0,
    )
    named = [r for r in own if r in front or r["method"].partition(", ")[0] in learned]
    tidy(axes, x="seconds per merge, log scale", y="test accuracy in %, mean over families")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.12, y=0.1)
    _name(axes, named)
    _legend(figure, own)
    figure.suptitle(f"{title}, K = {size}", fontsize=TITLE, color=INK)
    return figure


def _bars(axes: Axes, row: Row, place: int) -> None:
    colour, mean = _colour(row), 100 * row["accuracy_mean"]
    spread, half = 100 * row["accuracy_std"], 100 * _interval(row)
    axes.plot([mean - spread, mean + spread], [place] * 2, color=colour, linewidth=0.8, alpha=0.7)
    axes.plot([mean - half, mean + half], [place] * 2, color=colour, linewidth=2.6, alpha=0.55)
    face = "white" if row["control"] else colour
    axes.plot(mean, place, "o", markersize=4.2, color=colour, markerfacecolor=face)


def _interval(row: Row) -> float:
    """Half width of the 95 % interval of the mean over families, normal approximation."""
    return _Z * row["accuracy_std"] / max(1, row["families"]) ** 0.5


def _kind(row: Row) -> str:
    return str(row["data"]).partition(":")[0]


def _colour(row: Row) -> str:
    return COLOURS[list(KINDS).index(_kind(row))]


def _seconds(row: Row) -> float:
    return max(row["seconds"], 1e-4)  # a choice among members takes no time to speak of


def _chosen(rows: Sequence[Row], most: int = 8) -> list[str]:
    size = max(row["members"] for row in rows)
    order = sorted((r for r in rows if r["members"] == size), key=lambda r: -r["accuracy_mean"])
    best = list(dict.fromkeys(row["method"] for row in order))
    kept = {name for name in NAMED if name in best}
    for name in best:
        if len(kept) < most:
            kept.add(name)
    return [name for name in best if name in kept]


def _front(rows: Sequence[Row]) -> list[Row]:
    """Rows of which none is faster and better, fastest first; ``rows`` are sorted by seconds."""
    front: list[Row] = []
    for row in rows:
        if not front or row["accuracy_mean"] > front[-1]["accuracy_mean"]:
            front.append(row)
    return front


def _name(axes: Axes, rows: Sequence[Row]) -> None:
    """Write names beside dots, moved up where they would lie upon another."""
    low, high = axes.get_ylim()
    step, taken = 0.042 * (high - low), []
    left, right = np.log10(axes.get_xlim())
    for row in sorted(rows, key=lambda row: row["accuracy_mean"]):
        at, height = _seconds(row), 100 * row["accuracy_mean"]
        across = (np.log10(at) - left) / (right - left)
        y = height
        while any(abs(y - other) < step and abs(across - there) < 0.34 for there, other in taken):
            y += step / 4
        taken.append((across, y))
        side = "right" if across > 0.62 else "left"
        axes.annotate(
            row["method"],
            (at, height),
            xytext=(-7 if side == "right" else 7, (y - height) / (high - low) * 240),
            textcoords="offset points",
            ha=side,
            va="center",
            fontsize=SMALL,
            color=INK,
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": GREY} if y != height else None,
        )


def _legend(figure: Figure, rows: Sequence[Row]) -> None:
    shown = [kind for kind in KINDS if any(_kind(row) == kind for row in rows)]
    dots = [
        Line2D([], [], color=COLOURS[list(KINDS).index(kind)], marker="o", lw=0, ms=5)
        for kind in shown
    ]
    names = [KINDS[kind] for kind in shown]
    if any(row["control"] for row in rows):
        dots.append(Line2D([], [], color=GREY, marker="o", markerfacecolor="white", lw=0, ms=5))
        names.append("control")
    figure.legend(
        dots, names, loc="outside upper right", fontsize=SMALL, frameon=False, ncols=len(names)
    )
