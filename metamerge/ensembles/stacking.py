"""Stacking: logistic regression on what all members say about all classes.

Papers: Wolpert, "Stacked Generalization", Neural Networks 5(2), 1992; that the second level should
read probabilities, not classes: Ting and Witten, "Issues in Stacked Generalization", Journal of
Artificial Intelligence Research 10, 1999. We differ in one point: the logarithms of the soft vote
are added to the scores, so that a strong ridge leads back to the vote and not to equal
probabilities. Members were trained on other data than the labels given here, so no folds are needed
to get their outputs; folds choose the ridge.

Shape comments: m members, b inputs, c classes, r fits side by side.
"""

from typing import Any

import torch
from torch import Tensor, nn

from metamerge.ensembles.fitting import Added, fit_on_vote
from metamerge.ensembles.kinds import consensus
from metamerge.ensembles.votes import log_soft_vote
from metamerge.ensembles.watching import Seen, check_labels, check_outputs, features


@consensus(paper="doi:10.1016/S0893-6080(05)80023-1")
def stacking(
    seen: Seen,
    labels: Tensor,
    *,
    of: str = "probabilities",
    generator: torch.Generator | None = None,
    report: dict[str, Any] | None = None,
) -> "Stacking":
    """Fit a weight for what every member says about a class, for each class that it may speak for.

    Args:
        seen: What members say about the inputs.
        labels: Their classes, ``[b]``.
        of: What is read: ``probabilities``, or ``logits``, centred over classes (which makes them
            logarithms of probabilities) and divided by their member's root mean square.
        generator: Deals inputs to the folds that choose the ridge.
        report: Takes the ridge and the losses on held-out inputs.

    Returns:
        The consensus.

    Raises:
        ConfigError: If ``of`` is unknown, or labels do not fit the outputs.
    """
    check_outputs("stacking", seen.outputs)
    check_labels("stacking", labels, seen.outputs)
    members, _, classes = seen.outputs.shape
    numbers, scale = fit_on_vote(
        "stacking",
        seen.outputs,
        labels,
        _regressed,
        shape=(members * classes + 1, classes),
        of=of,
        generator=generator,
        report=report,
    )
    return Stacking(numbers, scale, of=of)


class Stacking(nn.Module):
    """Logistic regression on the members' outputs, on top of their soft vote.

    Args:
        numbers: Weights, and in the last row shifts, ``[m * c + 1, c]``.
        scale: What logits are divided by, ``[m]``.
        of: What is read; see ``stacking``.
    """

    def __init__(self, numbers: Tensor, scale: Tensor, *, of: str = "probabilities") -> None:
        super().__init__()
        self.register_buffer("numbers", numbers)
        self.register_buffer("scale", scale)
        self.options = {"of": of}

    def forward(self, seen: Seen) -> Tensor:
        """Logarithms of probabilities, ``[m, b, c]`` -> ``[b, c]``."""
        check_outputs("stacking", seen.outputs, len(self.scale))
        added = _regressed(features(seen.outputs, self.scale, self.options["of"]))(self.numbers)
        return (log_soft_vote(seen.outputs) + added).log_softmax(-1)


def _regressed(table: Tensor) -> Added:
    """The regression on a table ``[m, b, c]``, ``[..., m * c + 1, c]`` -> ``[..., b, c]``."""
    rows = table.movedim(0, 1).flatten(1)
    rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)  # [b, m * c + 1]
    return lambda numbers: rows @ numbers
