"""Batch normalisation: running statistics of fused weights, measured anew.

Averaged networks do not have averaged statistics: their running means and variances have to be
those of their own pre-activations (Ainsworth et al., arXiv:2209.04836, and Jordan et al.,
arXiv:2211.08403, section 4.1, name this as what makes or breaks networks with BatchNorm).
"""

from collections.abc import Iterator

from einops import rearrange
from torch import Tensor

from metamerge.registry import correction
from metamerge.structure import Execution, Layout, Program
from metamerge.structure.program import Node
from metamerge.weights import Weights


@correction(paper="arXiv:2211.08403")
def batch_norm(fused: Weights, members: Weights, layout: Layout, inputs: Tensor) -> Weights:
    """Set every running mean and variance to the fused network's own statistics on the inputs.

    Args:
        fused: Fused weights of ``f`` families, ``[f, ...]``.
        members: Not read; here because every correction gets them.
        layout: The architecture.
        inputs: Calibration inputs, ``[b, ...]``.

    Returns:
        New weights ``[f, ...]``; those of networks without running statistics are the same.
    """
    return recalibrate(fused, layout.program, inputs)


def recalibrate(weights: Weights, program: Program, inputs: Tensor) -> Weights:
    """Measure running statistics of ``n`` networks, layer after layer, in one pass.

    Args:
        weights: Stacked networks, every tensor ``[n, ...]``.
        program: Their architecture.
        inputs: ``[b, ...]``, all of which count alike.

    Returns:
        New dict; tensors other than running statistics are passed through.
    """
    measured, count = dict(weights), len(next(iter(weights.values())))
    execution = Execution(program, measured, [inputs], stacked=True)
    keys = {node.name: (mean, variance) for node, mean, variance in normalisations(program)}
    last = next((name for name in reversed(keys)), None)
    for node in program.nodes if keys else ():
        if node.name in keys:
            mean, variance = keys[node.name]
            lane = execution.argument(node, 0)
            value = lane.value if lane.stacked else lane.value[None]
            rows = rearrange(value, "n b c ... -> n c (b ...)").expand(count, -1, -1)
            measured[mean] = rows.mean(-1)
            measured[variance] = rows.var(-1, correction=int(rows.shape[-1] > 1))
            if node.name == last:  # what comes behind it changes nothing
                break
        execution.step(node)
    return measured


def normalisations(program: Program) -> Iterator[tuple[Node, str, str]]:
    """Batch normalisations with running statistics.

    Args:
        program: The architecture.

    Yields:
        The operator call, and the keys of its running mean and variance.
    """
    for node in program.nodes:
        if node.op == "batch_norm.default" and node.args[3] is not None:
            yield node, *(program.parameters[node.args[position].name] for position in (3, 4))
