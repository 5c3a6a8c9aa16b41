"""Collapse gates: what every merger must pass before its accuracy means anything.

A decoder trained on a task loss can become a constant network that ignores its inputs and still
scores high on that task. Each gate is a number with a limit; a merger that breaks one is broken,
whatever its accuracy.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from evaluation.metrics import accuracy, mean_of_pairs, output_cosines
from metamerge.alignment import weight_matching
from metamerge.structure import OUTPUTS, Layout
from metamerge.weights import Weights
from zoo.training import predict
from zoo.variants import renamed

TURNS = 3  # members of a family that are poisoned, one at a time

Merge = Callable[[Weights], Weights]
"""Aligned members ``[f, m, ...]`` -> fused weights ``[f, ...]``."""


@dataclass(frozen=True)
class Gate:
    """One gate: what was measured, and the largest value that passes."""

    name: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the value is within the limit (NaN never is)."""
        return self.value <= self.limit

    @property
    def record(self) -> dict[str, Any]:
        """What cards and reports keep of it; None for a value that is not finite."""
        value = self.value if isfinite(self.value) else None
        return {"name": self.name, "value": value, "limit": self.limit, "passed": self.passed}


@torch.no_grad()
def collapse_gates(
    merge: Merge,
    families: Weights,
    layout: Layout,
    inputs: Tensor,
    targets: Tensor,
    *,
    labels: Tensor | None = None,
    seed: int = 0,
) -> list[Gate]:
    """Run all gates on families that the merger has not seen.

    Args:
        merge: The merger, on aligned members.
        families: Members as they were trained, not aligned, ``[f, m, ...]``.
        layout: Weight graph of their architecture.
        inputs: Images to judge on, ``[b, ...]``; not the test images.
        targets: Their classes, ``[b]``.
        labels: Class of the task -> class of each family, ``[f, c]``, where families number classes
            by themselves.
        seed: Seed of noise and permutations.

    Returns:
        The gates, in a fixed order.
    """
    generator = torch.Generator().manual_seed(seed)
    judge = _Judge(merge, layout, inputs)
    targets = targets if labels is None else labels[:, targets]
    fused = judge(families)  # [f, b, c]
    classes = fused.shape[-1]
    chance = 1 / classes
    names = torch.rand(len(fused), classes, generator=generator).argsort(-1)
    relabelled = renamed(families, layout, names)  # for all members of a family alike
    other = judge(relabelled)
    permuted = layout.spec.permute(families, _hidden(families, layout, generator))
    order = _cycle(next(iter(families.values())).shape[1], generator)
    copies = {k: t[:, :1].expand_as(t) for k, t in families.items()}
    single = {k: t[:, 0] for k, t in families.items()}
    shuffled_copies = layout.spec.permute(copies, _hidden(copies, layout, generator))
    score = _score(fused, accuracy(fused, targets))
    moved = _score(other, accuracy_relabelled(other, names, targets))
    gaussian, shuffled = judge(noise(families, generator)), judge(_shuffled(families, generator))
    return [
        Gate("garbage_gaussian", _score(gaussian, accuracy(gaussian, targets)), chance + 0.05),
        Gate("garbage_shuffled", _score(shuffled, accuracy(shuffled, targets)), chance + 0.05),
        Gate("label_permutation", abs(score - moved), 0.02),
        Gate("output_cosine", _cosine(other), 0.3),
        Gate("hidden_permutation", _relative(judge(permuted), fused), 1e-4),
        Gate(
            "member_order",
            _relative(judge({k: t[:, order] for k, t in families.items()}), fused),
            1e-4,
        ),
        Gate(
            "identical_members",
            _relative(judge(shuffled_copies), predict(layout.program, single, inputs)),
            1e-3,
        ),
        Gate("poisoned_member", _lost_to_poison(judge, families, targets, generator), 0.02),
    ]


@torch.no_grad()
def forgotten_class_recall(
    merge: Merge,
    families: Weights,
    layout: Layout,
    inputs: Tensor,
    targets: Tensor,
    *,
    labels: Tensor | None = None,
    seed: int = 0,
) -> float:
    """How much of a class comes back that all members of a family were made to forget.

    The output row of one class becomes the mean of the other rows in every member. What comes back
    is the merger's own: it names by elimination what no other class claims, or it knows the task
    by heart and needs the members only for the names of the classes. This is a figure to report,
    not a gate: elimination is honest, and no limit tells the two apart.

    Args:
        merge: The merger, on aligned members.
        families: Members as they were trained, not aligned, ``[f, m, ...]``.
        layout: Weight graph of their architecture.
        inputs: Images to judge on, ``[b, ...]``; not the test images.
        targets: Their classes, ``[b]``.
        labels: Class of the task -> class of each family, ``[f, c]``, where families number classes
            by themselves.
        seed: Seed of the classes that are forgotten.

    Returns:
        Mean recall of the forgotten classes.
    """
    generator = torch.Generator().manual_seed(seed)
    judge = _Judge(merge, layout, inputs)
    rows = layout.producers(OUTPUTS)[0].weight
    ignorant, lost = _forget(families, layout, families[rows].shape[2], generator)
    recalled = judge(ignorant)
    asked = targets if labels is None else labels[:, targets]
    return _score(recalled, recall(recalled, lost, asked))


def accuracy_relabelled(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Accuracy of networks whose classes were renamed.

    Args:
        logits: ``[f, b, c]``.
        labels: ``labels[f, i]`` is the class that logit ``i`` stands for, ``[f, c]``.
        targets: ``[b]`` or ``[f, b]``.

    Returns:
        ``[f]``.
    """
    named = torch.take_along_dim(labels, logits.argmax(-1), dim=1)  # [f, b]
    return (named == targets).float().mean(1)


def recall(logits: Tensor, classes: Tensor, targets: Tensor) -> Tensor:
    """Share of the images of one class per network that the network recognises.

    Args:
        logits: ``[f, b, c]``.
        classes: The class that each network is asked for, ``[f]``.
        targets: ``[b]`` or ``[f, b]``.

    Returns:
        ``[f]``.
    """
    asked = targets == classes[:, None]  # [f, b]
    found = logits.argmax(-1) == classes[:, None]
    return (asked & found).sum(1) / asked.sum(1)


class _Judge:
    """Align, merge, run."""

    def __init__(self, merge: Merge, layout: Layout, inputs: Tensor) -> None:
        self.merge, self.layout, self.inputs = merge, layout, inputs

    def __call__(self, families: Weights) -> Tensor:
        spec = self.layout.spec
        fused = self.merge(spec.permute(families, weight_matching(families, spec)))
        return predict(self.layout.program, fused, self.inputs)


def _forget(
    families: Weights, layout: Layout, classes: int, generator: torch.Generator
) -> tuple[Weights, Tensor]:
    """Make all members of a family forget one class: its row becomes the mean of the others."""
    count, members = next(iter(families.values())).shape[:2]
    lost = torch.randint(classes, (count,), generator=generator)
    ignorant = dict(families)
    for layer in layout.producers(OUTPUTS):
        for key in filter(None, (layer.weight, layer.bias)):
            tensor = families[key]
            shape = (count, members, 1, *tensor.shape[3:])
            place = lost.reshape(-1, *[1] * (tensor.ndim - 1)).expand(shape).to(tensor.device)
            own = tensor.gather(2, place)
            others = (tensor.sum(2, keepdim=True) - own) / (classes - 1)
            ignorant[key] = tensor.scatter(2, place, others)
    return ignorant, lost


def _hidden(families: Weights, layout: Layout, generator: torch.Generator) -> dict[str, Tensor]:
    return layout.spec.random(generator, next(iter(families.values())).shape[:2])


def _cycle(members: int, generator: torch.Generator) -> Tensor:
    """A random order in which no member keeps its place, however few there are."""
    places = torch.randperm(members, generator=generator)
    return torch.empty_like(places).scatter_(0, places, places.roll(1))


def noise(families: Weights, generator: torch.Generator) -> Weights:
    """Draw garbage: Gaussian tensors with the mean and spread of the members' own.

    Args:
        families: ``[f, m, ...]``.
        generator: Source of randomness.

    Returns:
        ``[f, m, ...]``; variances stay positive, and tensors that are not floating as they are.
    """
    garbage = {}
    for key, tensor in families.items():
        if not tensor.is_floating_point():
            garbage[key] = tensor
            continue
        drawn = tensor.mean() + tensor.std() * torch.randn(tensor.shape, generator=generator).to(
            tensor
        )
        garbage[key] = drawn.abs() + 1e-3 if key.endswith("running_var") else drawn
    return garbage


def _shuffled(families: Weights, generator: torch.Generator) -> Weights:
    """Every member's own numbers, in random places within each tensor."""
    shuffled = {}
    for key, tensor in families.items():
        flat = tensor.flatten(2) if tensor.ndim > 2 else tensor[..., None]
        index = torch.rand(flat.shape, generator=generator).argsort(-1).to(tensor.device)
        shuffled[key] = flat.gather(-1, index).view_as(tensor)
    return shuffled


def _lost_to_poison(
    judge: _Judge, families: Weights, targets: Tensor, generator: torch.Generator
) -> float:
    """Accuracy that is lost when a member is noise and not left out; members take turns."""
    count, members = next(iter(families.values())).shape[:2]
    first, garbage = (
        torch.randint(members, (count,), generator=generator),
        noise(families, generator),
    )
    own, lost = torch.arange(count)[:, None], []
    for turn in range(min(members, TURNS)):
        spoiled = torch.arange(members) == (first[:, None] + turn) % members  # [f, m]
        kept = (~spoiled).nonzero()[:, 1].reshape(count, members - 1)
        poisoned = {
            key: torch.where(spoiled.reshape(count, -1, *[1] * (t.ndim - 2)).to(t.device), d, t)
            for (key, t), d in zip(families.items(), garbage.values(), strict=True)
        }
        without, hurt = judge({k: t[own, kept] for k, t in families.items()}), judge(poisoned)
        lost.append(_score(without, accuracy(without, targets)))
        lost[-1] -= _score(hurt, accuracy(hurt, targets))
    return sum(lost) / len(lost)


def _score(logits: Tensor, accuracies: Tensor) -> float:
    """Mean accuracy; NaN where a logit is not finite, since its argmax would pass for chance."""
    return float(accuracies.mean()) if logits.isfinite().all() else float("nan")


def _relative(logits: Tensor, reference: Tensor) -> float:
    """Largest deviation over families, relative to the size of the reference."""
    gap = (logits - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)
    return float(gap.max())


def _cosine(logits: Tensor) -> float:
    """Mean cosine between the outputs of different families."""
    if len(logits) < 2:
        return float("nan")
    return float(mean_of_pairs(output_cosines(logits)))
