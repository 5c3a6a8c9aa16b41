"""How good is a merger on validation families?"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from evaluation.metrics import accuracy
from metamerge.mergers import Merger, ThresholdObjective, wilson_lower_bound
from metamerge.structure import run
from metamerge.weights import Weights
from trainers.families import Families, thresholds_of


@dataclass(frozen=True)
class Goal:
    """What families are judged by.

    Attributes:
        objective: What their accuracy is measured against.
        labels: Whether accuracy is that on classes; if not, agreement with the members' soft vote.
        at_once: Families that are merged at a time.
    """

    objective: ThresholdObjective
    labels: bool
    at_once: int


@torch.no_grad()
def validate(
    merger: Merger, groups: Sequence[Families], goal: Goal, accelerator: Accelerator
) -> dict[str, float]:
    """Judge merged validation families, which the processes share out among them.

    Args:
        merger: The merger.
        groups: Families by zoo and size.
        goal: What they are judged by.
        accelerator: The processes.

    Returns:
        Accuracy of every group and of all, that of the worst tenth, the share of families above
        their threshold, and its lower Wilson bound.
    """
    scores, above, everyone = {}, [], []
    for group in groups:
        found = torch.zeros(len(group), device=accelerator.device)
        wanted, thresholds = judged(group, goal)
        for rows in torch.arange(len(group)).split(goal.at_once):
            own = rows[accelerator.process_index :: accelerator.num_processes].to(found.device)
            if len(own):
                fused = merger({k: t[own] for k, t in group.weights.items()}, group.layout).weights
                found[own] = score(fused, group, wanted[own])
        found = accelerator.reduce(found, "sum")
        scores[f"validation_accuracy_{group.name}"] = float(found.mean())
        above.append(found >= thresholds)
        everyone.append(found)
    passed, accuracies = torch.cat(above), torch.cat(everyone)
    scores["validation_accuracy"] = float(accuracies.mean())
    scores["validation_worst_decile"] = float(accuracies.quantile(0.1))
    scores["share_above_threshold"] = float(passed.float().mean())
    scores["wilson_lower_bound"] = wilson_lower_bound(int(passed.sum()), len(passed))
    return scores


def judged(group: Families, goal: Goal) -> tuple[Tensor, Tensor]:
    """What the fused networks of some families should say.

    Args:
        group: The families.
        goal: What they are judged by.

    Returns:
        Classes that they should name, ``[f, n]``, and for what share of the images, ``[f]``.
    """
    if goal.labels:
        return group.targets(), group.thresholds(goal.objective)
    voted = group.answers.float().softmax(-1).mean(1).argmax(-1)
    return voted, thresholds_of(group.answers.float(), voted, goal.objective)


def score(fused: Weights, group: Families, wanted: Tensor) -> Tensor:
    """Accuracy of fused networks.

    Args:
        fused: Networks of some families of a group, ``[f, ...]``.
        group: The group.
        wanted: Classes that they should name, ``[f, n]``.

    Returns:
        ``[f]``.
    """
    logits = run(group.layout.program, fused, [group.images[0]], stacked=True)
    return accuracy(logits, wanted)
