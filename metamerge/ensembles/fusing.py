"""Fusing: all members of a family as one wide network, which says the mean of their logits.

Hidden groups of all members lie one behind the other: first layers are stacked, weights between two
hidden groups are block-diagonal, and the last layer takes the mean. The network is an ordinary one
of the members' architecture with layers K times as wide, so it can be trained, pruned, saved,
traced and merged like any other. An ensemble that averages logits is thereby the start of a
training rather than its end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metamerge.errors import StructureError
from metamerge.methods._combination import dtypes, restore
from metamerge.structure import OUTPUTS, Layout, PermutationSpec, Program, discover_program, run
from metamerge.structure.draws import random_inputs
from metamerge.structure.program import Node
from metamerge.structure.resizing import places, resized, wide_length
from metamerge.weights import Weights

_AT_ONCE = 256  # inputs: feature maps of all members have to fit into memory
_CLOSE = 1e-9  # relative, in float64: sums in another order


@dataclass(frozen=True)
class Mutant:
    """A network with widths of its own.

    Attributes:
        weights: Its state dict.
        layout: Its program and permutation spec.
    """

    weights: Weights
    layout: Layout

    def answers(self, inputs: Tensor) -> Tensor:
        """What it puts out, without gradients and some inputs at a time, ``[b, ...]``."""
        with torch.no_grad():
            parts = [run(self.layout.program, self.weights, [x]) for x in inputs.split(_AT_ONCE)]
        return torch.cat(parts)


def fused(weights: Sequence[Weights], layout: Layout) -> Mutant:
    """Make one wide network of several, which puts out the mean of what they put out.

    Every group that is nested in no other is K times as wide; attention heads stay as large as they
    are and become more. A group normalisation normalises as many groups more, so that every member
    keeps its own. Biases of the last layer, and whatever else all members share a place for, are
    averaged; counters take the largest.

    Args:
        weights: One state dict per member.
        layout: Their architecture.

    Returns:
        The wide network, checked against the members.

    Raises:
        StructureError: If there is no such network: members meet in a layer norm, say, or something
            comes after the last linear layer.
    """
    spec, count = layout.spec, len(weights)
    own = {g: n for g, n in spec.groups.items() if not spec.outer(g)}
    widths = {group: count * n for group, n in own.items()}
    program = _normalised_apart(layout.program, resized(layout.program, spec, widths), count)
    heads = {layer.weight for layer in layout.layers if OUTPUTS in layer.targets}
    common, wide = dtypes(weights), {}
    for key, dtype in common.items():
        carried = {p.group for axis in spec.carriers(key).values() for p in axis}
        share = count if key in heads or carried.isdisjoint(own) else 1
        made = [member[key].to(torch.promote_types(dtype, torch.float32)) for member in weights]
        wide[key] = _blocks(made, key, spec, own, widths) / share
    found = restore(wide, weights)
    _check(weights, layout.program, found, program)
    return Mutant(found, Layout(program, discover_program(program)))


def _blocks(
    members: Sequence[Tensor],
    key: str,
    spec: PermutationSpec,
    own: Mapping[str, int],
    widths: Mapping[str, int],
) -> Tensor:
    """Every member's tensor in its own block; added up where it has none."""
    axes = spec.axes.get(key)
    if axes is None:  # no operator reads it
        return torch.stack(list(members)).sum(0)
    wide = members[0].new_zeros([wide_length(axis, widths) for axis in axes])
    for number, tensor in enumerate(members):
        first = {group: number * n for group, n in own.items()}
        index = [places(axis, widths, first) for axis in axes]
        grid = torch.meshgrid(*(i.to(tensor.device) for i in index), indexing="ij")
        wide = wide.index_put(grid, tensor, accumulate=True) if axes else wide + tensor
    return wide


def _normalised_apart(before: Program, after: Program, count: int) -> Program:
    """Let group normalisations of the wide network have groups that no two members share."""

    def apart(old: Node, new: Node) -> Node:
        wider = before.shapes[old.name] != after.shapes.get(new.name)
        if new.op != "group_norm.default" or not wider or old.args[1] != new.args[1]:
            return new
        return replace(new, args=(new.args[0], count * new.args[1], *new.args[2:]))

    pairs = zip(before.nodes, after.nodes, strict=True)
    return replace(
        after, nodes=tuple(apart(o, n) if o.name in before.sizes else n for o, n in pairs)
    )


def _check(weights: Sequence[Weights], narrow: Program, found: Weights, program: Program) -> None:
    """Run members and the wide network on random inputs in float64."""
    inputs = random_inputs(narrow, torch.Generator().manual_seed(0))
    with torch.no_grad():
        each = [run(narrow.in_float64(), _double(w), inputs) for w in weights]
        made = run(program.in_float64(), _double(found), inputs)
    mean = torch.stack(each).mean(0)
    kinds = [t.dtype for t in found.values() if t.is_floating_point()]
    coarse = max((torch.finfo(kind).eps for kind in kinds), default=0.0)  # members were rounded
    gap = float((made - mean).abs().max() / mean.abs().max().clamp_min(1e-12))
    if not gap <= max(_CLOSE, 30 * coarse):
        raise StructureError(
            f"The wide network differs from the mean of its {len(weights)} members by {gap:.1e} "
            "(relative). Members meet somewhere before the last linear layer, as in a layer "
            "normalisation, or something comes after it. Use metamerge.ensembles.ensemble, which "
            "keeps members apart."
        )


def _double(weights: Weights) -> Weights:
    own = {key: tensor.detach().cpu() for key, tensor in weights.items()}
    return {k: t.double() if t.is_floating_point() else t for k, t in own.items()}
