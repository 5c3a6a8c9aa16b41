"""Signs of units that may be turned around: by a unit's own weights, or by those of the medoid."""

from collections.abc import Sequence

import torch
from torch import Tensor

from metamerge.alignment.assignment import assign
from metamerge.alignment.medoid import medoid
from metamerge.structure import Permutation, PermutationSpec, Scaling
from metamerge.weights import Weights

_PASSES = 3  # after the first: matching with signs settles as fast as without


def rescaled(weights: Weights, spec: PermutationSpec, scaling: Scaling, factors: Tensor) -> Weights:
    """``spec.rescale`` for stacked members, each with factors of its own.

    Args:
        weights: Every tensor ``[m, ...]``.
        spec: Their permutation spec.
        scaling: One of ``spec.scalings``.
        factors: ``[m, *blocks, n]``.

    Returns:
        New weights; tensors that are not scaled are passed through.
    """

    def one(key: str) -> Tensor:
        return torch.vmap(lambda t, f: spec.rescale_tensor(key, t, scaling, f))(
            weights[key], factors
        )

    return {key: one(key) if key in scaling.powers else t for key, t in weights.items()}


def own_signs(weights: Weights, spec: PermutationSpec) -> tuple[Weights, float | None]:
    """Turn units around so that the cubes of their weights add up to 0 or more.

    Only weights whose other units have their sign already are looked at; what knows most of these
    is decided first.

    Args:
        weights: Stacked members, every tensor ``[m, ...]``.
        spec: Their permutation spec.

    Returns:
        The members, and the share of free units that were turned around; None where none is free.
    """
    weights, signs = _by_cubes(weights, spec, _free(spec))
    return weights, _share(signs)


def matched_signs(weights: Weights, spec: PermutationSpec) -> tuple[Weights, float | None]:
    """Turn units around to the sign at which they agree with what they are matched to.

    All members are matched to the medoid, group after group, where a pair of units is worth its
    inner product, or the opposite of it where one of the two may be turned around. Units that are
    nested in blocks are left to ``own_signs``.

    Args:
        weights: Stacked members, every tensor ``[m, ...]``.
        spec: Their permutation spec.

    Returns:
        The members, and the share of free units that were turned around; None where none is free.
    """
    free = _free(spec)
    flat = [g for g in spec.groups if not spec.outer(g) and not spec.inner(g)]
    signs: list[Tensor] = []
    if any(scaling.group in flat for scaling in free):
        weights, signs = _by_matching(weights, spec, flat)
    weights, nested = _by_cubes(weights, spec, [s for s in free if s.group not in flat])
    return weights, _share([*signs, *nested])


def _free(spec: PermutationSpec) -> list[Scaling]:
    """Changes of scale that include the sign."""
    return [scaling for scaling in spec.scalings if scaling.kind != "positive"]


def _share(signs: list[Tensor]) -> float | None:
    """Share of units whose sign is not the one they had."""
    if not signs:
        return None
    return float(torch.cat([sign.flatten() for sign in signs]).lt(0).double().mean())


def _turns(scaling: Scaling, key: str, axis: int) -> bool:
    """Whether entries along an axis change their sign with a unit, and with no other of it."""
    powers = scaling.powers.get(key, {})
    return [a for a, power in powers.items() if power % 2] == [axis]


def _by_cubes(
    weights: Weights, spec: PermutationSpec, scalings: Sequence[Scaling]
) -> tuple[Weights, list[Tensor]]:
    """``own_signs`` for some changes of scale.

    Returns:
        The members, and the signs of every group ``[m, *blocks, n]`` in the order of their choice.
    """
    waiting, signs = list(scalings), []
    while waiting:
        uses = [_decided(spec, scaling, waiting) for scaling in waiting]
        known = [sum(weights[key][0].numel() for key, _ in own) for own in uses]
        best = known.index(max(known))
        scaling = waiting.pop(best)
        if not uses[best]:
            continue
        rows = [spec.unit_rows(k, axis, scaling.group, weights[k]) for k, axis in uses[best]]
        signs.append(_sign(sum(own.pow(3).sum(-1) for own in rows).cpu()))
        weights = rescaled(weights, spec, scaling, signs[-1])
    return weights, signs


def _decided(
    spec: PermutationSpec, scaling: Scaling, waiting: Sequence[Scaling]
) -> list[tuple[str, int]]:
    """Tensors and axes that a change of sign turns, and no other one that is not decided yet."""
    others = [s for s in waiting if s is not scaling]
    return [
        (key, axis)
        for key, axis in spec.touching(scaling.group)
        if _turns(scaling, key, axis)
        and not any(power % 2 for s in others for power in s.powers.get(key, {}).values())
    ]


def _by_matching(
    weights: Weights, spec: PermutationSpec, groups: Sequence[str]
) -> tuple[Weights, list[Tensor]]:
    """Match groups to those of the medoid: a first pass by what is known, then by all.

    Returns:
        The members, and the sign of every unit, ``[m, n]`` per change of scale.
    """
    chosen = int(medoid({key: t[None] for key, t in weights.items()}, spec)[0])
    target = {key: tensor[chosen] for key, tensor in weights.items()}
    index: Permutation = {}
    signs: dict[int, Tensor] = {}
    waiting = list(groups)
    while waiting:
        known = [
            sum(target[key].numel() for key, _ in _comparable(spec, group, {*index}))
            for group in waiting
        ]
        group = waiting.pop(known.index(max(known)))
        weights = _decide(weights, target, spec, group, index, signs)
    for group in [*groups] * _PASSES:
        weights = _decide(weights, target, spec, group, index, signs)
    return weights, list(signs.values())


def _comparable(spec: PermutationSpec, group: str, known: set[str]) -> list[tuple[str, int]]:
    """Tensors and axes by which units can be compared: all their other units are matched."""
    found = []
    for key, axis in spec.touching(group):
        carried = [p.group for a in range(len(spec.axes[key])) for p in spec.places(key, a)]
        if carried.count(group) == 1 and {*carried} - {group} <= known:
            found.append((key, axis))
    return found


def _decide(
    weights: Weights,
    target: Weights,
    spec: PermutationSpec,
    group: str,
    index: Permutation,
    signs: dict[int, Tensor],
) -> Weights:
    """Match one group and turn its units around; ``index`` and ``signs`` take what was decided.

    Returns:
        The members.
    """
    members, count = len(next(iter(weights.values()))), spec.groups[group]
    scalings = {i: s for i, s in enumerate(spec.scalings) if s.group == group and s in _free(spec)}
    gains = {i: torch.zeros(members, count, count, dtype=torch.float64) for i in (-1, *scalings)}
    others = {g: perm for g, perm in index.items() if g != group}
    for key, axis in _comparable(spec, group, {*others}):
        placed = spec.permute_tensor(key, weights[key], others)
        rows = spec.unit_rows(key, axis, group, placed)  # [m, n, r]
        wanted = spec.unit_rows(key, axis, group, target[key])  # [n, r]
        home = next((i for i, s in scalings.items() if _turns(s, key, axis)), -1)
        gains[home] += torch.einsum("ir,mjr->mij", wanted, rows).cpu()
    fixed = gains.pop(-1)
    index[group] = assign(fixed + sum(gain.abs() for gain in gains.values()))
    for i, gain in gains.items():
        agreement = _sign(gain.gather(-1, index[group][..., None])[..., 0])  # [m, n], by slots
        turned = torch.ones_like(agreement).scatter(-1, index[group], agreement)
        signs[i] = signs.get(i, 1.0) * turned
        weights = rescaled(weights, spec, scalings[i], turned)
    return weights


def _sign(values: Tensor) -> Tensor:
    return torch.where(values < 0, -1.0, 1.0).double()
