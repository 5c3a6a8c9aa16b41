"""Pictures of curves: a merger while it is trained, and how far confidence can be trusted."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluation.metrics import Reliability
from zoo.style import COLOURS, FAINT, GREY, INK, MARKERS, SMALL, TITLE, new_figure, tidy


def training_figure(
    history: Sequence[Mapping[str, float]], *, title: str, target: float | None = None
) -> Figure:
    """Objective, accuracy and share of families above their threshold while a merger is trained.

    Args:
        history: One entry per look at the validation families: ``step``, ``loss``,
            ``validation_accuracy`` (and one for every group of families),
            ``validation_worst_decile``, ``share_above_threshold``, ``wilson_lower_bound``; what a
            merger's card holds as ``history``.
        title: Headline.
        target: Wilson bound at which training stops, if it does.

    Returns:
        The figure.
    """
    steps = [entry["step"] for entry in history]
    figure = new_figure(10.5, 3.4)
    loss, accuracy, share = figure.subplots(1, 3)

    def curve(
        axes: Axes, name: str, colour: str, label: str | None, *, scale: float = 1.0, **style: Any
    ) -> None:
        values = [scale * entry.get(name, np.nan) for entry in history]
        axes.plot(steps, values, color=colour, label=label, **{"linewidth": 1.8, **style})

    curve(loss, "loss", COLOURS[0], "objective", linewidth=1.4)
    groups = [name for name in history[-1] if name.startswith("validation_accuracy_")]
    for name in groups:
        curve(accuracy, name, GREY, None, scale=100, linewidth=0.7)
        at = (steps[-1], 100 * history[-1][name])
        accuracy.annotate(
            name.removeprefix("validation_accuracy_"),
            at,
            xytext=(3, 0),
            textcoords="offset points",
            fontsize=6,
            color=GREY,
            va="center",
        )
    curve(accuracy, "validation_accuracy", COLOURS[0], "mean of families", scale=100)
    curve(accuracy, "validation_worst_decile", COLOURS[1], "worst tenth", scale=100, linestyle="--")
    curve(share, "share_above_threshold", COLOURS[2], "share", scale=100)
    curve(share, "wilson_lower_bound", COLOURS[2], "lower Wilson bound", scale=100, linestyle="--")
    if target is not None and target <= 1:
        share.axhline(100 * target, color=GREY, linestyle=":", label="target")
    tidy(loss, title="objective", x="step", y="loss of a step")
    tidy(accuracy, title="validation families", x="step", y="accuracy in %")
    tidy(share, title="families above their threshold", x="step", y="in %")
    share.set_ylim(-2, 102)
    for axes in (accuracy, share):
        axes.legend(fontsize=SMALL, frameon=False)
    figure.suptitle(title, fontsize=TITLE, color=INK)
    return figure


def reliability_figure(networks: Mapping[str, Reliability], *, title: str) -> Figure:
    """Accuracy against confidence, and below it how many inputs are that confident.

    Args:
        networks: Name -> bins of the confidence, ``[bins]`` each, such as ``reliability`` gives.
        title: Headline; the calibration errors stand in the legend.

    Returns:
        The figure.
    """
    figure = new_figure(5.6, 5.2)
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.plot([0, 100], [0, 100], color=GREY, linewidth=1, linestyle="--", zorder=0)
    for place, (name, bins) in enumerate(networks.items()):
        colour, there = COLOURS[place % len(COLOURS)], (bins.share > 0).numpy()
        gap = (bins.share * (bins.confidence - bins.accuracy).abs()).nansum()
        top.plot(
            100 * bins.confidence.numpy()[there],
            100 * bins.accuracy.numpy()[there],
            color=colour,
            marker=MARKERS[place % len(MARKERS)],
            markersize=5,
            linewidth=1.5,
            label=f"{name} (ECE {100 * float(gap):.1f})",
        )
        edges = np.linspace(0, 100, len(bins.share) + 1)
        below.stairs(100 * bins.share.numpy(), edges, color=colour, linewidth=1.5)
    tidy(top, y="accuracy in %")
    tidy(below, x="confidence in %", y="inputs in %")
    top.fill_between([0, 100], [0, 100], 0, color=FAINT, alpha=0.35, linewidth=0, zorder=-1)
    top.text(97, 4, "overconfident", ha="right", fontsize=SMALL, color=GREY)
    top.text(3, 93, "underconfident", fontsize=SMALL, color=GREY)
    top.set_xlim(0, 100)
    top.set_ylim(0, 100)
    figure.legend(fontsize=SMALL, frameon=False, loc="outside lower center", ncols=2)
    figure.suptitle(title, fontsize=TITLE, color=INK)
    return figure
