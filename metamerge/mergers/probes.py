"""Probes: inputs on which a merger watches its members, so that merging needs no data.

A merger carries a bank of learned probes for every shape of input that it was trained on. For any
other shape it imagines some: what first layers respond to says something of the inputs that they
were trained on.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from metamerge.errors import IncompatibleWeights
from metamerge.structure import Execution, Layout
from metamerge.weights import Weights


class Probes(nn.Module):
    """Learned probes, a bank for each shape of input.

    Args:
        starts: Shape of one input -> its bank, ``[p, *shape]``.
        count: How many of a bank members are watched on, and how many to imagine for inputs of
            other shapes. Any more are spare: nothing but refining sees them.
    """

    def __init__(self, starts: Mapping[tuple[int, ...], Tensor], count: int = 256) -> None:
        super().__init__()
        self.count = count
        self.banks = nn.ParameterDict(
            {name_of(shape): nn.Parameter(start.clone()) for shape, start in starts.items()}
        )

    def forward(self, shape: Sequence[int]) -> Tensor | None:
        """Find the bank of a shape of input.

        Networks whose inputs are flat are watched on the only bank of as many numbers, flattened.

        Args:
            shape: Shape of one input.

        Returns:
            ``[p, *shape]``; None where there is none.
        """
        bank = self._bank(shape)
        return None if bank is None else _as_taken(bank[: self.count], shape)

    def spare(self, shape: Sequence[int]) -> Tensor | None:
        """Find the probes of a bank that stand beside the others when networks are refined.

        Args:
            shape: Shape of one input.

        Returns:
            ``[p, *shape]``, without gradients, since they do not learn; None where there are none.
        """
        bank = self._bank(shape)
        if bank is None or len(bank) <= self.count:
            return None
        return _as_taken(bank[self.count :].detach(), shape)

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape in which neighbours of an input's numbers are neighbours: that of its bank.

        Args:
            shape: Shape of one input.

        Returns:
            The bank's shape where networks take their inputs flat; else the shape itself.
        """
        bank = self._bank(shape)
        return tuple(shape if bank is None else bank.shape[1:])

    def _bank(self, shape: Sequence[int]) -> Tensor | None:
        """The bank of a shape, or the only one of as many numbers where that is flat."""
        banks = dict(self.banks)
        if name_of(shape) in banks or len(shape) != 1:
            return banks.get(name_of(shape))
        alike = [bank for bank in banks.values() if bank[0].numel() == shape[0]]
        return alike[0] if len(alike) == 1 else None

    def for_members(self, members: Weights, layout: Layout) -> Tensor:
        """Find what members are to be watched on: learned probes, or imagined ones.

        Args:
            members: Aligned members, ``[f, m, ...]``.
            layout: Layers of their architecture.

        Returns:
            ``[p, ...]``.
        """
        learned = self(layout.program.input_shape()[1:])
        if learned is not None:
            return learned
        return imagine(members, layout, self.count, torch.Generator().manual_seed(0))


def _as_taken(probes: Tensor, shape: Sequence[int]) -> Tensor:
    """Probes as networks take them: flat, if that is what they do."""
    return probes.flatten(1) if len(shape) == 1 else probes


def name_of(shape: Sequence[int]) -> str:
    """Name of a shape of input, such as ``1x28x28``."""
    return "x".join(map(str, shape))


def probe_start(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Start of the probes: images drawn without labels, with repeats where there are too few.

    Args:
        images: ``[n, ...]``.
        count: Number of probes.
        generator: Source of randomness.

    Returns:
        ``[count, ...]``.
    """
    rounds = -(-count // len(images))
    picks = [torch.randperm(len(images), generator=generator) for _ in range(rounds)]
    return images[torch.cat(picks)[:count]]


def filled_up(inputs: Tensor, layout: Layout, count: int) -> Tensor:
    """Inputs, and mixtures of them where they are fewer than wanted, always the same ones.

    Args:
        inputs: ``[b, ...]``.
        layout: Layers of the networks that take them.
        count: How many are wanted.

    Returns:
        ``[max(b, count), ...]``; the inputs alone where they are tokens, which cannot be mixed.
    """
    if count <= len(inputs) or not any(layer.reads_inputs for layer in layout.layers):
        return inputs
    generator = torch.Generator().manual_seed(0)
    return torch.cat([inputs, mixtures(inputs, count - len(inputs), generator)])


def with_spare(inputs: Tensor, spare: Tensor | None) -> Tensor:
    """Inputs that networks are refined on.

    Args:
        inputs: What members are watched on, ``[b, ...]``.
        spare: Spare probes, ``[p, ...]``, if there are any.

    Returns:
        Both, ``[b + p, ...]``.
    """
    return inputs if spare is None else torch.cat([inputs, spare.to(inputs)])


def mixtures(inputs: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Mix pairs of inputs: more than half of one, and the rest of another.

    Paper: Zhang et al., "mixup: Beyond Empirical Risk Minimization", arXiv:1710.09412; for
    distillation, whose targets need no mixing, Beyer et al., "Knowledge Distillation: A Good
    Teacher Is Patient and Consistent", arXiv:2106.05237.

    Args:
        inputs: ``[b, ...]``.
        count: How many.
        generator: Source of randomness.

    Returns:
        ``[count, ...]``.
    """
    pairs = torch.randint(len(inputs), (2, count), generator=generator).to(inputs.device)
    share = torch.rand(count, generator=generator).mul(0.5).to(inputs)
    return inputs[pairs[0]].lerp(inputs[pairs[1]], share.reshape(-1, *[1] * (inputs.ndim - 1)))


def imagine(members: Weights, layout: Layout, count: int, generator: torch.Generator) -> Tensor:
    """Draw inputs that the first layers of members respond to.

    A first layer's trained rows lie in the span of the inputs that they were trained on, so random
    sums of the rows of all members (convolutions: of their kernels, at all places) share the second
    moments of such inputs roughly; their scale is unknown, and taken to be 1. Rows get their random
    numbers in the order of their norms: neither the order of members nor that of units matters.

    Args:
        members: Members of one family, ``[1, m, ...]``.
        layout: Layers of their architecture.
        count: Number of inputs.
        generator: Source of randomness.

    Returns:
        ``[count, *shape]``, of mean 0 and deviation 1.

    Raises:
        IncompatibleWeights: If the networks do not take one input of known shape that a layer
            reads.
    """
    program, shape = layout.program, layout.program.input_shape()[1:]
    first = {layer.node: layer for layer in layout.layers if layer.reads_inputs}
    if len(program.inputs) > 1 or None in shape or not first:
        raise IncompatibleWeights(
            f"The checkpoints take {len(program.inputs)} inputs, the first of shape "
            f"{tuple(shape)}, and none can be imagined for them: that takes one input of known "
            "shape, read by a linear layer or a convolution. Pass batches= with inputs of the "
            "checkpoints' task."
        )
    networks = {key: tensor.detach().flatten(0, 1) for key, tensor in members.items()}
    size = len(next(iter(networks.values())))
    with torch.enable_grad():
        blank = next(iter(networks.values())).new_zeros(size, count, *shape).requires_grad_()
        execution = Execution(program, networks, [blank], stacked=True, own_inputs=True)
        response = blank.new_zeros(())
        for node in program.nodes:
            value = execution.step(node).value
            layer = first.pop(node.name, None)
            if layer is not None:
                rows = value if layer.linear else value.movedim(2, -1)  # [m, b, ..., o]
                rows = rows.movedim(-1, 1).flatten(0, 1)  # [m * o, b, ...]
                place = networks[layer.weight].flatten(2).norm(dim=-1).flatten().argsort().argsort()
                noise = torch.randn(rows.shape, generator=generator)[place.cpu()]
                response = response + (noise.to(rows) * rows).sum()
            if not first:
                break
        drawn = torch.autograd.grad(response, blank)[0].sum(0)  # [count, *shape]
    drawn = drawn - drawn.mean()
    return drawn / drawn.std().clamp_min(1e-6)
