"""Examining a merger: gates, recall of forgotten classes, distance to what it has seen."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from evaluation.bench import Bench
from evaluation.by_heart import copies_nothing, nearest_training
from evaluation.contestants import Contestant
from evaluation.gates import collapse_gates, forgotten_class_recall
from metamerge.alignment import weight_matching
from metamerge.mergers import fuse
from metamerge.weights import Weights
from zoo.variants import renamed

COMPARED = 500  # images that distances to training networks are measured on


def examine(bench: Bench, contestant: Contestant) -> dict[str, Any]:
    """Everything that is to be known of a merger beside its accuracy; no test image is seen.

    Args:
        bench: The families.
        contestant: The merger.

    Returns:
        ``gates``, ``forgotten_class_recall`` and ``nearest_training``: the smallest and the mean
        relative distance of its networks to those that it was trained on, or None where it was not
        trained on these families' zoo.
    """
    merging = _merging(bench, contestant)
    where = (merging, bench.judged.families, bench.layout, *bench.budget.validation)
    told = {"labels": bench.judged.classes, "seed": bench.seed}
    gates = collapse_gates(*where, **told)
    distances = distances_to_seen(bench, contestant)
    if distances is not None:
        gates.append(copies_nothing(distances))
    return {
        "gates": [gate.record for gate in gates],
        "forgotten_class_recall": forgotten_class_recall(*where, **told),
        "nearest_training": None
        if distances is None
        else {"nearest": float(distances.min()), "mean": float(distances.mean())},
    }


def distances_to_seen(bench: Bench, contestant: Contestant) -> Tensor | None:
    """How far a merger's networks are from the nearest network that it was trained on.

    All get the task's numbers of classes, so a merger that renames what it knows by heart is found
    out as well.

    Args:
        bench: The families.
        contestant: The merger.

    Returns:
        Relative distances ``[f]``, see ``nearest_training``; None where it was not trained on
        these families' zoo.
    """
    judged, layout = bench.judged, bench.layout
    if judged.training is None or not contestant.knows_zoo(judged.identity.get("zoo", "")):
        return None
    members, classes = judged.training
    known = members if classes is None else renamed(members, layout, classes)
    spec = layout.spec
    aligned = spec.permute(judged.families, weight_matching(judged.families, spec))
    return nearest_training(
        bench.in_task(_merging(bench, contestant)(aligned)),
        {key: tensor.flatten(0, 1) for key, tensor in known.items()},
        layout.program,
        bench.budget.validation[0][:COMPARED],
    )


def _merging(bench: Bench, contestant: Contestant) -> Callable[[Weights], Weights]:
    """The merger as it is used when nothing but weights is given, on aligned members."""
    return lambda members: fuse(contestant.merger, members, bench.layout)
