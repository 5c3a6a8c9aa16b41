"""What a merger could know by heart: networks of the zoo that it was trained on.

A merger that ignores its members can do no better than put out a network that it has seen, or their
mean. These are the null mergers, and here is how far fused networks are from what was seen.
"""

import torch
from torch import Tensor

from evaluation.controls import aligned_average
from evaluation.gates import Gate
from evaluation.metrics import accuracy, family_logits
from metamerge.structure import Layout, Program
from metamerge.weights import Weights
from zoo.training import predict

NEAR = 0.05  # relative distance of outputs below which a network is taken for a copy


def mean_network(training: Weights, layout: Layout) -> Weights:
    """The mean of all networks of a zoo, aligned within families and then between them.

    Args:
        training: Members of its training families, ``[f, m, ...]``.
        layout: Their architecture.

    Returns:
        One network, ``[1, ...]``.
    """
    families = aligned_average(training, layout)
    return aligned_average({key: tensor[None] for key, tensor in families.items()}, layout)


def best_network(
    training: Weights, layout: Layout, inputs: Tensor, targets: Tensor, labels: Tensor | None
) -> Weights:
    """The network of a zoo that scores best.

    Args:
        training: Members of its training families, ``[f, m, ...]``.
        layout: Their architecture.
        inputs: Validation images, ``[b, ...]``.
        targets: Their classes, ``[b]``.
        labels: Class of the task -> class of each family, ``[f, c]``, where families number classes
            by themselves. The network keeps its family's numbers: nobody tells a merger that knows
            it by heart what another family calls them.

    Returns:
        One network, ``[1, ...]``.
    """
    own = targets if labels is None else labels[:, targets][:, None]  # [f, 1, b]
    scores = accuracy(family_logits(layout.program, training, inputs), own)  # [f, m]
    chosen = scores.flatten().argmax()
    return {key: tensor.flatten(0, 1)[chosen][None] for key, tensor in training.items()}


def nearest_training(fused: Weights, training: Weights, program: Program, inputs: Tensor) -> Tensor:
    """How far fused networks are from the nearest network that the merger was trained on.

    What networks say is compared, not their weights, which may be permuted: the distance of two is
    the norm of the difference of their centred logits over the norm of the fused network's.

    Args:
        fused: ``[f, ...]``.
        training: All networks of the training families, with the same numbers of classes,
            ``[n, ...]``.
        program: Their architecture.
        inputs: Images that are not the test images, ``[b, ...]``.

    Returns:
        Relative distance of each fused network from its nearest, ``[f]``.
    """
    own, seen = (_centred(predict(program, w, inputs)) for w in (fused, training))
    squares = own.square().sum(1, keepdim=True) + seen.square().sum(1) - 2 * own @ seen.T
    return (squares.clamp_min(0).sqrt() / own.norm(dim=1, keepdim=True)).amin(1).float()


def copies_nothing(distances: Tensor) -> Gate:
    """The gate that no fused network is one that the merger has seen.

    Args:
        distances: What ``nearest_training`` found, ``[f]``.

    Returns:
        The share of networks nearer than ``NEAR``; NaN, which never passes, where one has none.
    """
    near = (distances < NEAR).double().mean() if distances.isfinite().all() else torch.nan
    return Gate("training_copies", float(near), 0.0)


def _centred(logits: Tensor) -> Tensor:
    return (logits - logits.mean(-1, keepdim=True)).flatten(1).double()
