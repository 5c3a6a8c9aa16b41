"""Pictures of the loss between networks: on lines, for all pairs, and in a plane of weights."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from zoo.style import COLOURS, INK, LABEL, SEQUENTIAL, SMALL, TITLE, new_figure, tidy


class Lines(NamedTuple):
    """Loss and score on the lines between pairs of networks.

    Attributes:
        loss: ``[pairs, points]``, ends included.
        score: Accuracy, or R2, ``[pairs, points]``.
    """

    loss: Tensor
    score: Tensor


class Plane(NamedTuple):
    """Loss in a plane of weights, and networks in it.

    Attributes:
        x: Places of the grid along the first axis, ``[gx]``.
        y: Along the second, ``[gy]``.
        loss: ``[gy, gx]``.
        networks: Kind (``members``, ``average``, a method) -> places, ``[n, 2]``.
        losses: Kind -> losses of the networks themselves, ``[n]``: those that lie outside the
            plane are drawn where they are projected.
    """

    x: Tensor
    y: Tensor
    loss: Tensor
    networks: Mapping[str, Tensor]
    losses: Mapping[str, Tensor]


def interpolation_figure(
    lines: Mapping[str, Lines], *, title: str, score: str = "accuracy in %"
) -> Figure:
    """Loss and score from one network to another: thin lines for pairs, thick for their mean.

    Every line starts at the member with the larger loss. The legend tells the means over pairs of
    the largest rise above the straight line between the ends, or fall below it.

    Args:
        lines: What was done to the networks (``as trained``, ``aligned``) -> their lines.
        title: Headline.
        score: What the score is; in per cent where its name ends so.

    Returns:
        The figure.
    """
    figure = new_figure(8.4, 3.6)
    panels, (factor, unit) = figure.subplots(1, 2), (100, " points") if "%" in score else (1, "")
    for place, (name, own) in enumerate(lines.items()):
        worse_first = own.loss[:, :1] >= own.loss[:, -1:]
        loss, reached = (torch.where(worse_first, x, x.flip(1)) for x in own)
        shown = {
            f"{name}: barrier {float(_above(loss).mean()):.2f}": loss,
            f"{name}: {factor * float(_above(-reached).mean()):.2g}{unit} lost": factor * reached,
        }
        for axes, (label, values) in zip(panels, shown.items(), strict=True):
            _pairs(axes, values, COLOURS[place % len(COLOURS)], label)
    for axes, y in zip(panels, ("loss", score), strict=True):
        tidy(axes, x="share of the better member, the rest is the worse one", y=y)
        axes.legend(fontsize=SMALL, frameon=False)
    figure.suptitle(title, fontsize=TITLE, color=INK)
    return figure


def _pairs(axes: Axes, values: Tensor, colour: str, label: str) -> None:
    time = np.linspace(0, 1, values.shape[1])
    axes.plot(time, values.numpy().T, color=colour, linewidth=0.6, alpha=0.3)
    axes.plot(time, values.mean(0).numpy(), color=colour, linewidth=2.2, label=label)


def _above(values: Tensor) -> Tensor:
    """How far each line rises above the straight one between its ends, ``[pairs]``."""
    time = torch.linspace(0, 1, values.shape[1]).to(values)
    chord = values[:, :1] + (values[:, -1:] - values[:, :1]) * time
    return (values - chord).amax(1)


def barrier_figure(barriers: Mapping[str, Tensor], *, title: str) -> Figure:
    """Loss barriers between all pairs of members, a matrix for each state, on one scale.

    Args:
        barriers: What was done to the members -> ``[m, m]``.
        title: Headline.

    Returns:
        The figure.
    """
    figure = new_figure(3.3 * len(barriers) + 1, 3.5)
    panels = figure.subplots(1, len(barriers), squeeze=False)[0]
    most = max(float(matrix.max()) for matrix in barriers.values()) or 1.0
    shown = None
    for axes, (name, matrix) in zip(panels, barriers.items(), strict=True):
        shown = axes.imshow(matrix.numpy(), cmap=SEQUENTIAL, vmin=0, vmax=most)
        count = len(matrix)
        mean = float(matrix.sum() / (count * (count - 1)))
        tidy(axes, title=f"{name}: mean {mean:.2f}", x="member", y="member", grid="none")
        axes.set_xticks(range(count))
        axes.set_yticks(range(count))
        if count <= 10:
            for i in range(count):
                for j in range(count):
                    value = float(matrix[i, j])
                    light = value < 0.6 * most
                    colour = "white" if light else "black"
                    if i != j:
                        text = f"{value:.2f}"
                        axes.text(j, i, text, ha="center", va="center", fontsize=6, color=colour)
    bar = figure.colorbar(shown, ax=list(panels), shrink=0.85)
    bar.set_label("loss barrier", fontsize=LABEL, color=INK)
    bar.ax.tick_params(labelsize=SMALL)
    figure.suptitle(title, fontsize=TITLE, color=INK)
    return figure


def weight_plane_figure(planes: Mapping[str, Plane], *, title: str) -> Figure:
    """Members, their average and fused networks on the loss in the plane of two components.

    Dots have the colour of their own loss, so that one that lies outside the plane stands out from
    what is around it.

    Args:
        planes: What was done to the members (``as trained``, ``aligned``) -> the plane.
        title: Headline.

    Returns:
        The figure.
    """
    figure = new_figure(4.3 * len(planes) + 1.0, 4.4)
    panels = figure.subplots(1, len(planes), squeeze=False)[0]
    values = np.concatenate([plane.loss.flatten().numpy() for plane in planes.values()])
    own = np.concatenate([x.numpy() for plane in planes.values() for x in plane.losses.values()])
    low = max(min(values.min(), own.min()), 1e-4)
    norm = LogNorm(low, max(np.quantile(values, 0.98), low * 1.5))
    kinds = list(dict.fromkeys(kind for plane in planes.values() for kind in plane.networks))
    shown = None
    for axes, (name, plane) in zip(panels, planes.items(), strict=True):
        levels = np.geomspace(norm.vmin, norm.vmax, 14)
        shown = axes.contourf(
            plane.x, plane.y, plane.loss, levels=levels, norm=norm, cmap=SEQUENTIAL, extend="both"
        )
        axes.contour(
            plane.x, plane.y, plane.loss, levels=levels, colors="white", linewidths=0.4, alpha=0.5
        )
        for kind, places in plane.networks.items():
            _dots(axes, kind, kinds.index(kind), places, plane.losses[kind], norm)
        tidy(axes, title=name, x="first principal component", y="second", grid="none")
        axes.set_aspect("equal")
    bar = figure.colorbar(shown, ax=list(panels), shrink=0.85, format="%.2g")
    bar.set_label("loss, log scale", fontsize=LABEL, color=INK)
    bar.ax.tick_params(labelsize=SMALL)
    figure.legend(
        *panels[-1].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(kinds),
        fontsize=SMALL,
        frameon=False,
    )
    figure.suptitle(title, fontsize=TITLE, color=INK)
    return figure


def _dots(axes: Axes, kind: str, place: int, points: Tensor, losses: Tensor, norm: LogNorm) -> None:
    """Networks of one kind, filled with the colour of their own loss."""
    marker = ("o", "s", "*", "D", "^", "P", "X")[place % 7]
    size = {"o": 55, "*": 210}.get(marker, 75)
    fill = colormaps[SEQUENTIAL](norm(losses.numpy()))
    axes.scatter(
        *points.numpy().T,
        c=fill,
        marker=marker,
        s=size,
        edgecolors="white",
        linewidths=2.2,
        zorder=4,
    )
    axes.scatter(
        *points.numpy().T, c=fill, marker=marker, s=size, edgecolors=INK, linewidths=0.9, zorder=5
    )
    axes.scatter([], [], c="white", marker=marker, s=size * 0.7, edgecolors=INK, label=kind)
