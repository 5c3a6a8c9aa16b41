"""A pass through n networks of which a subset is trained: gradients of that subset and no other.

A convolution or linear layer with some live rows computes the gradient of these rows alone, from
the part of the output's gradient that belongs to them. The gradient by its inputs needs all rows,
and is left out where nothing below is live. Of single weights there is no such product: the
gradient of the whole tensor is computed, and what is not live is thrown away.
"""

from collections import Counter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from metamerge.structure import Execution, Program
from metamerge.structure.lockstep import Lane, as_channels, channels_last
from metamerge.structure.program import Node, Ref
from metamerge.subsets.masks import Live, Subset, placed
from metamerge.weights import Weights

_NARROW = 128  # channels up to which a product with ones and zeros picks them fastest
_LAYERS = ("conv2d.default", "linear.default")


class PartialPass:
    """Passes through networks with a given subset.

    Args:
        program: The architecture.
        subset: What is live.
    """

    def __init__(self, program: Program, subset: Subset) -> None:
        self.program, self.subset = program, subset
        uses = Counter(name for node in program.nodes for name in node.refs)
        self.partial = {
            node.name: node
            for node in program.nodes
            if node.op in _LAYERS
            and all(uses[ref.name] == 1 for ref in node.args[1:3] if isinstance(ref, Ref))
            and self._by_rows(node)
        }
        keys = {self._key(node, place) for node in self.partial.values() for place in (1, 2)}
        self.apart = keys - {None}

    def run(self, weights: Weights, live: Weights, inputs: Tensor) -> Tensor:
        """Run all networks.

        Args:
            weights: ``[n, ...]``, live ones included.
            live: The live ones, as ``taken`` gives them: leaves that gradients are wanted of.
            inputs: Of every network, ``[n, b, ...]``.

        Returns:
            ``[n, b, c]``.
        """
        others = {key: tensor for key, tensor in live.items() if key not in self.apart}
        whole = placed(weights, others, self.subset)
        execution = Execution(self.program, whole, [inputs], stacked=True, own_inputs=True)
        for node in self.program.nodes:
            lane = None
            if node.name in self.partial:
                lane = Lane(self._layer(execution, node, whole, live), True)
            execution.step(node, lane)
        return execution.output()

    def _by_rows(self, node: Node) -> bool:
        """Whether some rows of a layer are live, and its products can be cut down to them."""
        weight, bias = (self._key(node, place) for place in (1, 2))
        own = self.subset.get(weight)
        if own is None or own.index is None or own.single:
            return False
        if node.op == "conv2d.default" and node.argument(6, 1) != 1:
            return False
        return bias is None or self.subset.get(bias, Live()).index is own.index

    def _key(self, node: Node, place: int) -> str | None:
        given = node.argument(place)
        return self.program.parameters.get(given.name) if isinstance(given, Ref) else None

    def _layer(self, execution: Execution, node: Node, whole: Weights, live: Weights) -> Tensor:
        x, keys = execution.argument(node, 0), [self._key(node, place) for place in (1, 2)]
        index = self.subset[keys[0]].index.to(x.value.device)
        value = x.value if x.stacked else x.value.expand(len(index), *x.value.shape)
        own = [(live[key], whole[key]) if key else (None, None) for key in keys]
        (weight, whole_weight), (bias, whole_bias) = own
        if node.op == "linear.default":
            return _LinearRows.apply(value, weight, bias, whole_weight, whole_bias, index)
        names = zip(("stride", "padding", "dilation"), (3, 4, 5), strict=True)
        options = {
            name: _pair(node.argument(place, default))
            for (name, place), default in zip(names, (1, 0, 1), strict=True)
        }
        options = _Options(**options)
        return _ConvolutionRows.apply(value, weight, bias, whole_weight, whole_bias, index, options)


class _Options(NamedTuple):
    """Of a convolution."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


class _LinearRows(torch.autograd.Function):
    """``n`` linear maps; gradients of live rows and of what is needed below."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [n, b, ..., i]
        weight: Tensor,  # live rows, [n, k, i]
        bias: Tensor | None,  # [n, k]
        whole: Tensor,  # [n, o, i]
        whole_bias: Tensor | None,  # [n, o]
        index: Tensor,  # [n, k]
    ) -> Tensor:
        ctx.save_for_backward(x, whole, index)
        ctx.biased = bias is not None
        rows = x.flatten(1, -2)
        y = torch.bmm(rows, whole.mT)
        y = y if whole_bias is None else y + whole_bias[:, None]
        return y.unflatten(1, x.shape[1:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, whole, index = ctx.saved_tensors
        grad = grad.flatten(1, -2)  # [n, r, o]
        below = torch.bmm(grad, whole).reshape(x.shape) if ctx.needs_input_grad[0] else None
        own = grad.gather(2, index[:, None].expand(-1, grad.shape[1], -1))  # [n, r, k]
        weight = torch.bmm(own.mT, x.flatten(1, -2))
        bias = own.sum(1) if ctx.biased else None
        return below, weight, bias, None, None, None


class _ConvolutionRows(torch.autograd.Function):
    """``n`` convolutions as one in groups; gradients of live kernels, and what is needed below."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [n, b, i, h, w]
        weight: Tensor,  # live kernels, [n, k, i, *taps]
        bias: Tensor | None,  # [n, k]
        whole: Tensor,  # [n, o, i, *taps]
        whole_bias: Tensor | None,  # [n, o]
        index: Tensor,  # [n, k]
        options: _Options,
    ) -> Tensor:
        maps, kernels = channels_last(as_channels(x)), channels_last(whole.flatten(0, 1))
        ctx.save_for_backward(maps, kernels, weight, index)
        ctx.options, ctx.biased = options, bias is not None
        bias = None if whole_bias is None else whole_bias.flatten()
        y = F.conv2d(maps, kernels, bias, *options, groups=len(x))
        return rearrange(y, "b (n o) h w -> n b o h w", n=len(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        maps, kernels, weight, index = ctx.saved_tensors
        n, taken = index.shape
        grad = as_channels(grad)  # [b, n o, h, w]
        below = None
        if ctx.needs_input_grad[0]:
            below = _backward(grad, maps, kernels, ctx.options, n, below=True)[0]
            below = rearrange(below, "b (n i) h w -> n b i h w", n=n)
        first = torch.arange(n, device=index.device)[:, None] * (len(kernels) // n)
        own = _chosen(grad, (index + first).flatten())
        _, weight, bias = _backward(own, maps, weight.flatten(0, 1), ctx.options, n, below=False)
        weight = weight.unflatten(0, (n, taken))
        bias = bias.unflatten(0, (n, taken)) if ctx.biased else None
        return below, weight, bias, None, None, None, None


def _chosen(maps: Tensor, rows: Tensor) -> Tensor:
    """Some channels of maps, in the memory layout of the maps."""
    if maps.is_contiguous() or not maps.is_contiguous(memory_format=torch.channels_last):
        return maps.index_select(1, rows)
    last = maps.permute(0, 2, 3, 1)
    if maps.device.type == "cpu" and maps.shape[1] <= _NARROW:  # a product is six times as fast
        return (last @ F.one_hot(rows, maps.shape[1]).to(maps).mT).permute(0, 3, 1, 2)
    return last.index_select(3, rows).permute(0, 3, 1, 2)


def _backward(
    grad: Tensor, maps: Tensor, kernels: Tensor, options: _Options, groups: int, *, below: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a convolution: by its inputs, or by its kernels and their biases."""
    return torch.ops.aten.convolution_backward(
        grad,
        maps,
        channels_last(kernels),
        [len(kernels)],
        *options,
        False,
        [0, 0],
        groups,
        [below, not below, not below],
    )
