"""Families as a merger is trained on them: aligned once, each with the accuracy to reach."""

from dataclasses import dataclass

from torch import Tensor

from evaluation.metrics import family_logits, references
from metamerge.alignment import weight_matching
from metamerge.mergers import ThresholdObjective
from metamerge.weights import Weights
from zoo.store import Zoo


@dataclass(frozen=True)
class Families:
    """Aligned families of one size with the accuracy that each must reach."""

    weights: Weights  # [f, m, ...]
    thresholds: Tensor  # [f]

    def pick(self, rows: Tensor) -> "Families":
        """A part of the families."""
        return Families({k: t[rows] for k, t in self.weights.items()}, self.thresholds[rows])

    def __len__(self) -> int:
        return len(self.thresholds)


def load_families(
    zoo: Zoo, part: str, images: tuple[Tensor, Tensor], objective: ThresholdObjective
) -> dict[int, Families]:
    """Families of one part by size, aligned, with thresholds on the given images."""
    inputs, targets = images
    found = {}
    for members in zoo.sizes:
        raw = zoo.families(part, members)
        aligned = zoo.layout.spec.permute(raw, weight_matching(raw, zoo.layout.spec))
        aligned = {key: tensor.to(inputs.device) for key, tensor in aligned.items()}
        scores = references(family_logits(zoo.layout.program, aligned, inputs), targets)
        thresholds = objective.thresholds(scores["best_member"], scores["ensemble"])
        found[members] = Families(aligned, thresholds)
    return found
