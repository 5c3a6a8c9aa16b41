"""Learned consensus: probabilities of all members, each times a learned weight, on top of the vote.

No paper of its own: stacking (Wolpert, "Stacked Generalization", Neural Networks 5(2), 1992) with a
second level so small that a hundred labels suffice. A class's score is

    log mean_k p[k, c]  +  sum_k weight[k, c] p[k, c]  +  shift[c]

and a softmax makes probabilities of the scores. Weights 0 are the soft vote.

Shape comments: m members, b inputs, c classes, r fits side by side.
"""

from typing import Any

import torch
from torch import Tensor, nn

from metamerge.ensembles.fitting import Added, fit_on_vote
from metamerge.ensembles.kinds import consensus
from metamerge.ensembles.votes import log_soft_vote
from metamerge.ensembles.watching import Seen, check_labels, check_outputs, features
from metamerge.options import check_choice

_PER = ("class", "member")


@consensus()
def learned_consensus(
    seen: Seen,
    labels: Tensor,
    *,
    per: str = "class",
    of: str = "probabilities",
    generator: torch.Generator | None = None,
    report: dict[str, Any] | None = None,
) -> "LearnedConsensus":
    """Fit a weight per member and class, or per member, to labelled inputs.

    Args:
        seen: What members say about the inputs.
        labels: Their classes, ``[b]``.
        per: ``class`` for a weight per member and class and a shift per class; ``member`` for a
            weight per member.
        of: What the weights multiply: ``probabilities``, or ``logits``, centred over classes and
            divided by their member's root mean square.
        generator: Deals inputs to the folds that choose the ridge.
        report: Takes the ridge and the losses on held-out inputs.

    Returns:
        The consensus.

    Raises:
        ConfigError: If an option is unknown, or labels do not fit the outputs.
    """
    check_outputs("learned_consensus", seen.outputs)
    check_labels("learned_consensus", labels, seen.outputs)
    check_choice("learned_consensus", "per", per, _PER)
    members, _, classes = seen.outputs.shape
    numbers, scale = fit_on_vote(
        "learned_consensus",
        seen.outputs,
        labels,
        _weighted,
        shape=(members + 1, classes) if per == "class" else (members, 1),
        of=of,
        generator=generator,
        report=report,
    )
    return LearnedConsensus(numbers, scale, of=of)


class LearnedConsensus(nn.Module):
    """The soft vote with what members say times a weight each added to its scores.

    Args:
        numbers: Weights ``[m, 1]``, or weights and below them shifts ``[m + 1, c]``.
        scale: What logits are divided by, ``[m]``.
        of: What the weights multiply; see ``learned_consensus``.
    """

    def __init__(self, numbers: Tensor, scale: Tensor, *, of: str = "probabilities") -> None:
        super().__init__()
        self.register_buffer("numbers", numbers)
        self.register_buffer("scale", scale)
        self.options = {"of": of}

    def forward(self, seen: Seen) -> Tensor:
        """Logarithms of probabilities, ``[m, b, c]`` -> ``[b, c]``."""
        check_outputs("learned_consensus", seen.outputs, len(self.scale))
        table = features(seen.outputs, self.scale, self.options["of"])
        added = _weighted(table)(self.numbers[None])[0]
        return (log_soft_vote(seen.outputs) + added).log_softmax(-1)


def _weighted(table: Tensor) -> Added:
    """Sum over members, and shifts if there are any, ``[r, ...]`` -> ``[r, b, c]``."""

    def added(numbers: Tensor) -> Tensor:
        weights, shift = numbers[:, : len(table)], numbers[:, len(table) :]  # [r, m, *], [r, *, c]
        return (table * weights[:, :, None]).sum(1) + shift.sum(1, keepdim=True)

    return added
