"""Scores of runs on their test rows, whole and cluster by cluster."""

import torch
import torch.nn.functional as F
from torch import Tensor

from metamerge.structure import Program, run
from metamerge.weights import Weights
from trainers.cluster_runs import Prepared

NAMES = {True: ("mae", "mse"), False: ("error", "cross_entropy")}
"""Scores of a regression and of a classification; smaller is better."""


def test_outputs(program: Program, weights: Weights, prepared: Prepared) -> Tensor:
    """Outputs of every run for its own test rows.

    Args:
        program: The network.
        weights: Stacked state dicts ``[r, ...]``.
        prepared: The runs.

    Returns:
        ``[r, t, c]``.
    """
    own = torch.arange(len(prepared.test)).unsqueeze(1)
    inputs = prepared.runs.inputs[own, prepared.test]
    with torch.no_grad():
        return run(program, weights, [inputs], stacked=True, own_inputs=True)


def row_scores(outputs: Tensor, prepared: Prepared) -> dict[str, Tensor]:
    """Score outputs for the test rows of every run.

    Args:
        outputs: ``[r, t, c]``.
        prepared: The runs; the first ones where there are more of them than outputs.

    Returns:
        Per row ``[r, t]``: absolute and squared error in units of the target, mean over outputs;
        or whether a class is wrong, and its cross entropy.
    """
    count = len(outputs)
    own = torch.arange(count).unsqueeze(1)
    targets = prepared.runs.targets[own, prepared.test[:count]]
    if prepared.scale is None:
        wrong = (outputs.argmax(-1) != targets).float()
        losses = F.cross_entropy(outputs.movedim(-1, 1), targets, reduction="none")
        return dict(zip(NAMES[False], (wrong, losses), strict=True))
    misses = (outputs - targets) * prepared.scale[:count].unsqueeze(1)
    return dict(zip(NAMES[True], (misses.abs().mean(-1), misses.square().mean(-1)), strict=True))


def run_scores(scores: dict[str, Tensor]) -> dict[str, list[float]]:
    """Mean over test rows.

    Args:
        scores: Per row, ``[r, t]`` each.

    Returns:
        Per run.
    """
    return {name: values.mean(1).tolist() for name, values in scores.items()}


def cluster_scores(scores: dict[str, Tensor], prepared: Prepared) -> dict[str, list[float]]:
    """Mean over the test rows of every cluster, then over runs.

    Args:
        scores: Per row, ``[r, t]`` each.
        prepared: The runs, which know the cluster of a test row.

    Returns:
        Per cluster; runs without a test row in it have no say.
    """
    inside = F.one_hot(prepared.nearest, prepared.members).float()  # [r, t, k]
    rows = inside.sum(1)  # [r, k]
    return {
        name: ((values.unsqueeze(-1) * inside).sum(1) / rows).nanmean(0).tolist()
        for name, values in scores.items()
    }
