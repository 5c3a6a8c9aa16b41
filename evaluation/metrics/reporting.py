"""All metrics of families: members, ensemble, averages before and after alignment, and paths."""

from collections.abc import Mapping
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from evaluation.metrics.classification import agreement, mixture_accuracies, soft_vote
from evaluation.metrics.judging import Group
from evaluation.metrics.likeness import cosines, mean_of_pairs, relative_distances
from evaluation.metrics.paths import Landscape, landscape, lines, simplex
from evaluation.metrics.scoring import at_once, family_logits, score_outputs
from metamerge.alignment.aligning import align_members
from metamerge.corrections.batch_norm import normalisations, recalibrate
from metamerge.corrections.variance import variance_ratio
from metamerge.weights import Weights, stack, unstack
from zoo.training import predict

STATES = ("as trained", "aligned")


def family_metrics(
    group: Group, *, align: str, points: int, draws: int, bins: int, seed: int
) -> list[dict[str, Any]]:
    """All metrics of the families of a group, as many at a time as fit into memory.

    Args:
        group: The families.
        align: Alignment of the members; ``none`` for none.
        points: Mixtures on the line between two members, ends included; 0 for no lines.
        draws: Random mixtures of all members, beside their average; 0 for none.
        bins: Of the calibration error.
        seed: Of the draws.

    Returns:
        A dict per family that JSON can hold: ``members`` (scores of each), ``ensemble``, and per
        state, ``as trained`` and ``aligned``: scores of the ``average`` and its ``agreement`` with
        the ensemble, ``barriers``, ``simplex``, ``variance_ratio``, ``cosine`` and ``distance``.
    """
    network = {key: tensor[0, 0] for key, tensor in group.members.items()}
    size = at_once(group.layout.program, network, len(group.images[0]))
    size = max(1, size // len(group.member_names))
    found = []
    for start in range(0, len(group.names), size):
        some = group.part(slice(start, start + size))
        found += _metrics(some, align=align, points=points, draws=draws, bins=bins, seed=seed)
    return found


@torch.no_grad()
def _metrics(
    group: Group, *, align: str, points: int, draws: int, bins: int, seed: int
) -> list[dict[str, Any]]:
    inputs, targets = group.images
    logits = family_logits(group.layout.program, group.members, inputs)
    scores = score_outputs(logits, targets, segments=group.segments, bins=bins)
    if group.counts is not None:
        expected = [
            mixture_accuracies(by_class, counts)
            for by_class, counts in zip(scores["class_accuracies"], group.counts, strict=True)
        ]
        scores["segment_accuracies"] = torch.stack(expected)
    regression = targets.is_floating_point()
    together = logits.mean(1) if regression else soft_vote(logits)  # [f, b, c]
    ensemble = score_outputs(together, targets, bins=bins)
    generator = torch.Generator().manual_seed(seed)
    members = len(group.member_names)
    wanted = [lines(members, points)[1][:, 1:-1].flatten(0, 1)] if points and members > 1 else []
    wanted += [simplex(members, draws, generator=generator)] if draws and members > 1 else []
    states = {"as trained": group.members}
    if align != "none" and members > 1:
        states["aligned"] = _aligned(group, align)
    told = {name: _state(group, own, together, wanted, bins=bins) for name, own in states.items()}
    return [
        {
            "name": name,
            "members": [
                {"name": one, **plain(scores, (family, place))}
                for place, one in enumerate(group.member_names)
            ],
            "ensemble": plain(ensemble, (family,)),
            **{state: _family(own, family, members, points) for state, own in told.items()},
        }
        for family, name in enumerate(group.names)
    ]


def _state(
    group: Group, members: Weights, together: Tensor, wanted: list[Tensor], *, bins: int
) -> dict[str, Any]:
    """What hangs on how members are aligned, for all families: tensors ``[f, ...]``."""
    program, (inputs, targets) = group.layout.program, group.images
    normalised = any(True for _ in normalisations(program))
    calibration = group.calibration if normalised else None
    fused = {key: t.mean(1) if t.is_floating_point() else t[:, 0] for key, t in members.items()}
    if normalised:
        fused = recalibrate(fused, program, group.calibration)
    said = predict(program, fused, inputs)
    told: dict[str, Any] = {"average": score_outputs(said, targets, bins=bins)}
    if not targets.is_floating_point():
        told["average"]["agreement_with_ensemble"] = agreement(said, together)
    if wanted:
        told["landscape"] = landscape(
            program, members, torch.cat(wanted), inputs, targets, calibration=calibration
        )
    told["variance_ratio"] = variance_ratio(fused, members, group.layout, group.calibration)
    if len(group.member_names) > 1:
        each = unstack(members)
        told["cosine"] = torch.stack([mean_of_pairs(cosines(own)) for own in each])
        told["distance"] = torch.stack([mean_of_pairs(relative_distances(own)) for own in each])
    return told


def _family(told: Mapping[str, Any], family: int, members: int, points: int) -> dict[str, Any]:
    """One family out of ``_state``, for a file."""
    own: dict[str, Any] = {
        "average": plain(told["average"], (family,)),
        "variance_ratio": plain(told["variance_ratio"], (family,)),
    }
    own |= {name: float(told[name][family]) for name in ("cosine", "distance") if name in told}
    if "landscape" in told:
        own |= _connectivity(told["landscape"], family, members, points)
    return own


def _connectivity(found: Landscape, family: int, members: int, points: int) -> dict[str, Any]:
    """Barriers of the lines, and what the simplex says."""
    pairs = lines(members, 2)[0] if points else []
    between = len(pairs) * (points - 2) if points else 0
    excess, lost = found.excess[family], found.lost[family]
    told: dict[str, Any] = {}
    if between:
        highest = excess[:between].unflatten(0, (len(pairs), -1)).amax(1).clamp_min(0)
        most = lost[:between].unflatten(0, (len(pairs), -1)).amax(1).clamp_min(0)
        told["barriers"] = {
            "mean": float(highest.mean()),
            "largest": float(highest.max()),
            "score_lost": float(most.mean()),
            "pairs": [[*pair, float(value)] for pair, value in zip(pairs, highest, strict=True)],
        }
    if len(excess) > between:
        told["simplex"] = {
            "at_average": float(excess[between]),
            "mean": float(excess[between:].mean()),
            "largest": float(excess[between:].max()),
            "score_lost": float(lost[between:].mean()),
        }
    return told


def _aligned(group: Group, align: str) -> Weights:
    families = []
    for own in unstack(group.members):
        generator = torch.Generator().manual_seed(0)
        at_hand = {"batches": group.calibration, "generator": generator}
        found = align_members(unstack(own), group.layout, align, resources=at_hand)[0]
        families.append(stack(found))
    return stack(families)


def plain(scores: Mapping[str, Tensor], place: tuple[int, ...]) -> dict[str, Any]:
    """Scores of one network, as JSON can hold them.

    Args:
        scores: Name -> ``[..., ?]``.
        place: Which network.

    Returns:
        Name -> number, or a list of numbers; None in place of what is not finite.
    """
    return {name: _listed(values[place].tolist()) for name, values in scores.items()}


def _listed(value: Any) -> Any:
    if isinstance(value, list):
        return [_listed(one) for one in value]
    return value if isfinite(value) else None
