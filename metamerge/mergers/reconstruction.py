"""Reconstruction: what the autoencoder merger is trained on before it learns to merge."""

import torch
from torch import Tensor

from metamerge.calibration import divergence, predict
from metamerge.corrections.refit import observe
from metamerge.mergers.autoencoder import AutoencoderMerger
from metamerge.mergers.latents import row_states
from metamerge.mergers.reading import read_units
from metamerge.structure import Layout
from metamerge.weights import Weights


def reconstruct(
    merger: AutoencoderMerger, members: Weights, layout: Layout, inputs: Tensor | None = None
) -> Weights:
    """Decode every single member from its own latents.

    Args:
        merger: The merger.
        members: Aligned members, ``[f, m, ...]``.
        layout: Layers of their architecture.
        inputs: Inputs to watch them on in place of the learned probes.

    Returns:
        ``[f, m, ...]``; what belongs to no layer, or to two, is as it was.
    """
    probes = merger.probes.for_members(members, layout) if inputs is None else inputs
    observed = observe(members, layout, probes)
    states = read_units(members, layout, observed, merger.embed, merger.rounds)
    latents = merger.coder.encode(members, layout, states)
    decoded = dict(members)
    for layer in layout.unshared:
        own, state = latents[layer.node], row_states(states, layer, layout)
        like = members[layer.weight].shape[2:]
        decoded[layer.weight], bias = merger.coder.decode(own.codes, state, own, like)
        if layer.bias:
            decoded[layer.bias] = bias
    return decoded


def reconstruction_loss(
    merger: AutoencoderMerger,
    members: Weights,
    layout: Layout,
    inputs: Tensor | None = None,
    *,
    behaviour: float = 1.0,
) -> Tensor:
    """How much of single members is lost on the way through their latents.

    Args:
        merger: The merger.
        members: Aligned members, ``[f, m, ...]``.
        layout: Layers of their architecture.
        inputs: Inputs on which the outputs are compared; by default the merger's probes.
        behaviour: Weight of the divergence of the outputs of decoded members from the members' own,
            against the mean over layers of the squared error relative to the squared norm.

    Returns:
        A number.
    """
    decoded = reconstruct(merger, members, layout)
    errors = [_error(decoded, members, [layer.weight, layer.bias]) for layer in layout.unshared]
    loss = torch.stack(errors).mean()
    if not behaviour:
        return loss
    images = merger.probes.for_members(members, layout) if inputs is None else inputs
    found, wanted = (
        predict({k: t.flatten(0, 1) for k, t in some.items()}, layout, images.detach())
        for some in (decoded, members)
    )
    return loss + behaviour * divergence(found, wanted.softmax(-1)).mean()


def _error(decoded: Weights, members: Weights, keys: list[str | None]) -> Tensor:
    """Squared error of a layer relative to its squared norm, mean over members and families."""
    missed, size = (
        sum(tensor.square().flatten(2).sum(2) for tensor in some)  # [f, m]
        for some in (
            [decoded[key] - members[key] for key in keys if key],
            [members[key] for key in keys if key],
        )
    )
    return (missed / size.clamp_min(1e-12)).mean()
