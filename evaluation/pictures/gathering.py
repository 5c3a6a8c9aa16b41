"""What pictures of one family show, gathered from a bench; nothing is trained here.

Everything has the task's numbers of classes, and is measured on test images unless other images are
asked for. Fused networks come from the caller, for all families of the bench: ``Bench.merge``.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from evaluation.bench import Bench
from evaluation.merging import NOTHING
from evaluation.methods.entries import USUAL
from evaluation.metrics import (
    Reliability,
    barriers,
    family_logits,
    landscape,
    lines,
    reliability,
    soft_vote,
    variance_ratio,
)
from evaluation.pictures.landscapes import Lines, Plane
from metamerge.corrections.batch_norm import normalisations
from metamerge.mergers.gate import shares
from metamerge.mergers.ordering import in_canonical_order, member_order
from metamerge.mergers.reading import read_members, trust_in
from metamerge.mergers.watching import watched_inputs
from metamerge.structure import OUTPUTS, Layout
from metamerge.weights import Weights, stack
from zoo.training import predict
from zoo.weight_space import principal_components

AS_TRAINED, ALIGNED = "as trained", "aligned"
MOST = 1000  # images that lines are measured on
IN_PLANES = 250  # images that planes are measured on, which have a thousand networks each
WATCHED = 256  # objective images that units are watched on


def states(bench: Bench, family: int) -> dict[str, Weights]:
    """One family's members before and after alignment.

    Args:
        bench: The families.
        family: Which.

    Returns:
        State -> ``[1, m, ...]``.
    """
    merging = bench.merging
    aligned = stack([stack(merging.aligned(f, (USUAL,), NOTHING)[0]) for f in range(bench.count)])
    found = {AS_TRAINED: bench.families, ALIGNED: bench.in_task(aligned)}
    return {state: _one(weights, family) for state, weights in found.items()}


def lines_of(
    bench: Bench, family: int, *, points: int = 21, split: str = "test"
) -> dict[str, Lines]:
    """Loss and accuracy on the lines between all pairs of one family, for ``interpolation_figure``.

    Args:
        bench: The families.
        family: Which.
        points: Mixtures on a line, ends included.
        split: Part of the images.

    Returns:
        State -> lines.
    """
    pairs, coefficients = lines(bench.members, points)
    found = {}
    for state, members in states(bench, family).items():
        seen = landscape(
            bench.layout.program,
            members,
            coefficients,
            *_images(bench, split),
            calibration=_calibration(bench),
        )
        shape = (len(pairs), points)
        found[state] = Lines(seen.loss[0].reshape(shape), seen.score[0].reshape(shape))
    return found


def barriers_of(
    bench: Bench, family: int, *, points: int = 11, split: str = "test"
) -> dict[str, Tensor]:
    """Loss barriers between all pairs of one family, for ``barrier_figure``.

    Args:
        bench: The families.
        family: Which.
        points: Mixtures on a line, ends included.
        split: Part of the images.

    Returns:
        State -> ``[m, m]``.
    """
    return {
        state: barriers(
            bench.layout.program,
            members,
            *_images(bench, split),
            points=points,
            calibration=_calibration(bench),
        )[0]
        for state, members in states(bench, family).items()
    }


def planes_of(
    bench: Bench,
    family: int,
    fused: Mapping[str, Weights],
    *,
    grid: int = 33,
    split: str = "test",
) -> dict[str, Plane]:
    """The loss in the plane in which one family differs most, for ``weight_plane_figure``.

    Args:
        bench: The families.
        family: Which.
        fused: Name -> fused networks ``[f, ...]`` in the slots of the aligned members; they are
            drawn beside these.
        grid: Places along each side of the plane.
        split: Part of the images.

    Returns:
        State -> plane; its headline tells how much of the distances lies in it.
    """
    found = {}
    for state, members in states(bench, family).items():
        others = {"average": {key: tensor.mean(1, keepdim=True) for key, tensor in _float(members)}}
        if state == ALIGNED:
            given = {name: _one(own, family, axis=True) for name, own in fused.items()}
            others |= {n: own for n, own in given.items() if not _same(own, others["average"])}
        plane, share = _plane(bench, members, others, grid, split)
        found[f"{state} (the plane holds {share:.0%} of the spread)"] = plane
    return found


def _plane(
    bench: Bench, members: Weights, others: Mapping[str, Weights], grid: int, split: str
) -> tuple[Plane, float]:
    everyone = {
        key: torch.cat([tensor, *(own.get(key, tensor[:, :1]) for own in others.values())], 1)
        for key, tensor in members.items()
    }  # [1, n, ...]
    components = principal_components({key: tensor[0] for key, tensor in everyone.items()})
    low, high = components.places.amin(0), components.places.amax(0)
    middle, half = (low + high) / 2, 0.65 * (high - low).max()
    x, y = (torch.linspace(float(m - half), float(m + half), grid) for m in middle)
    places = torch.cartesian_prod(y, x).flip(1)  # [grid * grid, 2], row by row
    count = len(components.places)
    mixed = 1 / count + places @ components.coefficients.mT
    seen = landscape(
        bench.layout.program,
        everyone,
        mixed,
        *_images(bench, split, IN_PLANES),
        calibration=_calibration(bench),
    )
    kinds = {"members": slice(0, bench.members)}
    kinds |= {
        name: slice(bench.members + i, bench.members + i + 1) for i, name in enumerate(others)
    }
    plane = Plane(
        x,
        y,
        seen.loss[0].reshape(grid, grid),
        {kind: components.places[at] for kind, at in kinds.items()},
        {kind: seen.member_loss[0, at] for kind, at in kinds.items()},
    )
    return plane, components.share


@torch.no_grad()
def mixing_of(bench: Bench, family: int, merger: nn.Module) -> dict[str, Tensor]:
    """Whom a merger mixes into what, for ``mixing_figure``.

    Args:
        bench: The families.
        family: Which.
        merger: A trained merger.

    Returns:
        Layer -> coefficients of its units, ``[m, n]``; where the merger has a gate, ``GATE`` ->
        shares in the consensus on every class, the mean over what members are watched on, ``[m,
        c]``. A member that is kept as it is has all of everything.
    """
    members, layout = states(bench, family)[ALIGNED], bench.layout
    (watched,) = watched_inputs(merger, in_canonical_order(members, layout)[0], layout)
    seen = read_members(merger, members, layout, watched.inputs, sparse=False)
    found = {_layer(layout, space): own[0] for space, own in seen.mixing.items()}
    last = layout.producers(OUTPUTS)
    if merger.gate is not None and len(last) == 1:
        trust = trust_in(merger.gate, members, layout, seen.states, seen.observed, seen.spread)
        found[GATE] = shares(trust, seen.observed[last[0].node])[0].mean(1)
    if watched.kept is not None:
        kept = int(member_order(members)[0, watched.kept])
        for own in found.values():
            own.zero_()[kept] = 1
    return found


GATE = "gate, by class"


def _layer(layout: Layout, space: str) -> str:
    made = layout.producers(space)
    return made[0].weight if made else space


def variances_of(bench: Bench, fused: Mapping[str, Weights]) -> dict[str, dict[str, Tensor]]:
    """Variance of fused units over that of their members, for ``variance_figure``.

    Args:
        bench: The families.
        fused: Name -> fused networks ``[f, ...]``.

    Returns:
        Name -> key of a layer's weight -> ratio of every family, ``[f]``.
    """
    inputs = bench.budget.objective[0][:WATCHED]
    return {
        name: variance_ratio(own, bench.families, bench.layout, inputs)
        for name, own in fused.items()
    }


def reliabilities_of(
    bench: Bench, fused: Mapping[str, Weights], *, bins: int = 15, split: str = "test"
) -> dict[str, Reliability]:
    """Confidence and accuracy of ensembles and fused networks, for ``reliability_figure``.

    Args:
        bench: The families.
        fused: Name -> fused networks ``[f, ...]``.
        bins: Number of bins.
        split: Part of the images.

    Returns:
        Name -> bins; all families together.
    """
    inputs, targets = bench.judged.split.images(split)
    program = bench.layout.program
    said = {"soft-vote ensemble": soft_vote(family_logits(program, bench.families, inputs))}
    said |= {name: predict(program, own, inputs) for name, own in fused.items()}
    return {
        name: reliability(logits.flatten(0, 1), targets.repeat(bench.count), bins=bins)
        for name, logits in said.items()
    }


def _images(bench: Bench, split: str, most: int = MOST) -> tuple[Tensor, Tensor]:
    inputs, targets = bench.judged.split.images(split)
    chosen = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))[:most]
    return inputs[chosen], targets[chosen]


def _calibration(bench: Bench) -> Tensor | None:
    """Images that running statistics of mixtures are measured on, where a network has some."""
    normalised = any(True for _ in normalisations(bench.layout.program))
    return bench.budget.objective[0][:WATCHED] if normalised else None


def _one(weights: Weights, family: int, *, axis: bool = False) -> Weights:
    """One family, ``[1, ...]``, or with an axis for members, ``[1, 1, ...]``."""
    own = {key: tensor[family : family + 1] for key, tensor in weights.items()}
    return {key: tensor[:, None] for key, tensor in own.items()} if axis else own


def _same(weights: Weights, others: Weights) -> bool:
    """Whether two networks are the same but for rounding."""
    return all(torch.allclose(weights[key], own, atol=1e-5) for key, own in others.items())


def _float(weights: Weights) -> list[tuple[str, Tensor]]:
    return [(key, tensor) for key, tensor in weights.items() if tensor.is_floating_point()]
