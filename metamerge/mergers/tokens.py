"""Neuron tokens: what a merger is told about one unit of one member, in numbers free of sizes.

Every feature is relative (to the fan-in, to the mean over units, to the barycentre of the members),
so a merger trained on one width reads another, and none names a layer, a class or a place in the
input.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from metamerge.corrections.refit import moments, variance
from metamerge.structure import OUTPUTS, Layer, Layout
from metamerge.weights import Weights

UNIT_FEATURES = 14
CLASS_FEATURES = 8
BOUND = 20.0  # of every feature; only degenerate members, such as dead layers, ever come near it

Moments = tuple[Tensor, Tensor]
"""Mean and variance of pre-activations over probes, ``[f, m, o]`` each."""


def unit_tokens(
    members: Weights,
    layout: Layout,
    observed: Mapping[str, Tensor],
    known: Mapping[str, Moments] | None = None,
) -> dict[str, Tensor]:
    """Tokens of all units of all spaces.

    Args:
        members: Aligned members, ``[f, m, ...]``.
        layout: Layers of the architecture.
        observed: Pre-activations on probes per layer, ``[f, m, r, o]``.
        known: Their means and variances over probes, ``[f, m, o]``, where these are known.

    Returns:
        Space -> ``[f, m, n, UNIT_FEATURES]``.
    """
    matrices = {x.node: layout.matrix(x, members[x.weight]) for x in layout.layers}
    return {
        space: _with_kind(
            _features(members, layout, observed, known or {}, matrices, space),
            layout,
            space,
            place / max(1, len(layout.spaces) - 1),
        )
        for place, space in enumerate(layout.spaces)
    }


def class_tokens(rows: Tensor, bias: Tensor | None, logits: Tensor) -> Tensor:
    """What a member's weights and its logits on probes reveal of how well it knows each class.

    Args:
        rows: The member's output rows, ``[f, m, c, i]``.
        bias: Their biases, ``[f, m, c]``.
        logits: Logits on probes, ``[f, m, r, c]``.

    Returns:
        ``[f, m, c, CLASS_FEATURES]``.
    """
    centred = logits - logits.mean(-1, keepdim=True)
    scale = centred.square().mean((2, 3))[..., None].clamp_min(1e-12).sqrt()  # [f, m, 1]
    probability = log_probability(logits).exp()
    norm = rows.norm(dim=-1)
    typical = norm.mean((1, 2), keepdim=True).clamp_min(1e-6)
    bias = torch.zeros_like(norm) if bias is None else bias - bias.mean(-1, keepdim=True)
    features = [
        norm / typical,
        rows.sum(-1) / typical / rows.shape[-1] ** 0.5,
        bias / typical,
        centred.mean(2) / scale,
        (variance(centred, 2) + 1e-16).sqrt() / scale,
        centred.amax(2) / scale / 3,
        (probability.mean(2) + 1e-4).log() / 4,
        (probability.amax(2) + 1e-4).log() / 4,
    ]
    return torch.stack(features, -1).clamp(-BOUND, BOUND)


def log_probability(logits: Tensor) -> Tensor:
    """``torch.log_softmax``, which takes several times as long for a few classes.

    Args:
        logits: ``[..., c]``.

    Returns:
        The same shape.
    """
    below = logits - logits.detach().amax(-1, keepdim=True)
    return below - below.exp().sum(-1, keepdim=True).log()


def _features(
    members: Weights,
    layout: Layout,
    observed: Mapping[str, Tensor],
    known: Mapping[str, Moments],
    matrices: Mapping[str, Tensor],
    space: str,
) -> Tensor:
    """Incoming, outgoing and activation features, ``[f, m, n, 10]``; 0 where there is no side."""
    makers, readers = layout.producers(space), layout.consumers(space)
    incoming = [matrices[x.node][:, :, layout.rows(x).part(space)].flatten(3) for x in makers]
    outgoing = [
        matrices[x.node][:, :, :, layout.columns(x).part(space)].movedim(-1, 3).flatten(2, 3)
        for x in readers
    ]
    like = next(iter(matrices.values()))
    zero = like.new_zeros(*like.shape[:2], layout.spaces[space])
    features = [zero] * 10
    if incoming:
        rows = _together(incoming, -1)  # [f, m, n, r]
        norm, cosine = _norm_and_cosine(rows)
        ranks = norm.detach().argsort(-1).argsort(-1) / norm.shape[-1]
        features[:3] = [
            _relative(norm),
            cosine,
            ranks - ranks.mean(1, keepdim=True),
        ]
        features[3] = _biases(members, layout, space, zero) / norm.mean(
            (1, 2), keepdim=True
        ).clamp_min(1e-6)
        # producers of one space may see maps of different sizes: their rows stand one after another
        values = _together([_of_space(observed[x.node], layout, x, space) for x in makers], 2)
        first = makers[0].node
        same = first in known and values is observed[first]  # one producer, all of whose units
        mean, square = known[first] if same else moments(values, 2)
        spread = (square + 1e-16).sqrt()
        typical = spread.mean((1, 2), keepdim=True).clamp_min(1e-6)
        active = (values * (1 / typical[:, :, None])).sigmoid()
        features[4:8] = [
            mean / typical,
            spread / typical,
            active.sum(2) / active.shape[2],  # unlike a mean, passes back without a copy
            _others(members, layout, space, zero),
        ]
    if outgoing:
        columns = _together(outgoing, 2)  # [f, m, r, n], as they lie in memory
        norm = _norm(columns)
        mean = columns.mean(1, keepdim=True)
        cosine = (columns * mean).sum(2) / (norm * _norm(mean)).clamp_min(1e-6)
        features[8:] = [_relative(norm), cosine]
    return torch.stack(features, -1).clamp(-BOUND, BOUND)


def _together(parts: list[Tensor], dim: int) -> Tensor:
    """What several layers say of a space; without a copy where there is but one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _of_space(values: Tensor, layout: Layout, layer: Layer, space: str) -> Tensor:
    """Values of a layer's outputs, ``[..., out]``, at the units of a space."""
    rows = layout.rows(layer)
    if rows.plain and len(rows.spaces) == 1:
        return values
    return rows.collected(values, values.ndim - 1, space).mean(-1)


def _with_kind(features: Tensor, layout: Layout, space: str, depth: float) -> Tensor:
    """Append what kind of space this is: input, output, made by a linear layer, relative depth."""
    producers = layout.producers(space)
    kind = [not producers, space == OUTPUTS, bool(producers) and producers[0].linear, depth]
    told = features.new_tensor([float(k) for k in kind]).expand(*features.shape[:3], len(kind))
    return torch.cat([features, told], -1)


def _relative(norm: Tensor) -> Tensor:
    """Norms relative to their mean over members and units."""
    return norm / norm.mean((1, 2), keepdim=True).clamp_min(1e-6) - 1


def _norm(columns: Tensor) -> Tensor:
    """Norms of the columns of matrices; ``torch.norm`` is the faster way only for rows."""
    return columns.square().sum(-2).clamp_min(1e-24).sqrt()


def _norm_and_cosine(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Norms of rows ``[f, m, n, r]``, and their cosines to their mean over members."""
    # products of the members' rows tell both; those of one family are views, so nothing is copied
    gram = torch.stack([own.transpose(0, 1) @ own.permute(1, 2, 0) for own in rows])  # [f, n, m, m]
    norm = gram.diagonal(dim1=-2, dim2=-1).mT.clamp_min(1e-24).sqrt()
    mean = gram.mean((-2, -1)).clamp_min(1e-24).sqrt()[:, None]
    return norm, gram.mean(-1).mT / (norm * mean).clamp_min(1e-6)


def _biases(members: Weights, layout: Layout, space: str, zero: Tensor) -> Tensor:
    makers = [x for x in layout.producers(space) if x.bias]
    return sum((_of_space(members[x.bias], layout, x, space) for x in makers), zero)


def _others(members: Weights, layout: Layout, space: str, zero: Tensor) -> Tensor:
    """Mean of the other tensors with one number per unit, such as those of a normalisation."""
    biases = {layer.bias for layer in layout.layers}
    others = [
        units.collected(members[key], 2, space).mean(-1)
        for key, (_, units) in layout.carried.items()
        if len(layout.spec.axes[key]) == 1 and key not in biases and space in units.spaces
    ]
    return sum(others, zero) / max(1, len(others))
