"""How all pictures look: opaque white, so that they read alike on light and dark pages.

Colours are those of Okabe and Ito, "Color Universal Design" (2008), which people with any colour
vision tell apart; two series never differ by colour alone where markers or labels can help.
"""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5B4A9E")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INK = "#222222"
GREY = "#8a8a8a"  # what only serves as a reference
FAINT = "#d9d9d9"
SEQUENTIAL = "viridis"  # of amounts
DIVERGING = "RdBu_r"  # of amounts above and below a middle
TITLE, LABEL, SMALL = 10, 9, 8  # points


def new_figure(width: float, height: float) -> Figure:
    """An empty figure.

    Args:
        width: In inches.
        height: In inches.

    Returns:
        The figure; its parts find their places by themselves.
    """
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def tidy(axes: Axes, *, title: str = "", x: str = "", y: str = "", grid: str = "both") -> None:
    """Give axes their labels, a quiet grid and no frame.

    Args:
        axes: The axes; they are changed.
        title: Above them.
        x: Below them.
        y: On their left.
        grid: Lines across ``x``, ``y``, ``both`` or ``none``.
    """
    axes.set_title(title, fontsize=LABEL, color=INK)
    axes.set_xlabel(x, fontsize=LABEL, color=INK)
    axes.set_ylabel(y, fontsize=LABEL, color=INK)
    axes.tick_params(labelsize=SMALL, colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.set_axisbelow(True)
    if grid != "none":
        axes.grid(axis=grid, linewidth=0.5, color=FAINT)
