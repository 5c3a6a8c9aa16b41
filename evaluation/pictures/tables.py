"""Pictures of what comparisons found: rows of ``leaderboard.json`` in, figures out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter

from zoo.style import COLOURS, GREY, INK, MARKERS, SMALL, TITLE, new_figure, tidy

Row = Mapping[str, Any]

KINDS = {
    "none": "no images",
    "unlabelled": "unlabelled images",
    "labelled": "labelled images",
    "segments": "all segments",
}
LEARNED = ("gnn", "autoencoder")
ENSEMBLE = "soft-vote ensemble"
NAMED = (
    ENSEMBLE,
    "best member",
    "average",
    "average, aligned",
    "trained on all segments (ceiling)",
)
_Z = 1.96  # half width of a 95 % interval, in standard errors


def leaderboard_figure(
    rows: Sequence[Row], *, title: str, learned: Sequence[str] = LEARNED
) -> Figure:
    """Accuracy of every method, best on top, one panel per number of members.

    A thick bar is the 95 % interval of the mean, a thin one the standard deviation over families.
    Colours say what images a method needs; hollow dots are controls. A dotted line stands at the
    ensemble, which merges want to reach.

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
    panels = figure.subplots(1, len(sizes), sharex=True, sharey=True, squeeze=False)[0]
    for axes, size in zip(panels, sizes, strict=True):
        own = [row for row in rows if row["members"] == size]
        for row in own:
            _bars(axes, row, methods.index(row["method"]))
            if row["method"] == ENSEMBLE:
                axes.axvline(100 * row["accuracy_mean"], color=GREY, lw=0.8, ls=":", zorder=0)
        tidy(axes, title=f"K = {size} members", x="test accuracy in %")
    controls = {row["method"] for row in rows if row["control"]}
    panels[0].set_yticks(range(len(methods)), methods, fontsize=SMALL)
    panels[0].set_ylim(-0.7, len(methods) - 0.3)
    for label, method in zip(panels[0].get_yticklabels(), methods, strict=True):
        label.set_fontweight("bold" if method.partition(", ")[0] in learned else "normal")
        label.set_fontstyle("italic" if method in controls else "normal")
    bars = {
        "95 % interval of the mean": Line2D([], [], color=GREY, lw=2.6, alpha=0.8),
        "standard deviation over families": Line2D([], [], color=GREY, lw=0.8),
    }
    if ENSEMBLE in best:
        bars[ENSEMBLE] = Line2D([], [], color=GREY, lw=0.8, ls=":")
    _legend(figure, rows, bars)
    figure.suptitle(title, fontsize=TITLE, color=INK)
    return figure


def accuracy_figure(rows: Sequence[Row], *, title: str, methods: Sequence[str] = ()) -> Figure:
    """Accuracy against the number of members, a line per method with the interval of its mean.

    Of a method with several budgets of images the one is drawn that does best with most members.

    Args:
        rows: Rows of ``leaderboard.json``.
        title: Headline.
        methods: Which, in the order of the legend; by default the usual references, what all rows
            are compared with, and the best of the others, seven in all.

    Returns:
        The figure.
    """
    chosen = list(methods or _chosen(rows))
    figure = new_figure(7.6, 4.0)
    axes = figure.subplots()
    sizes = sorted({row["members"] for row in rows})
    for place, name in enumerate(chosen):
        own = _one_budget([row for row in rows if row["method"] == name])
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
            label=", ".join([name, *(row["data"] for row in own[:1] if row["data"] != "none")])
            + " (control)" * control,
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

    What is far below all of these is told at the lower edge, so that they do not crowd at the
    upper one.

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
    front = _front(own)
    named = [r for r in own if r in front or r["method"].partition(", ")[0] in learned]
    edge = _edge([100 * row["accuracy_mean"] for row in named])
    below = [row for row in own if 100 * row["accuracy_mean"] < edge]
    for row in own:
        _dot(axes, row, edge)
    _told_at(axes, below, edge)
    axes.step(
        [_seconds(row) for row in front],
        [100 * row["accuracy_mean"] for row in front],
        where="post",
        color=GREY,
        linewidth=1,
        linestyle=":",
        zorder=0,
    )
    tidy(axes, x="seconds per merge, log scale", y="test accuracy in %, mean over families")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()
    axes.margins(x=0.12, y=0.14 if below else 0.1)
    marks = {"no other is faster and better": Line2D([], [], color=GREY, ls=":")}
    if below:
        marks["below the edge"] = Line2D([], [], color=GREY, marker="v", lw=0, ms=5)
    _legend(figure, own, marks)
    figure.suptitle(f"{title}, K = {size}", fontsize=TITLE, color=INK)
    _name(axes, [row for row in own if row not in below], named)
    return figure


def _edge(named: Sequence[float]) -> float:
    """Accuracy in % below which no place is spent: as far below the named as these are apart."""
    return max(0.0, min(named) - max(5.0, max(named) - min(named)))


def _dot(axes: Axes, row: Row, edge: float) -> None:
    """A row at its seconds and accuracy, or, below the edge, a triangle upon it."""
    colour, accuracy = _colour(row), 100 * row["accuracy_mean"]
    axes.plot(
        _seconds(row),
        max(accuracy, edge),
        "o" if accuracy >= edge else "v",
        markersize=6,
        color=colour,
        markerfacecolor="white" if row["control"] else colour,
        alpha=0.95,
    )


def _told_at(axes: Axes, below: Sequence[Row], edge: float) -> None:
    """Accuracies of rows below the edge, under their triangles, one under the other."""
    before, place = 0.0, 0
    for row in below:  # sorted by seconds
        place = place + 1 if _seconds(row) < 1.5 * before else 0
        before = _seconds(row)
        axes.annotate(
            f"{100 * row['accuracy_mean']:.0f}",
            (before, edge),
            xytext=(0, -9 - 1.1 * SMALL * place),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=SMALL,
            color=GREY,
        )


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


def _chosen(rows: Sequence[Row], most: int = len(COLOURS)) -> list[str]:
    size = max(row["members"] for row in rows)
    order = sorted((r for r in rows if r["members"] == size), key=lambda r: -r["accuracy_mean"])
    best = list(dict.fromkeys(row["method"] for row in order))
    against = (row.get("against") for row in rows)
    kept = {name for name in (*NAMED, *against) if name in best}
    for name in best:
        if len(kept) < most:
            kept.add(name)
    return [name for name in best if name in kept]


def _one_budget(rows: Sequence[Row]) -> list[Row]:
    """Rows of one method with the same images, by number of members."""
    best = max(rows, key=lambda row: (row["members"], row["accuracy_mean"]))
    own = [row for row in rows if row["data"] == best["data"]]
    return sorted(own, key=lambda row: row["members"])


def _front(rows: Sequence[Row]) -> list[Row]:
    """Rows of which none is faster and better, fastest first; ``rows`` are sorted by seconds."""
    front: list[Row] = []
    for row in rows:
        if not front or row["accuracy_mean"] > front[-1]["accuracy_mean"]:
            front.append(row)
    return front


def _name(axes: Axes, rows: Sequence[Row], named: Sequence[Row]) -> None:
    """Write names beside dots, each where it lies upon fewest other dots and names."""
    figure = axes.figure
    figure.draw_without_rendering()  # now the axes have their size
    size = axes.get_window_extent().size / figure.dpi * 72  # points
    scale = axes.transData + axes.transAxes.inverted()
    places = {id(r): scale.transform((_seconds(r), 100 * r["accuracy_mean"])) * size for r in rows}
    dots, boxes = np.array(list(places.values())), []
    for row in sorted(named, key=lambda row: -row["accuracy_mean"]):
        at, wide = places[id(row)], 0.56 * SMALL * len(row["method"])
        best = min(_sides(wide), key=lambda side: _cost(at + side, wide, dots, boxes, size))
        boxes.append((at + best, wide))
        axes.annotate(
            row["method"],
            (_seconds(row), 100 * row["accuracy_mean"]),
            xytext=best,
            textcoords="offset points",
            va="center",
            fontsize=SMALL,
            color=INK,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": GREY, "shrinkA": 0, "shrinkB": 3},
        )


def _sides(wide: float) -> list[np.ndarray]:
    """Where a name may begin, relative to its dot, in points; the nearest first."""
    return [
        np.array([x, y])
        for far in (0, 10, 20, 32, 46, 62)
        for y in (0, far, -far)
        for x in (7 + far / 2, -wide - 7 - far / 2, -wide / 2)
        if x != -wide / 2 or far > 0
    ]


def _cost(
    start: np.ndarray,
    wide: float,
    dots: np.ndarray,
    boxes: Sequence[tuple[np.ndarray, float]],
    size: np.ndarray,
) -> float:
    """Dots and names below a name, and whether it leaves the axes."""
    tall = 0.75 * SMALL
    low, high = start + np.array([-3, -tall]), start + np.array([wide + 3, tall])
    under = ((dots > low - 2) & (dots < high + 2)).all(1).sum()
    upon = sum(
        bool((low < other + np.array([width, tall])).all() and (high > other - [0, tall]).all())
        for other, width in boxes
    )
    outside = bool((low < 0).any() or (high > size).any())
    return 3.0 * under + 5.0 * upon + 50.0 * outside


def _legend(figure: Figure, rows: Sequence[Row], others: Mapping[str, Line2D]) -> None:
    """What colours, hollow dots and other marks mean, below everything."""
    handles = {
        told: Line2D([], [], color=COLOURS[place], marker="o", lw=0, ms=5)
        for place, (kind, told) in enumerate(KINDS.items())
        if any(_kind(row) == kind for row in rows)
    }
    if any(row["control"] for row in rows):
        hollow = {"color": GREY, "marker": "o", "markerfacecolor": "white", "lw": 0, "ms": 5}
        handles["control"] = Line2D([], [], **hollow)
    handles |= others
    figure.legend(
        handles.values(),
        handles,
        loc="outside lower center",
        fontsize=SMALL,
        frameon=False,
        ncols=min(4, len(handles)),
    )
