"""Cycle-consistent matching: all members are mapped into one universe, all groups jointly.

Paper: Crisostomi et al., "C²M³: Cycle-Consistent Multi-Model Merging", NeurIPS 2024,
arXiv:2405.17897. With one permutation of every member into a common universe, going from member to
member and back always ends where it began. The sum over all pairs of inner products of aligned
members is maximised over doubly stochastic matrices by the Frank-Wolfe algorithm (section 3), where
a step is a linear assignment per member and group.

We differ in four ways. The sum over pairs comes from the sum of the members, so the work grows with
their number and not its square. The step length is the exact maximum of a polynomial. Starts do not
depend on the order of the members: weight matching's result, blurred, and the most central members
in turn, with every order of units equally likely in all others; of all results, weight matching's
included, the best counts. And what comes out is finished by assigning one member after the other.
"""

from typing import Any

import torch

from metamerge.alignment.barycentre import to_each_other
from metamerge.alignment.descent import Member
from metamerge.alignment.frank_wolfe import frank_wolfe
from metamerge.alignment.medoid import distances, matching_cost
from metamerge.alignment.plan import Plan
from metamerge.alignment.soft_permutation import Matrices, check_not_nested, hardened, matrices_of
from metamerge.alignment.weight_matching import weight_matching
from metamerge.options import check_count
from metamerge.registry import alignment
from metamerge.structure import Permutation, PermutationSpec
from metamerge.weights import Weights

_SWEEPS = 30  # upper bound on passes over all members at the end


@alignment(paper="arXiv:2405.17897")
def cycle_consistent(
    weights: Weights,
    spec: PermutationSpec,
    *,
    report: dict[str, Any] | None = None,
    restarts: int = 1,
    steps: int = 60,
) -> Permutation:
    """Permute all members into a universe in which they agree best, all groups at once.

    Args:
        weights: Stacked members of ``f`` families, every tensor ``[f, m, ...]``.
        spec: Permutation spec of their architecture, without nested groups.
        report: Takes ``objective``, the relaxed matching cost step by step from the start of the
            lowest cost, with the matching cost of the result at its end; and ``costs``, the
            matching cost that each start led to. All are means over families.
        restarts: How many members, the most central first, are taken as a start besides weight
            matching's result; all of them where there are fewer.
        steps: Upper bound on Frank-Wolfe steps from each start.

    Returns:
        Group -> ``[f, m, n]``; its matching cost is never above that of weight matching.

    Raises:
        ConfigError: If an option is out of its range, or groups are nested in each other.
    """
    check_count("cycle_consistent", "restarts", restarts)
    check_count("cycle_consistent", "steps", steps, 1)
    check_not_nested("cycle_consistent", spec)
    if not spec.groups:
        return {}
    order = distances(weights, spec).argsort(-1)  # [f, m], the medoid first
    rows = torch.arange(len(order))[:, None]
    exact = {key: weights[key].detach()[rows, order].double() for key in spec.axes}
    known = weight_matching(exact, spec)
    found, runs = {"weight_matching": known}, {}
    for name, matrices in _starts(exact, spec, known, restarts).items():
        matrices, runs[name] = frank_wolfe(exact, spec, matrices, steps)
        found[name] = _finished(exact, spec, hardened(matrices))
    costs = {name: matching_cost(exact, spec, perm).cpu() for name, perm in found.items()}
    best = torch.stack(list(costs.values())).argmin(0)  # [f]
    if report is not None:
        report["costs"] = {name: float(cost.mean()) for name, cost in costs.items()}
        run = runs[min(runs, key=report["costs"].__getitem__)]
        report["objective"] = [*run, float(torch.stack(list(costs.values())).amin(0).mean())]
    chosen = {g: torch.stack([p[g] for p in found.values()])[best, rows[:, 0]] for g in known}
    return {group: index[rows, order.argsort(-1)] for group, index in chosen.items()}


def _starts(
    weights: Weights, spec: PermutationSpec, known: Permutation, restarts: int
) -> dict[str, Matrices]:
    """Where to start from, with the most central members first.

    A permutation that no single assignment improves is a fixed point of Frank-Wolfe, which is why
    weight matching's result is blurred.

    Returns:
        Name of the start -> doubly stochastic matrices.
    """
    one = next(iter(weights.values()))
    families, members = one.shape[:2]
    uniform = {g: one.new_full((families, members, n, n), 1 / n) for g, n in spec.groups.items()}
    near = matrices_of(known, one)
    starts = {"blurred": {g: (near[g] + uniform[g]) / 2 for g in spec.groups}}
    for rank in range(min(restarts, members)):
        anchored = {g: matrix.clone() for g, matrix in uniform.items()}
        for g, n in spec.groups.items():
            anchored[g][:, rank] = torch.eye(n).to(one)
        starts[f"anchored_{rank}"] = anchored
    return starts


def _finished(weights: Weights, spec: PermutationSpec, perm: Permutation) -> Permutation:
    """Assign one member and group after the other to the sum of the rest, until none moves.

    Returns:
        Group -> ``[f, m, n]``, of no higher cost in any family.
    """
    aligned = spec.permute(weights, perm)
    members = [
        Member({key: t[:, k] for key, t in aligned.items()}, {g: i[:, k] for g, i in perm.items()})
        for k in range(next(iter(weights.values())).shape[1])
    ]
    to_each_other(members, Plan(spec, tuple(spec.groups)), _SWEEPS, singly=True)
    return {group: torch.stack([m.index[group] for m in members], 1) for group in perm}
