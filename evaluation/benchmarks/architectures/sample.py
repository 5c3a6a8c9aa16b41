"""Networks with example inputs, the same on every run, no two units of which are alike."""

from collections.abc import Callable, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Sample = tuple[nn.Module, tuple[Tensor, ...] | dict[str, Tensor]]


@contextmanager
def seeded():
    """Same random numbers on every run; the caller's generator stays where it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@torch.no_grad()
def sample(build: Callable[[], nn.Module], example: Callable) -> Sample:
    """The network in eval mode, no two of its units alike, and example inputs."""
    with seeded():
        network, inputs = build().eval(), example()
        # Initialisers leave scales at one and biases at zero, which every permutation of units
        # leaves as they are, and weights so small that layers add nothing to a residual stream.
        for parameter in network.parameters():
            std = (2 / parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.2
            parameter += std * torch.randn_like(parameter)
        tracking = [m for m in network.modules() if hasattr(m, "running_var")]
        for norm in tracking:  # statistics of the example, or the signal dies in deep networks
            norm.weight.uniform_(0.5, 1.5)  # transformers starts some of them around zero
            norm.momentum = 0.9
            norm.train()
        if tracking:
            network(**inputs) if isinstance(inputs, dict) else network(*inputs)
        return network.train().eval(), inputs  # train() empties what forward passes cached


def noise(*shapes: Sequence[int]) -> Callable[[], tuple[Tensor, ...]]:
    """Example inputs, standard normal, one per shape."""
    return lambda: tuple(torch.randn(*shape) for shape in shapes)


def tokens(vocabulary: int, length: int) -> Tensor:
    """Example tokens [2, length], without the first three ids, which are often special."""
    return torch.randint(3, vocabulary, (2, length))
