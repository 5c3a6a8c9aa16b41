"""Pictures of trainings of subsets of weights: loss and displacement, beside the whole training."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter
from torch import Tensor

from evaluation.subsets import FULL, STARTS, Row, curve, interval, ratios
from zoo.style import COLOURS, INK, SMALL, TITLE, new_figure, tidy

KINDS = {  # kind of mask -> what tells it, in the order in which it is asked
    "rotating": ("~",),
    "single weights": ("-weights",),
    "half-size networks": ("halves",),
    "by the Hessian": ("weak", "strong", "salient"),
    "at random": ("random",),
    "by their place": ("",),
}
SHOWN = ("by their place", "at random", "by the Hessian", "single weights", "rotating")
LOSSES = {"train": "loss, training images", "validation": "loss, validation images"}


def subsets_figures(
    rows: Sequence[Row], seconds: Mapping[str, float], *, title: str
) -> Iterator[tuple[str, Figure]]:
    """Draw losses and displacements against steps, and against seconds.

    Args:
        rows: Joined ones.
        seconds: Of a step, by mask.
        title: Headline.

    Yields:
        Name of a file without its ending, and its figure.
    """
    for start in dict.fromkeys(row["start"] for row in rows):
        own = [row for row in rows if row["start"] == start]
        if len(own) > 1:
            headline = f"{title}: {STARTS[start]}"
            yield f"{start}-steps", _figure(own, None, headline)
            yield f"{start}-seconds", _figure(own, seconds, headline)


def _figure(rows: Sequence[Row], seconds: Mapping[str, float] | None, title: str) -> Figure:
    """A column for every kind of mask; losses above, displacement below."""
    (full,) = (row for row in rows if row["mask"] == FULL)
    others = [row for row in rows if row["mask"] != FULL]
    kinds = [kind for kind in SHOWN if any(_kind(row) == kind for row in others)]
    kinds = kinds or [_kind(row) for row in others[:1]]
    figure = new_figure(2.9 * len(kinds) + 0.6, 7.4)
    panels = figure.subplots(3, len(kinds), squeeze=False, sharex=True, sharey="row")
    for column, kind in zip(panels.T, kinds, strict=True):
        _draw(column, full, INK, seconds, None)
        own = [row for row in others if _kind(row) == kind]
        if kind == kinds[0]:
            own += [row for row in others if row["mask"] == "halves"]
        for row, colour in zip(own, COLOURS * len(own), strict=False):
            _draw(column, row, colour, seconds, full)
        column[2].axhline(1, color=INK, linewidth=1.2)
        tidy(column[0], title=kind)
        tidy(column[1])
        tidy(column[2], x="steps" if seconds is None else "seconds of training")
        column[0].legend(fontsize=SMALL - 1, frameon=False)
    for axes, label in zip(panels[:, 0], (*LOSSES.values(), "displacement, full = 1"), strict=True):
        axes.set_ylabel(label, fontsize=SMALL + 1, color=INK)
    for axes in panels[:2].flatten():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.4, 2, 3, 4.5, 7)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_locator(NullLocator())
    for line, name in zip(panels[:2], LOSSES, strict=True):
        _limit(line, full, others, name)
    _limit_ratios(panels[2], others, full)
    figure.suptitle(title, fontsize=TITLE, color=INK)
    return figure


def _draw(
    column: Sequence[Axes],
    row: Row,
    colour: str,
    seconds: Mapping[str, float] | None,
    full: Row | None,
) -> None:
    mask = row["mask"]
    unit = 1.0 if seconds is None else seconds[mask]
    places = unit * torch.tensor(row["steps"], dtype=torch.float64)
    dashed = {"linestyle": "--"} if mask == "halves" else {}
    for axes, name in zip(column, LOSSES, strict=False):
        label = "full" if full is None else mask
        _band(axes, places, curve(row, name), {"color": colour, "label": label, **dashed})
    if full is not None and "same" in row["curves"]:
        pace = 1.0 if seconds is None else seconds[mask] / seconds[FULL]
        _band(column[2], places[1:], ratios(row, full, pace), {"color": colour})


def _band(axes: Axes, places: Tensor, values: Tensor, style: Mapping[str, str]) -> None:
    mean, wide = interval(values)
    axes.plot(places, mean, linewidth=1.4, **style)
    low, high = (mean - wide).clamp_min(1e-4), mean + wide
    axes.fill_between(places, low, high, color=style["color"], alpha=0.18, linewidth=0)


def _limit(line: Sequence[Axes], full: Row, others: Sequence[Row], name: str) -> None:
    """Leave out the first steps, where all losses are those of the start."""
    means = [curve(row, name).mean(0) for row in (full, *others)]
    low = min(float(mean.min()) for mean in means)
    high = max(float(mean[min(3, len(mean) - 1)]) for mean in means)
    line[0].set_ylim(0.92 * low, 1.08 * high)


def _limit_ratios(line: Sequence[Axes], others: Sequence[Row], full: Row) -> None:
    found = [ratios(row, full).mean(0) for row in others if "same" in row["curves"]]
    if found:
        every = torch.cat(found)
        line[0].set_ylim(0.9 * float(every.min()), 1.1 * float(every.max()))


def _kind(row: Row) -> str:
    return next(kind for kind, parts in KINDS.items() if any(p in row["mask"] for p in parts))
