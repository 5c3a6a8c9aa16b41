"""Elastic averaging: members keep networks of their own, tied to a centre by a spring.

Paper: Zhang, Choromanska and LeCun, "Deep learning with Elastic Averaging SGD", NeurIPS 2015,
arXiv:1412.6651 (equations 5 and 6, with a communication after every round in place of every step).
We differ in one thing: the centre is drawn towards what the members were merged into, which is
their mean in the paper.
"""

from metamerge.errors import ConfigError
from metamerge.outer.position import Position, learned
from metamerge.weights import Weights


def elastic_averaging(before: Position, merged: Weights, *, pull: float = 0.9) -> Position:
    """Draw the members a little towards the centre, and the centre towards the merged network.

    ``member <- member - pull / m * (member - centre)`` and
    ``centre <- (1 - pull) * centre + pull * merged``, both from where they were: what a member
    gives up, the centre gains. Counters and running statistics of the centre are those of the
    merged network, those of members stay.

    Args:
        before: The centre, and the ``m`` members after their training, in its order of units.
        merged: What a merge made of the members, in the centre's order of units.
        pull: The paper's beta, in (0, 1]; 0.9 is its choice.

    Returns:
        Where the next round starts.

    Raises:
        ConfigError: If ``pull`` is outside (0, 1].
    """
    if not 0 < pull <= 1:
        raise ConfigError(f"elastic_averaging: pull must be in (0, 1], got {pull}.")
    centre, members = {}, {}
    for key, tensor in before.members.items():
        own, new = before.centre[key], merged[key]
        if learned(key, tensor):
            members[key] = tensor - pull / len(tensor) * (tensor - own)
            centre[key] = own + pull * (new - own)
        else:
            members[key], centre[key] = tensor.clone(), new.clone()
    return Position(centre, members)
