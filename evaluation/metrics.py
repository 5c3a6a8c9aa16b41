"""Scores of networks, batched over families."""

from torch import Tensor

from metamerge.structure import Program
from metamerge.weights import Weights
from zoo.training import predict


def family_logits(program: Program, families: Weights, inputs: Tensor) -> Tensor:
    """Logits of all members of all families.

    Args:
        program: The architecture.
        families: ``[f, m, ...]``.
        inputs: ``[b, ...]``.

    Returns:
        ``[f, m, b, c]``.
    """
    count, members = next(iter(families.values())).shape[:2]
    flat = {key: tensor.flatten(0, 1) for key, tensor in families.items()}
    return predict(program, flat, inputs).unflatten(0, (count, members))


def accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    """Share of inputs whose largest logit is that of their class.

    Args:
        logits: Logits or probabilities ``[..., b, c]``.
        targets: ``[b]``.

    Returns:
        ``[...]``.
    """
    return (logits.argmax(-1) == targets).float().mean(-1)


def references(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """What a merge of each family is measured against.

    Args:
        logits: Logits of all members, ``[f, m, b, c]``.
        targets: ``[b]``.

    Returns:
        ``best_member``, ``mean_member`` and ``ensemble`` (soft vote), each ``[f]``.
    """
    members = accuracy(logits, targets)  # [f, m]
    return {
        "best_member": members.amax(1),
        "mean_member": members.mean(1),
        "ensemble": accuracy(logits.softmax(-1).mean(1), targets),
    }
