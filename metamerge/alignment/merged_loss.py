"""The loss of a merged network, to be differentiated by its weights.

Shape comments: f families, m members, b inputs, c classes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from metamerge.calibration import Batches, check_fit, collect
from metamerge.errors import ConfigError, IncompatibleWeights
from metamerge.structure import Execution, Layout, Program
from metamerge.weights import Weights

_ROWS = 256  # inputs at a time


@dataclass(frozen=True)
class MergedLoss:
    """Cross entropy of merged networks to labels, or to the soft vote of their members.

    Attributes:
        program: Their architecture.
        inputs: ``[b, ...]``.
        targets: Probabilities ``[f, b, c]``, or ``[1, b, c]`` for all families.
    """

    program: Program
    inputs: Tensor
    targets: Tensor

    def drawn(self, generator: torch.Generator | None) -> "MergedLoss":
        """The loss on some of the inputs; all of them where they are few."""
        if len(self.inputs) <= _ROWS:
            return self
        rows = torch.randperm(len(self.inputs), generator=generator)[:_ROWS].to(self.inputs.device)
        return MergedLoss(self.program, self.inputs[rows], self.targets[:, rows])

    def __call__(self, merged: Weights) -> Tensor:
        """Mean loss of every family's merged network, ``[f, ...]`` -> ``[f]``."""
        pieces = -(-len(self.inputs) // _ROWS)
        total: Tensor | float = 0.0
        for inputs, targets in zip(
            self.inputs.tensor_split(pieces), self.targets.tensor_split(pieces, 1), strict=True
        ):
            scores = logits(self.program, merged, inputs).log_softmax(-1)  # [f, b, c]
            total = total - (targets * scores).sum((1, 2))
        return total / len(self.inputs)


def merged_loss(
    members: Weights, layout: Layout, batches: Batches, labels: Tensor | None
) -> MergedLoss:
    """Prepare the loss of merged networks.

    Args:
        members: Stacked members, every tensor ``[f, m, ...]``.
        layout: Their architecture; its output is logits ``[b, c]``.
        batches: Inputs, or inputs with labels.
        labels: Labels ``[b]``, where the batches do not carry them.

    Returns:
        The loss; towards the soft vote of the members where there are no labels.

    Raises:
        ConfigError: If inputs or labels are not those of this architecture.
        IncompatibleWeights: If the network's output is not logits.
    """
    inputs, found = collect(batches, labelled=False)
    if labels is not None:
        inputs, found = collect((inputs, labels), labelled=True)
    check_fit(layout.program, inputs)
    flat = {key: tensor.flatten(0, 1) for key, tensor in members.items()}
    some = next(t for t in flat.values() if t.is_floating_point())
    inputs, families = inputs.to(some), len(next(iter(members.values())))
    with torch.no_grad():
        outputs = [logits(layout.program, flat, x) for x in inputs.split(_ROWS)]
    votes = torch.cat(outputs, 1).softmax(-1).unflatten(0, (families, -1)).mean(1)  # [f, b, c]
    if found is None:
        return MergedLoss(layout.program, inputs, votes)
    classes = votes.shape[-1]
    if int(found.max()) >= classes:
        raise ConfigError(
            f"batches: labels reach {int(found.max())}, the network has classes 0 to "
            f"{classes - 1}. Pass labels of the checkpoints' task."
        )
    return MergedLoss(layout.program, inputs, F.one_hot(found, classes).to(inputs)[None])


def logits(program: Program, networks: Weights, inputs: Tensor) -> Tensor:
    """Outputs of stacked networks, normalised by the statistics of these very inputs.

    Running statistics of members are not those of their merger; ``merge`` measures them anew.

    Args:
        program: The architecture.
        networks: Stacked weights ``[n, ...]``.
        inputs: ``[b, ...]``.

    Returns:
        ``[n, b, c]``.

    Raises:
        IncompatibleWeights: If the output is not logits.
    """
    several = len(inputs) > 1  # one input has no variance
    execution = Execution(program, networks, [inputs], stacked=True, training=several)
    found = execution.run_all()
    if found.ndim != 3:
        raise IncompatibleWeights(
            f"The network's output has shape {tuple(found.shape[1:])}, expected logits (b, c). "
            f'Loss is measured for classifiers only; align by weights, as with loss="weights".'
        )
    return found


def merged(aligned: Weights, shares: Tensor) -> Weights:
    """Convex combinations of members.

    Args:
        aligned: Stacked members, every tensor ``[f, m, ...]``.
        shares: ``[f, m]``, sums of 1 over members.

    Returns:
        Weights ``[f, ...]``; of tensors that are not floating the largest member's.
    """
    return {
        key: (t * shares.to(t).reshape(*shares.shape, *[1] * (t.ndim - 2))).sum(1)
        if t.is_floating_point()
        else t.amax(1)
        for key, t in aligned.items()
    }
