"""Pictures of comparisons, readable on light and dark backgrounds."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

COLOURS = ("#3b7dd8", "#e08214", "#2a9d6f", "#b1509b", "#8c6d31")


def leaderboard_figure(rows: Sequence[dict[str, Any]], *, title: str) -> Figure:
    """Accuracy of every method, a dot with its spread over families, one colour per family size.

    Args:
        rows: Rows of ``leaderboard.json``.
        title: Headline.

    Returns:
        The figure.
    """
    sizes = sorted({row["members"] for row in rows})
    largest = {row["method"]: row["accuracy_mean"] for row in rows if row["members"] == sizes[-1]}
    methods = sorted({row["method"] for row in rows}, key=lambda m: largest.get(m, 0.0))
    figure = Figure(figsize=(8, 0.36 * len(methods) + 1.6), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for place, size in enumerate(sizes):
        own = [row for row in rows if row["members"] == size]
        offset = (place - (len(sizes) - 1) / 2) * 0.2
        axes.errorbar(
            [100 * row["accuracy_mean"] for row in own],
            [methods.index(row["method"]) + offset for row in own],
            xerr=[100 * row["accuracy_std"] for row in own],
            fmt="o",
            markersize=4,
            linewidth=1,
            color=COLOURS[place % len(COLOURS)],
            label=f"K = {size}",
        )
    control = {row["method"] for row in rows if row["control"]}
    labels = [f"{m} (control)" if m in control else m for m in methods]
    axes.set_yticks(range(len(methods)), labels, fontsize=8)
    for label, method in zip(axes.get_yticklabels(), methods, strict=True):
        label.set_fontweight("bold" if method.startswith("gnn") else "normal")
    axes.set_xlabel("test accuracy in %, mean and standard deviation over families", fontsize=9)
    axes.grid(axis="x", linewidth=0.4, alpha=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", fontsize=8, frameon=False)
    axes.set_title(title, fontsize=10)
    return figure
