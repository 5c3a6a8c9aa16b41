"""Train a subset of the weights of ``n`` networks side by side, while all others stay as they are.

The optimizer holds live weights and nothing else; gradients of fixed ones are not computed where
whole kernels are fixed (``metamerge.subsets.PartialPass``).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metamerge.structure import Program
from metamerge.subsets import PartialPass, Subset, placed, taken
from metamerge.weights import Weights
from zoo.adam import AdamW
from zoo.chunks import shuffled
from zoo.rewrites import pool_first
from zoo.training import Loss, cross_entropy

OPTIMIZERS = ("adamw", "sgd")

Watch = Callable[[int, Weights, Tensor], None]
"""Steps made, weights ``[n, ...]`` (not to be kept without a copy) and the mean training loss of
each network since the last call, ``[n]``."""


@dataclass(frozen=True)
class Descent:
    """How networks are trained.

    Attributes:
        steps: Their number.
        batch_size: Rows per step.
        lr: Learning rate at the start; it falls to 0, linearly.
        weight_decay: Decoupled weight decay, of live weights.
        optimizer: ``adamw``, or ``sgd`` without momentum.
        period: Steps between two draws of the subset; 0 for one that stays. The optimizer begins
            anew with every draw.
    """

    steps: int
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.0
    optimizer: str = "adamw"
    period: int = 0


@dataclass(frozen=True, eq=False)
class Data:
    """What networks learn from.

    Attributes:
        inputs: Of the whole task, where networks are trained.
        targets: Its classes ``[rows]``.
        rows: Rows of each network.
        seeds: Seed of the order in which each meets them.
    """

    inputs: Tensor
    targets: Tensor
    rows: Sequence[Tensor]
    seeds: Sequence[int]


class PlainDescent:
    """Gradient descent for stacked networks, in place, called as ``zoo.adam.AdamW`` is.

    Args:
        weights: Tensors ``[n, ...]`` that are trained, changed in place.
        decay: Decoupled weight decay per network, ``[n]``.
    """

    def __init__(self, weights: Weights, decay: Tensor) -> None:
        self.weights, self.decay = weights, decay

    @torch.no_grad()
    def step(self, grads: Mapping[str, Tensor], rates: Tensor) -> None:
        """One step.

        Args:
            grads: Gradients ``[n, ...]``.
            rates: Learning rates, ``[n]``.
        """
        for key, grad in grads.items():
            weight = self.weights[key]
            shape = (-1, *[1] * (weight.ndim - 1))
            rate, decay = (t.to(weight).reshape(shape) for t in (rates, self.decay))
            weight.mul_(1 - rate * decay).sub_(rate * grad)


class PartialTraining:
    """Networks in training, a step at a time.

    Args:
        program: The architecture.
        weights: Where they start, ``[n, ...]``, not modified.
        data: What they learn from.
        draws: Number of a draw -> the subset that is live, of all networks with equal shapes.
        descent: How they are trained.
        loss: One loss per network.

    Attributes:
        weights: Where they are.
    """

    def __init__(
        self,
        program: Program,
        weights: Weights,
        data: Data,
        draws: Callable[[int], Subset],
        descent: Descent,
        loss: Loss = cross_entropy,
    ) -> None:
        self.program, self.data, self.draws = pool_first(program), data, draws
        self.descent, self.loss, self.steps = descent, loss, 0
        device = data.inputs.device
        self.weights = {key: tensor.detach().to(device) for key, tensor in weights.items()}
        length = descent.steps * descent.batch_size
        pairs = zip(data.rows, data.seeds, strict=True)
        self.orders = torch.stack([shuffled(own, length, seed) for own, seed in pairs]).to(device)
        self._choose(0)

    def step(self) -> Tensor:
        """Make a step; the networks' losses before it, ``[n]``."""
        descent, period = self.descent, self.descent.period
        if period and self.steps and self.steps % period == 0:
            self._choose(self.steps // period)
        start = self.steps * descent.batch_size
        rows = self.orders[:, start : start + descent.batch_size]
        leaves = {key: tensor.detach().requires_grad_() for key, tensor in self.live.items()}
        with torch.enable_grad():
            inputs = self.data.inputs.index_select(0, rows.flatten()).unflatten(0, rows.shape)
            outputs = self.passes.run(self.weights, leaves, inputs)
            losses = self.loss(outputs, self.data.targets[rows])
            grads = torch.autograd.grad(losses.sum(), list(leaves.values()))
        rate = descent.lr * (1 - self.steps / descent.steps)
        rates = torch.full((len(rows),), rate, dtype=torch.float64)
        self.optimizer.step(dict(zip(leaves, grads, strict=True)), rates)
        self.weights = placed(self.weights, self.live, self.subset)
        self.steps += 1
        return losses.detach()

    def _choose(self, draw: int) -> None:
        """Go on with another subset."""
        self.subset = self.draws(draw)
        self.live = taken(self.weights, self.subset)
        self.passes = PartialPass(self.program, self.subset)
        decay = torch.full((len(self.data.rows),), self.descent.weight_decay, dtype=torch.float64)
        kind = {"adamw": AdamW, "sgd": PlainDescent}[self.descent.optimizer]
        self.optimizer = kind(self.live, decay)


def train_partly(training: PartialTraining, marks: Collection[int], watch: Watch) -> Weights:
    """Train networks to the end.

    Args:
        training: The networks.
        marks: Numbers of steps after which they are looked at; 0 is before the first, whose loss
            is then that of the first step.
        watch: Looks at them.

    Returns:
        Their weights, ``[n, ...]``.
    """
    total, since = torch.zeros(()), 0
    for step in range(training.descent.steps):
        before = training.weights
        losses = training.step()
        if step == 0 and 0 in marks:
            watch(0, before, losses)
        total, since = total + losses, since + 1
        if step + 1 in marks:
            watch(step + 1, training.weights, total / since)
            total, since = torch.zeros(()), 0
    return training.weights
