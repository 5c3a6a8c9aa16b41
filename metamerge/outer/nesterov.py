"""Nesterov: the centre takes the members' common move as a gradient, with momentum.

Paper: Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models", 2023,
arXiv:2311.08105 (algorithm 1, lines 12 and 14). The outer gradient is there the mean of the
members' moves, which is the centre minus the average; here it is the centre minus whatever the
members were merged into. The step is that of ``torch.optim.SGD(nesterov=True)``.
"""

from metamerge.errors import ConfigError
from metamerge.outer.position import Position, gathered_at, learned
from metamerge.weights import Weights


def nesterov(
    before: Position, merged: Weights, *, lr: float = 0.7, momentum: float = 0.9
) -> Position:
    """Move the centre against the outer gradient ``g = centre - merged``, with its momentum.

    ``b <- momentum * b + g``, then ``centre <- centre - lr * (g + momentum * b)``; all members go
    on from there. With ``lr=1`` and ``momentum=0`` that is averaging. Counters and running
    statistics are those of the merged network.

    Args:
        before: The centre that the round started from, its momentum, and the members.
        merged: What a merge made of the members, in the centre's order of units.
        lr: Outer learning rate, above 0; 0.7 is the paper's.
        momentum: In [0, 1); 0.9 is the paper's.

    Returns:
        Where the next round starts.

    Raises:
        ConfigError: If an option is out of its range.
    """
    if not lr > 0:
        raise ConfigError(f"nesterov: lr must be above 0, got {lr}.")
    if not 0 <= momentum < 1:
        raise ConfigError(f"nesterov: momentum must be in [0, 1), got {momentum}.")
    centre, kept = {}, {}
    for key, tensor in merged.items():
        if not learned(key, tensor):
            centre[key] = tensor.clone()
            continue
        gradient = before.centre[key] - tensor
        kept[key] = gradient.clone()
        if before.momentum is not None:
            kept[key] += momentum * before.momentum[key]
        centre[key] = before.centre[key] - lr * (gradient + momentum * kept[key])
    return gathered_at(centre, len(next(iter(before.members.values()))), kept)
