"""Pictures of what happens layer by layer: who is mixed into which unit, and how units vary."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from torch import Tensor

from zoo.style import COLOURS, DIVERGING, GREY, INK, LABEL, MARKERS, SMALL, TITLE, new_figure, tidy

_WIDE = 10  # columns up to which units keep their names


def mixing_figure(
    mixing: Mapping[str, Tensor], *, title: str, columns: Mapping[str, str] | None = None
) -> Figure:
    """Share of every member in every unit, a panel per layer; white is an equal share.

    Beside each panel stands a member's mean share over the units of the layer.

    Args:
        mixing: Name of a layer -> coefficients, ``[m, n]``, whose columns sum to 1.
        title: Headline.
        columns: Name of a layer -> what its columns are; ``unit`` if not told.

    Returns:
        The figure.
    """
    members = len(next(iter(mixing.values())))
    equal = 1 / members
    spread = max(float((own - equal).abs().max()) for own in mixing.values())
    spread = max(spread, 1e-3)
    norm = TwoSlopeNorm(equal, max(0.0, equal - spread) - 1e-9, equal + spread)
    widths = [min(3.4, max(1.7, 0.045 * own.shape[1] + 1.2)) for own in mixing.values()]
    figure = new_figure(sum(widths) + 1.2 + 0.5 * len(widths), 0.28 * members + 1.5)
    panels = figure.subplots(
        1, 2 * len(widths), width_ratios=[part for width in widths for part in (width, 0.3)]
    )
    shown = None
    for place, (name, own) in enumerate(mixing.items()):
        axes, beside = panels[2 * place], panels[2 * place + 1]
        shown = axes.imshow(
            own.numpy(), aspect="auto", cmap=DIVERGING, norm=norm, interpolation="nearest"
        )
        told = (columns or {}).get(name, "unit")
        tidy(axes, title=name, x=told, y="member" if place == 0 else "", grid="none")
        axes.set_yticks(range(members))
        if own.shape[1] <= _WIDE:
            axes.set_xticks(range(own.shape[1]))
        _means(beside, own, norm)
    bar = figure.colorbar(shown, ax=list(panels), shrink=0.9)
    bar.set_label("share of the member", fontsize=LABEL, color=INK)
    bar.ax.set_yscale("linear")
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    bar.ax.tick_params(labelsize=SMALL)
    figure.suptitle(title, fontsize=TITLE, color=INK)
    return figure


def variance_figure(ratios: Mapping[str, Mapping[str, Tensor]], *, title: str) -> Figure:
    """Variance of fused units over that of the members, layer by layer; 1 is healthy.

    Args:
        ratios: Name of a method -> key of a layer's weight -> ratio of every family, ``[f]``.
        title: Headline.

    Returns:
        The figure: means over families on a log scale, with their range.
    """
    layers = list(next(iter(ratios.values())))
    figure = new_figure(max(6.0, 0.5 * len(layers) + 4.2), 3.6)
    axes = figure.subplots()
    at = np.arange(len(layers))
    for place, (name, own) in enumerate(ratios.items()):
        values = np.stack([own[layer].double().numpy() for layer in layers])  # [layers, f]
        colour = COLOURS[place % len(COLOURS)]
        shift = at + 0.06 * (place - (len(ratios) - 1) / 2)
        axes.plot(
            shift,
            np.exp(np.log(values).mean(1)),
            color=colour,
            marker=MARKERS[place % len(MARKERS)],
            markersize=5,
            linewidth=1.6,
            label=name,
        )
        axes.vlines(shift, values.min(1), values.max(1), color=colour, linewidth=1, alpha=0.6)
    axes.axhline(1, color=GREY, linewidth=1, linestyle="--", zorder=0)
    axes.set_yscale("log")
    ends = axes.get_ylim()
    narrow = ends[1] < 20 * ends[0]
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if narrow else (1, 3)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(at, layers, rotation=0 if len(layers) < 7 else 60, fontsize=SMALL)
    axes.set_xlim(-0.4, len(layers) - 0.6)
    tidy(axes, x="layer, from input to output", y="variance / variance of members")
    figure.legend(fontsize=SMALL, frameon=False, loc="outside right center")
    figure.suptitle(title, fontsize=TITLE, color=INK)
    return figure


def _means(axes: Axes, own: Tensor, norm: TwoSlopeNorm) -> None:
    """A narrow column of means, in numbers."""
    mean = own.mean(1, keepdim=True).numpy()
    axes.imshow(mean, aspect="auto", cmap=DIVERGING, norm=norm)
    for row, value in enumerate(mean[:, 0]):
        axes.text(0, row, f"{value:.0%}", ha="center", va="center", fontsize=6, color=INK)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title("mean", fontsize=SMALL, color=INK)
    axes.spines[:].set_visible(False)
