"""AdamW for stacked networks, each with a learning rate and a weight decay of its own."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from metamerge.weights import Weights

BETAS = (0.9, 0.999)
EPS = 1e-8
LARGE = 2**13  # parameters of a network from which on a call of its own is worth its overhead


class AdamW:
    """AdamW as ``torch.optim.AdamW`` has it, in place on tensors ``[n, ...]``.

    Paper: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019,
    arXiv:1711.05101. On a CPU every step is torch's fused kernel, which reads each number once; it
    takes one learning rate a call, so large networks that differ in theirs get a call each. Small
    ones, and those on a GPU, share a handful of batched operators instead.

    Args:
        weights: Tensors ``[n, ...]`` that are trained, changed in place.
        decay: Decoupled weight decay per network, ``[n]``.
    """

    def __init__(self, weights: Weights, decay: Tensor) -> None:
        self.weights, self.decay = weights, decay
        self.first = {key: torch.zeros_like(t) for key, t in weights.items()}
        self.second = {key: torch.zeros_like(t) for key, t in weights.items()}
        self.steps = 0
        size = sum(t[0].numel() for t in weights.values())
        self.apart = size >= LARGE and all(t.device.type == "cpu" for t in weights.values())

    @torch.no_grad()
    def step(self, grads: Mapping[str, Tensor], rates: Tensor) -> None:
        """One step of the first networks.

        Args:
            grads: Gradients ``[a, ...]`` of the first ``a`` networks.
            rates: Their learning rates, ``[a]``, on the CPU.
        """
        self.steps += 1
        active, decay = len(rates), self.decay[: len(rates)]
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
        if (rates == rates[0]).all() and (decay == decay[0]).all():
            self._fused(states, float(rates[0]), float(decay[0]))
        elif self.apart:
            for i, (rate, own) in enumerate(zip(rates.tolist(), decay.tolist(), strict=True)):
                self._fused([[t[i] for t in state] for state in states], rate, own)
        else:
            for state in states:
                self._batched(*state, rates, decay)

    def keep(self, kept: Tensor) -> None:
        """Go on with some of the networks alone.

        Args:
            kept: Their indices.
        """
        for tensors in (self.weights, self.first, self.second):
            tensors.update({key: tensor[kept] for key, tensor in tensors.items()})
        self.decay = self.decay[kept.to(self.decay.device)]

    def _fused(self, states: Sequence[Sequence[Tensor]], rate: float, decay: float) -> None:
        weights, grads, first, second = (list(tensors) for tensors in zip(*states, strict=True))
        count = torch.tensor(float(self.steps), device=weights[0].device)
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
    ) -> None:
        shape = (-1, *[1] * (weight.ndim - 1))
        rate, own = (t.to(weight).reshape(shape) for t in (rates, decay))
        first.lerp_(grad, 1 - BETAS[0])
        second.lerp_(grad.square(), 1 - BETAS[1])
        scale = (second / (1 - BETAS[1] ** self.steps)).sqrt_().add_(EPS)
        weight.mul_(1 - rate * own)
        weight.sub_((first / (1 - BETAS[0] ** self.steps)).div_(scale).mul_(rate))


def _laid_out(state: list[Tensor]) -> list[Tensor]:
    """Weight, gradient and moments contiguous, as the fused kernel wants them."""
    if not state[0].is_contiguous():  # linear layers lie transposed, as their gradients do
        state = [tensor.mT for tensor in state]
    return [state[0], state[1].contiguous(), *state[2:]]
