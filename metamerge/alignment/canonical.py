"""Canonical: undo changes of scale and sign that leave a network the same function.

A ReLU unit can be scaled if the next layer divides the factor out again, a tanh unit can be turned
around. Members that differ by that look different to whatever matches units by weights. Here every
unit gets incoming and outgoing weights of one norm, which is the smallest squared norm of all
weights that the network can have, and the sign at which it resembles its like in the medoid.

Papers: for scales, Stock, Graham, Gribonval, Jégou, "Equi-normalization of Neural Networks", ICLR
2019, arXiv:1902.10416, section 3; we count biases as incoming weights. For signs, Chen, Lu,
Hecht-Nielsen, "On the geometry of feedforward neural network error surfaces", Neural Computation
5(6), 1993; choosing them by a matching with the medoid is ours.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metamerge.alignment._signs import matched_signs, own_signs, rescaled
from metamerge.options import check_choice
from metamerge.registry import alignment
from metamerge.structure import PermutationSpec, Scaling
from metamerge.weights import Weights, check_compatible, stack

_SIGNS = ("medoid", "own")
_SWEEPS = 200
_SETTLED = 1e-7  # largest change of a unit's scale, as a logarithm, that is not followed up


@alignment(paper="arXiv:1902.10416", permutes=False)
def canonical(
    weights: Sequence[Weights],
    spec: PermutationSpec,
    *,
    signs: str = "medoid",
    report: dict[str, Any] | None = None,
) -> list[Weights]:
    """Bring the scale and sign of every unit into a form that does not depend on how it was stored.

    Units stay where they are, and every member remains the same function. Units without incoming or
    without outgoing weights keep their scale. Follow it up by a matching:
    ``align=["canonical", "weight_matching"]``.

    Args:
        weights: One state dict per member, of one architecture.
        spec: Its permutation spec; ``spec.scalings`` says what may be changed.
        signs: ``medoid``: a unit takes the sign at which it agrees with the unit of the medoid that
            it is most like, either way round. ``own``: the sign at which the cubes of its weights
            add up to more than 0, which depends on no other member, and is decided by noise where
            they add up to little. Units nested in blocks (of attention heads) take that one always.
        report: Takes ``sweeps``, how often all groups were balanced, and ``flipped``, the share of
            units whose sign was changed, where any sign is free.

    Returns:
        One state dict per member, in new memory and the members' own dtypes.

    Raises:
        ConfigError: If the option is unknown.
        IncompatibleWeights: If members differ in their widths.
    """
    check_choice("canonical", "signs", signs, _SIGNS)
    check_compatible([(f"weights[{k}]", own) for k, own in enumerate(weights)])
    exact = stack([{key: own[key].double() for key in spec.axes} for own in weights])
    exact, sweeps = _balanced(exact, spec)
    choose = matched_signs if signs == "medoid" else own_signs
    exact, flipped = choose(exact, spec)
    if report is not None:
        report["sweeps"] = sweeps
        report |= {} if flipped is None else {"flipped": flipped}
    return [_stored(own, exact, m) for m, own in enumerate(weights)]


def _stored(own: Weights, exact: Weights, member: int) -> Weights:
    """One member in its own dtypes; what no unit touches, and what counts, is copied."""
    return {
        key: exact[key][member].to(t.dtype, copy=True)
        if key in exact and t.is_floating_point()
        else t.clone()
        for key, t in own.items()
    }


def _balanced(weights: Weights, spec: PermutationSpec) -> tuple[Weights, int]:
    """Balance one group after the other until nothing changes.

    Each step is the exact minimum of the squared norm of all weights over the scales of one group;
    together they have one minimum, as that norm is convex in the logarithms of the scales.

    Args:
        weights: Stacked members, every tensor ``[m, ...]``.
        spec: Their permutation spec.

    Returns:
        The balanced weights, and the number of sweeps over all groups.
    """
    scalings = [scaling for scaling in spec.scalings if scaling.kind != "sign"]
    for sweep in range(_SWEEPS if scalings else 0):
        largest = 0.0
        for scaling in scalings:
            step = _step(weights, spec, scaling)  # [m, *blocks, n]
            weights = rescaled(weights, spec, scaling, step.exp())
            largest = max(largest, float(step.abs().max()))
        if largest < _SETTLED:
            return weights, sweep + 1
    return weights, _SWEEPS if scalings else 0


def _step(weights: Weights, spec: PermutationSpec, scaling: Scaling) -> Tensor:
    """Logarithm of the factor that balances what grows with a unit's scale and what shrinks.

    Returns:
        ``[m, *blocks, n]``; 0 for units of which either is nothing.
    """
    grows = shrinks = torch.zeros((), dtype=torch.float64)
    up = down = 0
    damping = 1.0
    for key, powers in scaling.powers.items():
        if len(powers) > 1:  # units of one group scale each other: all at once would overshoot
            damping = 0.5
        for axis, power in powers.items():
            norm = spec.unit_rows(key, axis, scaling.group, weights[key]).square().sum(-1)
            if power > 0:
                grows, up = grows + power * norm, max(up, power)
            else:
                shrinks, down = shrinks - power * norm, max(down, -power)
    there = (grows > 0) & (shrinks > 0)
    ratio = torch.where(there, shrinks, 1.0) / torch.where(there, grows, 1.0)
    return damping * ratio.log() / (2 * max(up + down, 1))
