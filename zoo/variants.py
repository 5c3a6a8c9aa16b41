"""Variants of a task: what the classes and the places of inputs mean may differ between families.

A merger that has seen families whose classes are renamed and whose pixels are permuted cannot learn
the task by heart; it has to read its members.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from metamerge.errors import IncompatibleWeights
from metamerge.structure import OUTPUTS, Layout
from metamerge.weights import Weights
from zoo.parts import TaskSplit


@dataclass(frozen=True, eq=False)
class Variants:
    """One variant of a task per family.

    Attributes:
        classes: Class of the task -> class that the family knows it as, -1 if it does not know it,
            int64 ``[f, classes]``; None where all families know all classes by their own numbers.
        places: Place of the family's inputs -> place of the task's, int64 ``[f, places]``; None
            where inputs are as they are. Channels of an image move together.
    """

    classes: Tensor | None = None
    places: Tensor | None = None

    def __bool__(self) -> bool:
        """Whether there is any difference."""
        return self.classes is not None or self.places is not None

    def known(self, family: int, rows: Tensor, targets: Tensor) -> Tensor:
        """Rows of which a family knows the class.

        Args:
            family: Which.
            rows: Rows of the task, int64 ``[rows]``.
            targets: Class of every row of the task.

        Returns:
            Those of ``rows``, in their order.
        """
        return rows if self.classes is None else rows[self.classes[family][targets[rows]] >= 0]

    def seen(self, inputs: Tensor, targets: Tensor, families: Tensor) -> tuple[Tensor, Tensor]:
        """What families see of inputs.

        Args:
            inputs: ``[a, b, ...]``.
            targets: ``[a, b]``; of a regression ``[a, b, o]``, which stay as they are.
            families: Family of each of the ``a``.

        Returns:
            Inputs and targets of the same shapes.
        """
        if self.classes is not None:
            maps = self.classes.to(targets.device)[families.to(targets.device)]  # [a, classes]
            targets = maps.gather(1, targets)
        if self.places is not None:
            maps = self.places.to(inputs.device)[families.to(inputs.device)]  # [a, places]
            flat = inputs.flatten(min(3, inputs.ndim - 1))  # [a, b, c, places] or [a, b, places]
            shape = [len(maps), *[1] * (flat.ndim - 2), maps.shape[1]]
            moved = flat.take_along_dim(maps.reshape(shape).expand_as(flat), -1)
            inputs = moved.reshape(inputs.shape)
        return inputs, targets

    def images(self, split: TaskSplit, part: str, family: int) -> tuple[Tensor, Tensor]:
        """The inputs of one part of a task as a family sees them.

        Args:
            split: The task and its parts.
            part: One of ``zoo.parts.PARTS``.
            family: Which.

        Returns:
            Inputs ``[rows, ...]`` and targets of those rows whose class it knows.
        """
        inputs, targets = split.images(part)
        if self.classes is not None:
            known = self.classes[family][targets] >= 0
            inputs, targets = inputs[known], targets[known]
        seen = self.seen(inputs[None], targets[None], torch.tensor([family]))
        return seen[0][0], seen[1][0]

    def records(self, members: int) -> Weights:
        """The maps as records of members, ``[f, m, ...]``."""
        maps = {"class_map": self.classes, "place_map": self.places}
        return {
            name: tensor.int()[:, None].repeat(1, members, 1)
            for name, tensor in maps.items()
            if tensor is not None
        }

    @classmethod
    def from_records(cls, records: Weights) -> "Variants":
        """The variants of families that were stored.

        Args:
            records: ``Zoo.records``.

        Returns:
            One variant per family.
        """
        found = [records.get(name) for name in ("class_map", "place_map")]
        return cls(*(None if maps is None else maps[:, 0].long() for maps in found))


def draw_classes(classes: int, known: int, relabel: bool, generator: torch.Generator) -> Tensor:
    """Which classes one family knows, and by which numbers.

    Args:
        classes: Of the task.
        known: How many the family knows; 0 for all.
        relabel: Whether they get numbers at random; otherwise they keep their order.
        generator: Source of randomness.

    Returns:
        Class of the task -> class of the family or -1, int64 ``[classes]``.
    """
    count = known or classes
    chosen = torch.randperm(classes, generator=generator)[:count]
    mapping = torch.full((classes,), -1)
    mapping[chosen if relabel else chosen.sort().values] = torch.arange(count)
    return mapping


def draw_places(
    shape: tuple[int, ...], permute: bool, mirror: bool, generator: torch.Generator
) -> Tensor:
    """Where one family's inputs come from: at random, or mirrored for every second family.

    Args:
        shape: Shape of one input: its places are the axes behind the first, or the only axis.
        permute: Whether places are permuted at random.
        mirror: Whether a coin decides about mirroring the last axis.
        generator: Source of randomness.

    Returns:
        Place of the family -> place of the task, int64 ``[places]``.
    """
    grid = shape[1:] if len(shape) > 1 else shape
    places = torch.arange(torch.Size(grid).numel()).reshape(grid)
    if mirror and torch.rand((), generator=generator) < 0.5:
        places = places.flip(-1)
    places = places.flatten()
    return places[torch.randperm(len(places), generator=generator)] if permute else places


def renamed(weights: Weights, layout: Layout, classes: Tensor) -> Weights:
    """Networks whose output ``i`` is their former output ``classes[i]``; exact, rows only move.

    ``Variants.classes`` brings families from numbers of their own to those of the task, and
    ``Variants.classes.argsort(-1)`` brings them back.

    Args:
        weights: Networks ``[f, ...]``, or members ``[f, m, ...]``; they are not changed.
        layout: Their architecture.
        classes: A permutation of the outputs for each family, int64 ``[f, c]``.

    Returns:
        Weights of the same shapes.

    Raises:
        IncompatibleWeights: If it is not a permutation of their outputs.
    """
    moved, numbers = dict(weights), torch.arange(classes.shape[-1], device=classes.device)
    if not (classes.sort(-1).values == numbers).all():
        raise IncompatibleWeights(
            f"renamed: expected permutations of 0 to {len(numbers) - 1}, got {classes.tolist()}. "
            "Families that do not know all classes cannot be given the task's numbers."
        )
    for layer in layout.producers(OUTPUTS):
        for key in filter(None, (layer.weight, layer.bias)):
            tensor = weights[key]
            lead = tensor.ndim - len(layout.spec.axes[key])  # 1, or 2 of members
            if tensor.shape[lead] != len(numbers):
                raise IncompatibleWeights(
                    f"renamed: {key!r} has {tensor.shape[lead]} rows, expected {len(numbers)}, one "
                    "per class."
                )
            behind = [1] * (tensor.ndim - lead - 1)
            rows = classes.reshape(-1, *[1] * (lead - 1), len(numbers), *behind)
            moved[key] = tensor.take_along_dim(rows.to(tensor.device), lead)
    return moved
