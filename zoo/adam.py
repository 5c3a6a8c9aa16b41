"""AdamW for stacked networks, each with a learning rate and a weight decay of its own."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metamerge.weights import Weights

BETAS = (0.9, 0.999)
EPS = 1e-8
LARGE = 2**13  # parameters of a network from which on a call of its own is worth its overhead


class Moments(NamedTuple):
    """What AdamW remembers of ``n`` networks between two trainings.

    Attributes:
        first: Running mean of gradients, ``[n, ...]``.
        second: Running mean of their squares, ``[n, ...]``.
        steps: Steps that each network has made, int64 ``[n]``.
    """

    first: Weights
    second: Weights
    steps: Tensor

    @classmethod
    def none_yet(cls, weights: Weights) -> "Moments":
        """Those of networks ``[n, ...]`` that have made no step."""
        first, second = (
            {key: torch.zeros_like(t) for key, t in weights.items() if t.is_floating_point()}
            for _ in range(2)
        )
        return cls(first, second, torch.zeros(len(next(iter(weights.values()))), dtype=torch.long))

    def only(self, numbers: Sequence[int] | Tensor) -> "Moments":
        """Those of some networks, copied."""
        first, second = ({k: t[numbers] for k, t in kept.items()} for kept in self[:2])
        return Moments(first, second, self.steps[numbers])


class AdamW:
    """AdamW as ``torch.optim.AdamW`` has it, in place on tensors ``[n, ...]``.

    Paper: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019,
    arXiv:1711.05101. On a CPU every step is torch's fused kernel, which reads each number once; it
    takes one learning rate a call, so large networks that differ in theirs get a call each. Small
    ones, and those on a GPU, share a handful of batched operators instead.

    Args:
        weights: Tensors ``[n, ...]`` that are trained, changed in place.
        decay: Decoupled weight decay per network, ``[n]``.
        moments: What an earlier training left, not modified; networks may differ in their steps.
    """

    def __init__(self, weights: Weights, decay: Tensor, moments: Moments | None = None) -> None:
        self.weights, self.decay = weights, decay
        moments = moments or Moments.none_yet(weights)
        self.first, self.second = (
            {key: torch.empty_like(t).copy_(kept[key]) for key, t in weights.items()}
            for kept in (moments.first, moments.second)
        )
        self.steps = moments.steps.clone()  # [n]
        size = sum(t[0].numel() for t in weights.values())
        self.apart = size >= LARGE and all(t.device.type == "cpu" for t in weights.values())

    @torch.no_grad()
    def step(self, grads: Mapping[str, Tensor], rates: Tensor) -> None:
        """One step of the first networks.

        Args:
            grads: Gradients ``[a, ...]`` of the first ``a`` networks.
            rates: Their learning rates, ``[a]``, on the CPU.
        """
        active, decay = len(rates), self.decay[: len(rates)]
        self.steps[:active] += 1
        steps = self.steps[:active]
        states = [
            _laid_out(
                [
                    self.weights[key][:active],
                    grad,
                    self.first[key][:active],
                    self.second[key][:active],
                ]
            )
            for key, grad in grads.items()
        ]
        settings = (rates, decay, steps)
        if all((values == values[0]).all() for values in settings):
            self._fused(states, *(values[0].item() for values in settings))
        elif self.apart:
            each = zip(*(values.tolist() for values in settings), strict=True)
            for i, own in enumerate(each):
                self._fused([[t[i] for t in state] for state in states], *own)
        else:
            for state in states:
                self._batched(*state, *settings)

    def keep(self, kept: Tensor) -> None:
        """Go on with some of the networks alone.

        Args:
            kept: Their indices.
        """
        for tensors in (self.weights, self.first, self.second):
            tensors.update({key: tensor[kept] for key, tensor in tensors.items()})
        self.decay = self.decay[kept.to(self.decay.device)]
        self.steps = self.steps[kept.to(self.steps.device)]

    def _fused(
        self, states: Sequence[Sequence[Tensor]], rate: float, decay: float, steps: int
    ) -> None:
        weights, grads, first, second = (list(tensors) for tensors in zip(*states, strict=True))
        count = torch.tensor(float(steps), device=weights[0].device)
        torch._fused_adamw_(
            weights,
            grads,
            first,
            second,
            [],
            [count] * len(weights),
            lr=rate,
            beta1=BETAS[0],
            beta2=BETAS[1],
            weight_decay=decay,
            eps=EPS,
            amsgrad=False,
            maximize=False,
        )

    def _batched(
        self,
        weight: Tensor,
        grad: Tensor,
        first: Tensor,
        second: Tensor,
        rates: Tensor,
        decay: Tensor,
        steps: Tensor,
    ) -> None:
        shape = (-1, *[1] * (weight.ndim - 1))
        learned = [1 - beta ** steps.double() for beta in BETAS]  # share of a mean that is known
        rate, own, *known = (t.to(weight).reshape(shape) for t in (rates, decay, *learned))
        first.lerp_(grad, 1 - BETAS[0])
        second.lerp_(grad.square(), 1 - BETAS[1])
        scale = (second / known[1]).sqrt_().add_(EPS)
        weight.mul_(1 - rate * own)
        weight.sub_((first / known[0]).div_(scale).mul_(rate))


def _laid_out(state: list[Tensor]) -> list[Tensor]:
    """Weight, gradient and moments contiguous, as the fused kernel wants them."""
    if not state[0].is_contiguous():  # linear layers lie transposed, as their gradients do
        state = [tensor.mT for tensor in state]
    return [state[0], state[1].contiguous(), *state[2:]]
