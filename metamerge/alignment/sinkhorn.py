"""Sinkhorn re-basin: permutations found by gradient descent on a loss of the merged network.

Paper: Peña, Medeiros, Dubail, Aminbeidokhti, Granger, Pedersoli, "Re-basin via Implicit Sinkhorn
Differentiation", CVPR 2023, arXiv:2212.12042. Every permutation is the limit of a doubly stochastic
matrix, made of free logits by the Sinkhorn operator and differentiated implicitly (section 3). The
losses are those of section 4: distance of weights, midpoint, and random point between members.

We differ in four ways. All of any number of members are permuted towards each other, not one
towards another. The distance is taken between different members only, so blurring a matrix gains
nothing. Descent starts at weight matching's result. And after every step the logits are hardened to
permutations; those of the lowest loss are returned, so the result is never worse than the start.
"""

from collections.abc import Callable
from math import log
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metamerge.alignment.medoid import matching_cost
from metamerge.alignment.merged_loss import MergedLoss, merged, merged_loss
from metamerge.alignment.soft_permutation import (
    Matrices,
    check_not_nested,
    doubly_stochastic,
    hardened,
    mixed,
    normalised,
    relaxed_cost,
)
from metamerge.alignment.weight_matching import weight_matching
from metamerge.calibration import Batches
from metamerge.errors import ConfigError
from metamerge.options import check_choice, check_count, check_number
from metamerge.registry import alignment
from metamerge.structure import Layout, Permutation, PermutationSpec
from metamerge.weights import Weights

_LOSSES = ("weights", "midpoint", "random_point")
_STARTS = ("weight_matching", "identity")
_ROUNDS = 10  # of normalisation per step: logits are kept near their limit, see ``_step``
_POINTS = 4  # between the members, at which hardened permutations are judged by "random_point"


class _Objective(NamedTuple):
    """What is lowered: of soft permutations with a gradient, of permutations for the choice."""

    soft: Callable[[Matrices], Tensor]
    hard: Callable[[Permutation], Tensor]


@alignment(paper="arXiv:2212.12042")
def sinkhorn(
    weights: Weights,
    spec: PermutationSpec,
    *,
    layout: Layout | None = None,
    batches: Batches | None = None,
    labels: Tensor | None = None,
    generator: torch.Generator | None = None,
    report: dict[str, Any] | None = None,
    loss: str | None = None,
    start: str = "weight_matching",
    steps: int = 60,
    rate: float = 0.3,
    confidence: float = 0.9,
) -> Permutation:
    """Permute all members by gradient descent on a loss of their merger.

    Args:
        weights: Stacked members of ``f`` families, every tensor ``[f, m, ...]``.
        spec: Permutation spec of their architecture, without nested groups.
        layout: Their architecture; for all losses but ``weights``.
        batches: Inputs, or inputs with labels, on which the merged network is judged; for all
            losses but ``weights``.
        labels: Labels ``[b]``, where the batches do not carry them; without any, the merged network
            is compared with the soft vote of its members.
        generator: Draws the inputs of a step, and points between members.
        report: Takes ``loss``, the one that was chosen; and, as means over families,
            ``objective``, the loss of the hardened permutations at the start and after every step,
            ``soft``, the loss of the soft ones before every step, ``start`` and ``best``.
        loss: None for ``midpoint`` where there are batches and a network to run, else ``weights``.
            ``weights``, the distance of members to their mean, relative to their squared norm;
            ``midpoint``, the loss of their average; or ``random_point``, that of a convex
            combination drawn anew for every step, which depends on the order of the members.
        start: ``weight_matching``, or ``identity`` for members as they are.
        steps: Steps of Adam.
        rate: Its learning rate, of the logits.
        confidence: Share of every soft unit that is the start's at first, in (0, 1).

    Returns:
        Group -> ``[f, m, n]``, of no higher loss than the start.

    Raises:
        ConfigError: If an option is out of its range, what a loss needs is missing, or groups are
            nested in each other.
    """
    if loss is None:
        runs = batches is not None and layout is not None and layout.program is not None
        loss = "midpoint" if runs else "weights"
    _check(loss, start, steps, rate, confidence)
    if report is not None:
        report["loss"] = loss
    check_not_nested("sinkhorn", spec)
    families, members = next(iter(weights.values())).shape[:2]
    known = {g: i.expand(families, members, -1) for g, i in spec.identity().items()}
    if start == "weight_matching":
        known = weight_matching(weights, spec)
    placed = spec.permute({key: _wide(t) for key, t in weights.items()}, known)
    if loss == "weights":
        objective = _distance(placed, spec)
    else:
        _check_data(loss, layout, batches)
        judge = merged_loss(placed, layout, batches, labels)
        objective = _function(placed, spec, judge, loss, generator)
    if not known:
        return known
    like = next(t for t in placed.values() if t.is_floating_point())
    logits = _logits(known, like, confidence)
    found = _descend(objective, logits, steps, rate, report)
    return {group: index.gather(-1, found[group]) for group, index in known.items()}


def _check(loss: str, start: str, steps: int, rate: float, confidence: float) -> None:
    check_choice("sinkhorn", "loss", loss, _LOSSES)
    check_choice("sinkhorn", "start", start, _STARTS)
    check_count("sinkhorn", "steps", steps, 1)
    check_number("sinkhorn", "rate", rate, "(0, inf)")
    check_number("sinkhorn", "confidence", confidence, "(0, 1)")


def _check_data(loss: str, layout: Layout | None, batches: Batches | None) -> None:
    if layout is None or layout.program is None:
        raise ConfigError(
            f"sinkhorn: loss={loss!r} runs the merged network, and there is none. Pass a module "
            f'that can be traced as model=, or loss="weights".'
        )
    if batches is None:
        raise ConfigError(
            f"sinkhorn: loss={loss!r} needs inputs, none were given. Pass batches=<calibration "
            f'inputs, or (inputs, labels)>, or loss="weights".'
        )


def _wide(tensor: Tensor) -> Tensor:
    """Detached, and with digits enough for small steps."""
    short = tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.detach().float() if short else tensor.detach()


def _distance(members: Weights, spec: PermutationSpec) -> _Objective:
    """Distance of the members to their mean."""
    return _Objective(
        lambda matrices: relaxed_cost(members, spec, matrices),
        lambda perm: matching_cost(members, spec, perm),
    )


def _function(
    members: Weights,
    spec: PermutationSpec,
    judge: MergedLoss,
    loss: str,
    generator: torch.Generator | None,
) -> _Objective:
    """Loss of what the members merge into; hard permutations are judged on all the inputs."""
    generator = generator or torch.Generator().manual_seed(0)
    shape = next(iter(members.values())).shape[:2]
    centre = torch.full(shape, 1 / shape[1])

    def point() -> Tensor:
        if loss == "midpoint":
            return centre
        drawn = -torch.rand(shape, generator=generator).clamp_min(1e-9).log()
        return drawn / drawn.sum(1, keepdim=True)  # uniform among all convex combinations

    points = [point() for _ in range(1 if loss == "midpoint" else _POINTS)]

    def soft(matrices: Matrices) -> Tensor:
        aligned = {**members, **mixed(members, spec, matrices)}
        return judge.drawn(generator)(merged(aligned, point()))

    def hard(perm: Permutation) -> Tensor:
        aligned = spec.permute(members, perm)
        with torch.no_grad():
            return torch.stack([judge(merged(aligned, shares)) for shares in points]).mean(0)

    return _Objective(soft, hard)


def _logits(known: Permutation, like: Tensor, confidence: float) -> Matrices:
    """Logits of soft identities: ``confidence`` for a unit's own place, the rest for all others."""
    logits = {}
    for group, index in known.items():
        n = index.shape[-1]
        peak = log(confidence / (1 - confidence)) + log(max(n - 1, 1))
        eye = torch.eye(n, dtype=like.dtype, device=like.device)
        logits[group] = (peak * eye).expand(*index.shape, n).clone().requires_grad_()
    return logits


def _descend(
    objective: _Objective,
    logits: Matrices,
    steps: int,
    rate: float,
    report: dict[str, Any] | None,
) -> Permutation:
    """Lower the soft objective with Adam; of all hardened iterates keep each family's best.

    Returns:
        Group -> ``[f, m, n]``.
    """
    now = hardened(logits)
    cost = objective.hard(now)  # [f]
    best, lowest = {g: index.clone() for g, index in now.items()}, cost.clone()
    soft, hard = [], [float(cost.mean())]
    optimizer = torch.optim.Adam(logits.values(), lr=rate)
    for _ in range(steps):
        soft.append(_step(objective, logits, optimizer))
        before, now = now, hardened(logits)
        if any(not torch.equal(before[g], now[g]) for g in now):
            cost = objective.hard(now)
            better = cost < lowest
            lowest = torch.where(better, cost, lowest)
            for g, index in now.items():
                best[g][better.cpu()] = index[better.cpu()]
        hard.append(float(cost.mean()))
    if report is not None:
        report.update(objective=hard, soft=soft, start=hard[0], best=float(lowest.mean()))
    return best


def _step(objective: _Objective, logits: Matrices, optimizer: torch.optim.Optimizer) -> float:
    """One step of the optimizer.

    Logits are then put back near the logarithms of their matrices: the same matrices, for less
    normalisation in the next step.

    Returns:
        The soft objective before the step, as a mean over families.
    """
    with torch.enable_grad():
        matrices = {g: doubly_stochastic(own, _ROUNDS) for g, own in logits.items()}
        cost = objective.soft(matrices)
        slopes = torch.autograd.grad(cost.sum(), list(logits.values()), materialize_grads=True)
    for own, slope in zip(logits.values(), slopes, strict=True):
        own.grad = slope
    optimizer.step()
    with torch.no_grad():
        for own in logits.values():
            own.copy_(normalised(own, 2))
    return float(cost.detach().mean())
