"""Pictures of a zoo, readable on light and dark backgrounds."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from zoo.style import COLOURS, GREY, INK, MARKERS, SEQUENTIAL, SMALL, TITLE, new_figure, tidy


def weight_space_figure(
    spaces: dict[str, Tensor], scores: Tensor, *, label: str, title: str
) -> Figure:
    """Members in the plane of their first two principal components, once per space.

    Args:
        spaces: Headline -> coordinates ``[f, m, 2]``.
        scores: What colours them, ``[f, m]``; NaN is grey.
        label: What the colour says.
        title: Headline of all.

    Returns:
        The figure: one marker per family.
    """
    figure = new_figure(5 * len(spaces) + 1, 4.6)
    panels = np.atleast_1d(figure.subplots(1, len(spaces)))
    known = scores[scores.isfinite()]
    ends = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    dots = None
    for axes, (name, points) in zip(panels, spaces.items(), strict=True):
        for family, own in enumerate(points.numpy()):
            style = {"marker": MARKERS[family % len(MARKERS)], "s": 46, "linewidths": 0.5}
            axes.scatter(*own.T, color="#bbbbbb", edgecolors="#555555", **style)
            known = scores[family].isfinite().numpy()
            dots = axes.scatter(
                *own[known].T,
                c=scores[family].numpy()[known],
                cmap=SEQUENTIAL,
                vmin=ends[0],
                vmax=ends[1],
                edgecolors="#333333",
                **style,
            )
        tidy(axes, title=name, x="first principal component", y="second")
    figure.colorbar(dots, ax=list(panels), label=label, shrink=0.8)
    figure.suptitle(title, fontsize=TITLE, color=INK)
    return figure


def segments_figure(
    counts: Sequence[Tensor], labels: Sequence[str], *, title: str, label: str
) -> Figure:
    """What every segment holds: members as rows, classes as columns, one panel per family.

    Args:
        counts: Per family, rows per member and class, ``[m, classes]``.
        labels: Names of the classes.
        title: Headline.
        label: What is counted.

    Returns:
        The figure.
    """
    members, classes = counts[0].shape
    across = min(len(counts), 4)
    down = -(-len(counts) // across)
    width = max(2.2, 0.26 * classes + 0.6)
    figure = new_figure(across * width + 1, down * (0.3 * members + 1) + 0.5)
    panels = np.atleast_1d(figure.subplots(down, across, squeeze=False)).flatten()
    most = max(int(own.max()) for own in counts)
    shown = None
    for family, (axes, own) in enumerate(zip(panels, counts, strict=False)):
        shown = axes.imshow(own.numpy(), aspect="auto", cmap="Blues", vmin=0, vmax=most)
        axes.set_xticks(range(classes), labels, fontsize=7, rotation=0 if classes <= 10 else 90)
        axes.set_yticks(range(members), range(members), fontsize=7)
        axes.set_title(f"family {family}", fontsize=8)
        axes.set_ylabel("member", fontsize=7)
    for axes in panels[len(counts) :]:
        axes.axis("off")
    figure.colorbar(shown, ax=list(panels), label=label, shrink=0.8)
    figure.suptitle(title, fontsize=TITLE, color=INK)
    return figure


def curves_figure(curves: dict[str, Tensor], *, title: str) -> Figure:
    """Loss over epochs, a thin line per member and a thick one for their mean.

    Args:
        curves: Headline -> losses ``[n, epochs]``, NaN where a member had ended.
        title: Headline of all.

    Returns:
        The figure.
    """
    figure = new_figure(5 * len(curves), 3.4)
    for axes, (name, losses) in zip(
        np.atleast_1d(figure.subplots(1, len(curves))), curves.items(), strict=True
    ):
        epochs = np.arange(1, losses.shape[1] + 1)
        marker = "." if losses.shape[1] < 3 else None
        axes.plot(
            epochs, losses.numpy().T, color=COLOURS[0], linewidth=0.5, alpha=0.35, marker=marker
        )
        there = losses.isfinite().any(0).numpy()
        mean = losses.nanmean(0).numpy()
        axes.plot(
            epochs[there], mean[there], color=COLOURS[1], linewidth=2, label="mean", marker=marker
        )
        if float(losses.nan_to_num(nan=1.0).min()) > 0:
            axes.set_yscale("log")
        axes.legend(frameon=False, fontsize=SMALL)
        tidy(axes, title=name, x="epoch")
    figure.suptitle(title, fontsize=TITLE, color=INK)
    return figure


def path_figure(path: Tensor, change: dict[str, Tensor], *, member: int, title: str) -> Figure:
    """How weights moved while they were trained: their path in the plane, and layer by layer.

    Args:
        path: Coordinates of all members of a family on their way, ``[m, s, 2]``.
        change: Tensor -> distance from its start relative to its norm at the start, ``[s]``, for
            one member.
        member: Which member that is.
        title: Headline.

    Returns:
        The figure.
    """
    figure = new_figure(11, 4)
    plane, layers = figure.subplots(1, 2)
    for number, own in enumerate(path.numpy()):
        chosen = number == member
        colour = COLOURS[1] if chosen else GREY
        label = f"member {member}" if chosen else None
        plane.plot(*own.T, color=colour, linewidth=1.8 if chosen else 0.8, marker=".", label=label)
        plane.scatter(*own[0], marker="x", color=colour, zorder=3)
    title_of_plane = "all members, from their start (x) on"
    tidy(plane, title=title_of_plane, x="first principal component", y="second")
    plane.legend(frameon=False, fontsize=SMALL)
    time = np.linspace(0, 100, path.shape[1])
    for number, (key, distance) in enumerate(change.items()):
        layers.plot(time, distance.numpy(), color=COLOURS[number % len(COLOURS)], label=key)
    what = "distance from its start / norm of its start"
    tidy(layers, title=f"member {member}, tensor by tensor", x="training in %", y=what)
    layers.legend(frameon=False, fontsize=7)
    figure.suptitle(title, fontsize=TITLE, color=INK)
    return figure
