"""Averaging: everybody goes on from the merged network.

Paper: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
AISTATS 2017, arXiv:1602.05629 (algorithm 1; what is averaged there is merged by any method here).
"""

from metamerge.outer.position import Position, gathered_at
from metamerge.weights import Weights


def averaging(before: Position, merged: Weights) -> Position:
    """Put the merged network in the place of the centre and of all members.

    Args:
        before: The centre that the round started from, and the members after their training.
        merged: What a merge made of the members.

    Returns:
        Where the next round starts.
    """
    count = len(next(iter(before.members.values())))
    return gathered_at({key: tensor.clone() for key, tensor in merged.items()}, count)
