"""Gated consensus: trust the members that were right on the most similar labelled examples.

Papers: Woods, Kegelmeyer, Bowyer, "Combination of Multiple Classifiers Using Local Accuracy
Estimates", IEEE Transactions on Pattern Analysis and Machine Intelligence 19(4), 1997 (the locally
best member decides); Ko, Sabourin, Britto, "From Dynamic Classifier Selection to Dynamic Ensemble
Selection", Pattern Recognition 41(5), 2008 (KNORA-UNION: a vote per neighbour that a member knows).
Here members count by their share of neighbours to the power ``sharpness``: 1 is the second, much is
the first. What is mixed are probabilities, not votes.

Shape comments: m members, b inputs, n labelled examples, c classes, d features.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metamerge.ensembles.kinds import consensus
from metamerge.ensembles.watching import Seen, check_labels, check_outputs
from metamerge.ensembles.weighted_consensus import pooled
from metamerge.errors import ConfigError
from metamerge.options import check_choice, check_count, check_number

NEIGHBOURS = (20, 10, 5, 3, 1)
_SIMILAR = ("inputs", "activations")
_ROWS = 2**24  # distances that are held at once
_SLACK = 1e-6  # relative; distances as near as this to each other are equal


@consensus(paper="doi:10.1016/j.patcog.2007.10.015")
def gated_consensus(
    seen: Seen,
    labels: Tensor,
    *,
    neighbours: int | None = None,
    sharpness: float = 4.0,
    similar: str = "inputs",
    report: dict[str, Any] | None = None,
) -> "GatedConsensus":
    """Remember which members were right on which labelled examples.

    Args:
        seen: What members say about the examples, and the examples; with
            ``similar="activations"`` what their last layers read, too.
        labels: The examples' classes, ``[n]``.
        neighbours: How many of the nearest examples count; all that are as near as the last of
            them count, too. By default that one of ``NEIGHBOURS`` with the lowest cross entropy
            when every example is judged by all the others.
        sharpness: Power of a member's share of neighbours that it was right on, above 0.
        similar: What is compared, by Euclidean distance: ``inputs``, or ``activations``, those of
            all members together, each member's divided by their spread.
        report: Takes the number of neighbours and the losses it was chosen by.

    Returns:
        The consensus.

    Raises:
        ConfigError: If an option is out of its range, what is to be compared was not seen, or
            labels do not fit the outputs.
    """
    check_outputs("gated_consensus", seen.outputs)
    check_labels("gated_consensus", labels, seen.outputs)
    _check(neighbours, sharpness, similar, len(labels))
    scale = _spread(seen) if similar == "activations" else torch.ones(len(seen.outputs))
    right = seen.outputs.argmax(-1) == labels  # [m, n]
    points = _points(seen, scale, similar)
    losses = {} if neighbours else _losses(seen.outputs, labels, points, right, sharpness)
    chosen = neighbours or min(losses, key=losses.__getitem__, default=1)  # the most of equals
    if report is not None:
        report.update(neighbours=chosen, held_out_loss={str(k): v for k, v in losses.items()})
    return GatedConsensus(
        points, right, scale, neighbours=chosen, sharpness=float(sharpness), similar=similar
    )


class GatedConsensus(nn.Module):
    """A mean of the members' probabilities, weighted for each input by who was right near it.

    Where no member was right on any neighbour, all count the same: that is the soft vote.

    Args:
        points: Features of the labelled examples, ``[n, d]``.
        right: Which member was right on which example, ``[m, n]``.
        scale: What each member's activations are divided by, ``[m]``.
        neighbours: How many of the nearest examples count.
        sharpness: Power of a member's share of them.
        similar: What is compared; see ``gated_consensus``.
    """

    def __init__(
        self,
        points: Tensor,
        right: Tensor,
        scale: Tensor,
        *,
        neighbours: int,
        sharpness: float,
        similar: str = "inputs",
    ) -> None:
        super().__init__()
        self.register_buffer("points", points)
        self.register_buffer("right", right)
        self.register_buffer("scale", scale)
        self.options = {"neighbours": neighbours, "sharpness": sharpness, "similar": similar}
        self.reads_activations = similar == "activations"

    def forward(self, seen: Seen) -> Tensor:
        """Logarithms of the weighted mean of probabilities, ``[m, b, c]`` -> ``[b, c]``."""
        check_outputs("gated_consensus", seen.outputs, len(self.right))
        asked = _points(seen, self.scale, self.options["similar"])
        counts = [
            _counts(_distances(some, self.points), self.right, self.options["neighbours"])
            for some in asked.split(max(1, _ROWS // len(self.points)))
        ]
        weights = _trust(torch.cat(counts, 1), self.options["sharpness"])
        return pooled(seen.outputs, weights.to(seen.outputs))


def _points(seen: Seen, scale: Tensor, similar: str) -> Tensor:
    """What is compared, ``[b, d]``."""
    found = seen.inputs if similar == "inputs" else seen.activations
    if found is None:
        raise ConfigError(f"gated_consensus: similar={similar!r}, but none were seen. Pass them.")
    if similar == "inputs":
        return found.flatten(1)
    return (found / scale[:, None, None]).movedim(0, 1).flatten(1)


def _spread(seen: Seen) -> Tensor:
    """Root mean square distance of each member's activations to their mean, ``[m]``; 1 for 0."""
    if seen.activations is None:
        raise ConfigError("gated_consensus: similar='activations', but none were seen. Pass them.")
    deviation = seen.activations - seen.activations.mean(1, keepdim=True)
    found = deviation.square().sum(-1).mean(1).sqrt()
    return found.where(found > 0, 1.0)


def _distances(asked: Tensor, points: Tensor) -> Tensor:
    # the way over matrix products is faster, and blind to what is nearer than a thousandth
    return torch.cdist(asked, points, compute_mode="donot_use_mm_for_euclid_dist")


def _counts(distances: Tensor, right: Tensor, neighbours: int) -> Tensor:
    """Share of the nearest examples that each member was right on, ``[b, n]`` -> ``[m, b]``."""
    last = distances.kthvalue(neighbours, -1, keepdim=True).values
    near = (distances <= last * (1 + _SLACK)).float()  # [b, n]
    return right.float() @ near.T / near.sum(1)


def _trust(shares: Tensor, sharpness: float) -> Tensor:
    """Weights of the members, which sum to 1, ``[m, b]`` -> ``[m, b]``."""
    best = shares.amax(0)
    # relative to the best, so that no power of it is too small for a float
    powers = (shares / best.where(best > 0, 1.0)).pow(sharpness)
    powers = torch.where(best > 0, powers, 1.0)
    return powers / powers.sum(0)


def _losses(
    logits: Tensor,
    labels: Tensor,
    points: Tensor,
    right: Tensor,
    sharpness: float,
) -> dict[int, float]:
    """Cross entropy where every example is judged by all the others, per number of neighbours."""
    count = len(labels)
    tried = [k for k in NEIGHBOURS if k < count]
    losses = dict.fromkeys(tried, 0.0)
    rows = torch.arange(count, device=labels.device)
    for some in rows.split(max(1, _ROWS // count)):
        distances = _distances(points[some], points)
        distances[torch.arange(len(some)), some] = torch.inf  # not by itself
        for k in tried:
            weights = _trust(_counts(distances, right, k), sharpness)
            said = pooled(logits[:, some], weights.to(logits))
            losses[k] += float(F.nll_loss(said, labels[some], reduction="sum")) / count
    return losses


def _check(neighbours: int | None, sharpness: float, similar: str, examples: int) -> None:
    limit, chosen = "the number of examples", "to have it chosen"
    check_count("gated_consensus", "neighbours", neighbours, 1, examples, limit=limit, none=chosen)
    check_number("gated_consensus", "sharpness", sharpness, "(0, inf)")
    check_choice("gated_consensus", "similar", similar, _SIMILAR)
