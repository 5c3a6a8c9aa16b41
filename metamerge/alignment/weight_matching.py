"""Weight matching for any number of members: units are permuted towards the members' barycentre.

Paper: Ainsworth, Hayase, Srinivasa, "Git Re-Basin: Merging Models modulo Permutation Symmetries",
ICLR 2023, arXiv:2209.04836, sections 3.2 (weight matching) and A.10 (MergeMany). We differ in three
ways: members are matched to the medoid first, and then in the order of their distance from the
others, so the result does not depend on the order in which they are given; a first pass compares
units only by weights whose other axes are known by then, so nothing depends on the order in which a
member stores its units either; and many families are matched in one call.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metamerge.alignment.barycentre import cost_of, to_each_other
from metamerge.alignment.descent import Member, first_pass, sweep
from metamerge.alignment.medoid import distances, matching_cost, medoid
from metamerge.alignment.plan import Plan
from metamerge.options import check_choice, check_count
from metamerge.registry import alignment
from metamerge.structure import Permutation, PermutationSpec
from metamerge.weights import Weights

__all__ = ["matching_cost", "medoid", "weight_matching"]

_CACHED = 2**20  # numbers of as many families as are matched side by side: they stay in the cache
_EXACT = 2**25  # numbers up to which members are held in float64, and not only multiplied in it
_TARGETS = ("barycentre", "reference")


@alignment(paper="arXiv:2209.04836")
def weight_matching(
    weights: Weights,
    spec: PermutationSpec,
    *,
    sweeps: int = 30,
    to: str = "barycentre",
    reference: int | None = None,
    restarts: int = 0,
    generator: torch.Generator | None = None,
    report: dict[str, Any] | None = None,
) -> Permutation:
    """Permute every member's units to bring all members close to their common mean.

    Coordinate descent over groups; each step is a linear assignment. First all members are matched
    to the medoid, then one after the other to the mean of the rest, until nothing moves. No step of
    the second stage takes the members further from their common mean.

    Args:
        weights: Stacked members of ``f`` families, every tensor ``[f, m, ...]``.
        spec: Permutation spec of their architecture.
        sweeps: Upper bound on passes over all groups, in each of the two stages.
        to: ``barycentre``, or ``reference`` for the first stage only: each member is matched to
            one of them, pair by pair, as in section 3.2 of the paper.
        reference: Number of the member that the others are matched to first; None for the medoid,
            with which the order of members does not matter.
        restarts: How many times to match once more, with groups and members in random order. Of
            each family the run with the lowest matching cost counts.
        generator: Source of randomness of the restarts.
        report: Takes ``objective``, the matching cost (mean over families) of members as they were,
            after the first stage, and after each pass of the second, of the first run; with
            restarts also ``restart``, the run that counts of each family, 0 for the first, and
            ``costs``, the matching cost of every run.

    Returns:
        Group -> ``[f, m, n]``; apply it with ``spec.permute``.

    Raises:
        ConfigError: If an option is out of its range.
    """
    families, members = next(iter(weights.values())).shape[:2]
    _check(members, sweeps, to, reference, restarts)
    weights = {key: weights[key].detach() for key in spec.axes}
    plan = Plan(spec, tuple(group for group in spec.groups if not spec.outer(group)))
    if not plan.groups:
        return {}
    order = _order(weights, spec, members, reference).expand(families, members)
    watched = report is not None or restarts > 0
    runs = [_run(weights, plan, order, sweeps, to, watched)]
    for _ in range(restarts):
        generator = generator or torch.Generator().manual_seed(0)
        order = torch.rand(families, members, generator=generator).argsort(-1)
        shuffled = torch.randperm(len(plan.groups), generator=generator).tolist()
        other = plan.in_order([plan.groups[i] for i in shuffled])
        runs.append(_run(weights, other, order, sweeps, to, watched))
    return _best(runs, report)


def _order(weights: Weights, spec: PermutationSpec, members: int, reference: int | None) -> Tensor:
    """Who comes first: the reference, or the medoid, of which a pair has none."""
    if reference is None and members > 2:
        return distances(weights, spec).argsort(-1)  # [f, m]
    first = reference or 0
    return torch.tensor([first, *(k for k in range(members) if k != first)])


class _Run(NamedTuple):
    """Permutations of all families, and, where anybody watches, their matching cost by steps."""

    perm: Permutation
    costs: list[Tensor]  # each [f]


def _check(members: int, sweeps: int, to: str, reference: int | None, restarts: int) -> None:
    check_choice("weight_matching", "to", to, _TARGETS)
    check_count("weight_matching", "sweeps", sweeps, 1)
    check_count("weight_matching", "restarts", restarts)
    last, medoid = "that of the last member", "for the medoid"
    check_count("weight_matching", "reference", reference, 0, members - 1, limit=last, none=medoid)


def _best(runs: Sequence[_Run], report: dict[str, Any] | None) -> Permutation:
    """Of every family the run with the lowest cost, the first among equals."""
    if report is not None:
        report["objective"] = [float(cost.mean()) for cost in runs[0].costs]
    if len(runs) == 1:
        return runs[0].perm
    last = torch.stack([run.costs[-1] for run in runs])  # [runs, f]
    best = last.argmin(0)  # [f]
    if report is not None:
        report.update(restart=best.tolist(), costs=last.mean(1).tolist())
    families = torch.arange(len(best))
    return {g: torch.stack([run.perm[g] for run in runs])[best, families] for g in runs[0].perm}


def _run(weights: Weights, plan: Plan, order: Tensor, sweeps: int, to: str, watched: bool) -> _Run:
    """Match all families, as many side by side as the cache holds."""
    size = sum(tensor[0].numel() for tensor in weights.values())
    parts = torch.arange(len(order)).split(max(1, _CACHED // max(1, size)))
    runs = [_run_part(weights, plan, order, part, sweeps, to, watched) for part in parts]
    longest = max(len(run.costs) for run in runs)
    steps = [[*costs, *costs[-1:] * (longest - len(costs))] for _, costs in runs]
    perm = {g: torch.cat([run.perm[g] for run in runs]) for g in runs[0].perm}
    return _Run(perm, [torch.cat(costs) for costs in zip(*steps, strict=True)])


def _run_part(
    weights: Weights,
    plan: Plan,
    order: Tensor,
    families: Tensor,
    sweeps: int,
    to: str,
    watched: bool,
) -> _Run:
    order = order[families]
    members = [_member(weights, plan, families, order[:, k]) for k in range(order.shape[1])]
    costs = [cost_of(members)] if watched else []
    at_rest = [_matched(member, members[0].tensors, plan, sweeps) for member in members[1:]]
    costs += [cost_of(members)] if watched else []
    if to == "barycentre" and not (len(members) == 2 and all(at_rest)):  # a pair is symmetric
        costs += to_each_other(members, plan, sweeps)
    rows, back = torch.arange(len(order))[:, None], order.argsort(-1)
    perm = {g: torch.stack([m.index[g] for m in members], 1)[rows, back] for g in plan.spec.groups}
    return _Run(perm, costs)


def _member(weights: Weights, plan: Plan, families: Tensor, which: Tensor) -> Member:
    """One member of every family as it was given, in a dtype that sums keep their digits in."""
    small = sum(tensor[0].numel() for tensor in weights.values()) <= _EXACT
    tensors = {}
    for key, tensor in weights.items():
        own = tensor[families, which] if len(families) > 1 else tensor[families[0], which[0]][None]
        exact = torch.float64 if small or own.dtype == torch.float64 else torch.float32
        tensors[key] = own.to(exact)
    index = {g: i.expand(len(families), *i.shape) for g, i in plan.spec.identity().items()}
    return Member(tensors, index)


def _matched(member: Member, centre: Weights, plan: Plan, sweeps: int) -> bool:
    """Match one member to a fixed centre, group after group; whether it came to rest."""
    first_pass(member, centre, plan)
    at_rest = any(not sweep(member, centre, plan) for _ in range(sweeps))
    member.products.clear()  # the next target is another
    member.settled.clear()
    return at_rest
