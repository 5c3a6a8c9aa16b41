"""Pictures of comparisons, mergers and families: plain data in, a matplotlib figure out."""

from evaluation.pictures.curves import reliability_figure, training_figure
from evaluation.pictures.drawing import comparison_figures, family_figures
from evaluation.pictures.gathering import (
    barriers_of,
    lines_of,
    mixing_of,
    planes_of,
    reliabilities_of,
    variances_of,
)
from evaluation.pictures.landscapes import (
    Lines,
    Plane,
    barrier_figure,
    interpolation_figure,
    weight_plane_figure,
)
from evaluation.pictures.layers import mixing_figure, variance_figure
from evaluation.pictures.tables import accuracy_figure, cost_figure, leaderboard_figure

__all__ = [
    "Lines",
    "Plane",
    "accuracy_figure",
    "barrier_figure",
    "barriers_of",
    "comparison_figures",
    "cost_figure",
    "family_figures",
    "interpolation_figure",
    "leaderboard_figure",
    "lines_of",
    "mixing_figure",
    "mixing_of",
    "planes_of",
    "reliabilities_of",
    "reliability_figure",
    "training_figure",
    "variance_figure",
    "variances_of",
    "weight_plane_figure",
]
