"""All pictures of a comparison, and of one family of it, under the names of their files."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from torch import nn

from evaluation.bench import Bench
from evaluation.pictures.curves import reliability_figure
from evaluation.pictures.gathering import (
    GATE,
    barriers_of,
    lines_of,
    mixing_of,
    planes_of,
    reliabilities_of,
    variances_of,
)
from evaluation.pictures.landscapes import (
    barrier_figure,
    interpolation_figure,
    weight_plane_figure,
)
from evaluation.pictures.layers import mixing_figure, variance_figure
from evaluation.pictures.tables import accuracy_figure, cost_figure, leaderboard_figure
from metamerge.weights import Weights


def comparison_figures(rows: Sequence[Mapping[str, Any]], *, title: str) -> dict[str, Figure]:
    """Pictures of the rows of a comparison.

    Args:
        rows: Rows of ``leaderboard.json``.
        title: What was compared on.

    Returns:
        ``leaderboard``, ``cost`` and, with families of several sizes, ``accuracy_by_members``.
    """
    figures = {
        "leaderboard": leaderboard_figure(rows, title=title),
        "cost": cost_figure(rows, title=title),
    }
    if len({row["members"] for row in rows}) > 1:
        figures["accuracy_by_members"] = accuracy_figure(rows, title=title)
    return figures


def family_figures(
    bench: Bench,
    fused: Mapping[str, Weights],
    *,
    family: int = 0,
    merger: nn.Module | None = None,
    title: str,
) -> dict[str, Figure]:
    """Pictures of one family and of what was made of it.

    Args:
        bench: The families.
        fused: Name -> fused networks ``[f, ...]``, in the slots of the aligned members.
        family: Which family is drawn; variance and reliability are those of all.
        merger: A trained merger whose mixing is drawn, if any.
        title: What was compared on.

    Returns:
        ``interpolation``, ``barriers``, ``weight_plane``, ``variance``, ``reliability`` and, with a
        merger, ``mixing``.
    """
    one = f"{title}, a family of {bench.members}"
    figures = {
        "interpolation": interpolation_figure(
            lines_of(bench, family), title=f"{one}: lines between all pairs of members"
        ),
        "barriers": barrier_figure(barriers_of(bench, family), title=one),
        "weight_plane": weight_plane_figure(planes_of(bench, family, fused), title=one),
        "variance": variance_figure(variances_of(bench, fused), title=title),
        "reliability": reliability_figure(reliabilities_of(bench, fused), title=title),
    }
    if merger is not None:
        mixing = mixing_of(bench, family, merger)
        figures["mixing"] = mixing_figure(mixing, title=one, columns={GATE: "class"})
    return figures
