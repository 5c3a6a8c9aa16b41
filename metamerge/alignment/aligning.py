"""Calling alignments by name, one after the other, on the members of one family."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from metamerge.alignment.weight_matching import matching_cost
from metamerge.declaration import bind
from metamerge.errors import ConfigError, IncompatibleWeights
from metamerge.registry import Alignment, get_alignment
from metamerge.structure import Layout
from metamerge.weights import Weights, stack, widened


def chosen_alignments(align: str | Sequence[str] | None) -> list[Alignment]:
    """Look up what ``align=`` names.

    Args:
        align: A name, several in the order in which they are to be applied, or None.

    Returns:
        Their records.

    Raises:
        ConfigError: If there is no alignment of such a name.
    """
    return [get_alignment(name) for name in listed(align)]


def listed(names: str | Sequence[str] | None) -> list[Any]:
    """One name, several, or none, as a list; what is neither stands for itself, to be refused."""
    if names is None or isinstance(names, list | tuple):
        return list(names or ())
    return [names]


def align_members(
    weights: Sequence[Weights],
    layout: Layout,
    align: str | Sequence[str] | None,
    *,
    resources: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[list[Weights], list[dict[str, Any]]]:
    """Bring the members of a family into common slots.

    Args:
        weights: One state dict per member.
        layout: Their architecture.
        align: One of ``list_alignments()``, or several, applied in their order.
        resources: What alignments may ask for: ``batches``, ``generator``.
        options: Options of the alignments; each gets those that it has.

    Returns:
        Aligned members, and for each alignment what is told of it: ``name``, ``seconds``, where
        the members are of one width ``matching_cost_before`` and ``matching_cost``, and what it
        reports itself, such as its ``objective`` per step.

    Raises:
        ConfigError: If an alignment or an option is unknown, or a resource is missing.
        IncompatibleWeights: If members of several widths come to an alignment that only permutes.
    """
    records, given = chosen_alignments(align), dict(options or {})
    check_align_options(records, given)
    members, told = list(weights), []
    family = _family(members) if records else None
    cost = _cost(family, layout)
    for record in records:
        clock, report = time.perf_counter(), {"name": record.name}
        own = {name: value for name, value in given.items() if name in record.options}
        at_hand = {**(resources or {}), "layout": layout, "report": report}
        arguments = bind(record, at_hand, own)
        before = cost
        members, family = _applied(record, members, family, layout, arguments)
        cost = _cost(family, layout)
        costs = {"matching_cost_before": before, "matching_cost": cost}
        report.update({name: number for name, number in costs.items() if number is not None})
        report["seconds"] = round(time.perf_counter() - clock, 4)
        told.append(report)
    return members, told


def check_align_options(records: Sequence[Alignment], options: Mapping[str, Any]) -> None:
    """Refuse options that none of some alignments has.

    Args:
        records: The alignments.
        options: The user's options.

    Raises:
        ConfigError: If there is an option that none of them has.
    """
    known = sorted({name for record in records for name in record.options})
    for name in options:
        if name not in known:
            names = " and ".join(repr(record.name) for record in records) or "align=None"
            raise ConfigError(
                f"align_options: {names} has no option {name!r}. Options: {', '.join(known)}."
            )


def _applied(
    record: Alignment,
    members: list[Weights],
    family: Weights | None,
    layout: Layout,
    arguments: dict[str, Any],
) -> tuple[list[Weights], Weights | None]:
    """Members after an alignment, in their own dtypes and stacked."""
    if not record.permutes:
        members = record.function(members, layout.spec, **arguments)
        return members, _family(members)
    if family is None:
        raise IncompatibleWeights(
            f"align: {record.name!r} takes members of one width, got several. Put "
            f"'optimal_transport' before it."
        )
    with torch.no_grad():
        perm = record.function(family, layout.spec, **arguments)
    members = [
        layout.spec.permute(own, {group: index[0, m] for group, index in perm.items()})
        for m, own in enumerate(members)
    ]
    return members, layout.spec.permute(family, perm)  # which costs less than stacking anew


@torch.no_grad()
def _family(members: Sequence[Weights]) -> Weights | None:
    """Members stacked as one family, ``[1, m, ...]``; None where their widths differ."""
    if any(member[key].shape != members[0][key].shape for member in members for key in member):
        return None
    return {key: tensor[None] for key, tensor in stack(widened(members)).items()}


def _cost(family: Weights | None, layout: Layout) -> float | None:
    """How far the members are from their mean; None where they cannot be compared."""
    return None if family is None else float(matching_cost(family, layout.spec, {}))
