"""Families as a merger is trained on them: aligned once, beside what their members say."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evaluation.metrics import accuracy, family_logits
from metamerge.alignment import weight_matching
from metamerge.errors import ConfigError
from metamerge.mergers import ThresholdObjective
from metamerge.structure import Layout
from metamerge.weights import Weights
from zoo.parts import TaskSplit
from zoo.store import Zoo
from zoo.variants import Variants

Images = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Families:
    """Families of one zoo, part and size.

    Attributes:
        name: Such as ``k4``.
        layout: Their architecture.
        images: Inputs ``[n, ...]`` and classes ``[n]`` that mergers may use.
        weights: Aligned members, ``[f, m, ...]``.
        answers: Their logits on the images, ``[f, m, n, c]`` in half precision.
        variants: What the families know the task as.
    """

    name: str
    layout: Layout
    images: Images
    weights: Weights
    answers: Tensor
    variants: Variants

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def members(self) -> int:
        """Number of members of each family."""
        return self.answers.shape[1]

    def targets(self, rows: Tensor | None = None, chosen: Tensor | None = None) -> Tensor:
        """Classes of images as families know them.

        Args:
            rows: Which families; None for all.
            chosen: Which images; None for all.

        Returns:
            ``[f, b]``.
        """
        known = self.images[1] if chosen is None else self.images[1][chosen]
        known = known.expand(len(self) if rows is None else len(rows), -1)
        classes = self.variants.classes
        if classes is None:
            return known
        maps = classes.to(known.device)
        return (maps if rows is None else maps[rows]).gather(1, known)

    def thresholds(self, objective: ThresholdObjective) -> Tensor:
        """Accuracy that each family has to reach on all images, ``[f]``."""
        return thresholds_of(self.answers.float(), self.targets(), objective)


def thresholds_of(answers: Tensor, targets: Tensor, objective: ThresholdObjective) -> Tensor:
    """Accuracy that families have to reach.

    Args:
        answers: Logits of their members, ``[f, m, b, c]``.
        targets: Classes as the families know them, ``[f, b]``.
        objective: What they are measured against.

    Returns:
        ``[f]``.
    """
    best = accuracy(answers, targets[:, None]).amax(1)
    return objective.thresholds(best, accuracy(answers.softmax(-1).mean(1), targets))


def load_families(zoo: Zoo, part: str, images: Images, prefix: str = "") -> dict[int, Families]:
    """Read, align and question the families of one part of a zoo.

    Args:
        zoo: The zoo.
        part: ``train`` or ``validation``.
        images: What the members are asked about, on the device that all is to lie on.
        prefix: Stands before the number of members in the names of groups.

    Returns:
        Number of members -> families.
    """
    inputs, layout = images[0], zoo.layout
    found = {}
    for members in zoo.sizes:
        raw = zoo.families(part, members)
        aligned = layout.spec.permute(raw, weight_matching(raw, layout.spec))
        aligned = {key: tensor.to(inputs.device) for key, tensor in aligned.items()}
        variants = Variants.from_records(zoo.records(part, members))
        with torch.no_grad():
            answers = family_logits(layout.program, aligned, inputs).half()
        found[members] = Families(f"{prefix}k{members}", layout, images, aligned, answers, variants)
    return found


@dataclass(frozen=True)
class Data:
    """Zoos with the families that a merger learns from and is judged on."""

    zoos: list[Zoo]
    training: list[Families]
    validation: list[Families]

    @property
    def digests(self) -> list[str]:
        """What the zoos hold."""
        return [zoo.digest for zoo in self.zoos]


def read_data(zoos: Sequence[tuple[Zoo, TaskSplit]], device: torch.device) -> Data:
    """Read training and validation families of all zoos.

    Args:
        zoos: Zoos and the splits of their tasks.
        device: Where everything is to lie.

    Returns:
        Families that are aligned, with what their members say of objective images.

    Raises:
        ConfigError: If there are too few validation families to compare with each other.
    """
    parts: dict[str, list[Families]] = {"train": [], "validation": []}
    for zoo, split in zoos:
        prefix = f"{zoo.folder.name}_" if len(zoos) > 1 else ""
        for part, images in (("train", "objective"), ("validation", "validation")):
            shown = tuple(t.to(device) for t in split.images(images))
            found = load_families(zoo, part, shown, prefix).values()
            if part == "validation":
                _check_validation(zoo, found)
            parts[part] += found
    return Data([zoo for zoo, _ in zoos], parts["train"], parts["validation"])


def _check_validation(zoo: Zoo, groups: Iterable[Families]) -> None:
    for group in groups:
        if len(group) < 2:
            raise ConfigError(
                f"{zoo.folder}: expected 2 validation families or more of K={group.members}, got "
                f"{len(group)}. Gates compare the networks of different families: build the zoo "
                "with --validation-families 2 or more."
            )
