"""Scores of networks: batched over networks, in bounded memory; ``python -m evaluation.metrics``.

One file per family of metrics. Everything takes plain tensors: logits or stacked weights in, one
number per network out.
"""

from evaluation.metrics.classification import (
    Answers,
    Reliability,
    accuracy,
    agreement,
    calibration_error,
    class_accuracies,
    classification_scores,
    mixture_accuracies,
    negative_log_likelihood,
    read_answers,
    references,
    reliability,
    soft_vote,
)
from evaluation.metrics.likeness import (
    cosines,
    distances,
    mean_of_pairs,
    output_cosines,
    relative_distances,
)
from evaluation.metrics.paths import Landscape, barriers, landscape, lines, mixtures, simplex
from evaluation.metrics.regression import (
    mean_absolute_error,
    mean_squared_error,
    r2,
    regression_scores,
)
from evaluation.metrics.scoring import family_logits, score_networks, score_outputs
from evaluation.metrics.tasks import common_task
from metamerge.corrections.variance import unit_variances, variance_ratio

__all__ = [
    "Answers",
    "Landscape",
    "Reliability",
    "accuracy",
    "agreement",
    "barriers",
    "calibration_error",
    "class_accuracies",
    "classification_scores",
    "common_task",
    "cosines",
    "distances",
    "family_logits",
    "landscape",
    "lines",
    "mean_absolute_error",
    "mean_of_pairs",
    "mean_squared_error",
    "mixture_accuracies",
    "mixtures",
    "negative_log_likelihood",
    "output_cosines",
    "r2",
    "read_answers",
    "references",
    "regression_scores",
    "relative_distances",
    "reliability",
    "score_networks",
    "score_outputs",
    "simplex",
    "soft_vote",
    "unit_variances",
    "variance_ratio",
]
