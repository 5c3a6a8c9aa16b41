"""Rows of a comparison: what was scored, on which families, with which seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scored:
    """One way of getting predictions, scored on all test families of one size.

    Attributes:
        method: What it is called.
        members: Members per family.
        data: What it was given at merge time: ``none``, ``segments``, ``unlabelled:n`` or
            ``labelled:n``.
        accuracies: On test images, ``[f]``; the mean over seeds where there were several.
        seconds: Per family.
        parameters: That have to be kept.
        control: Whether it is a control.
        by_seed: Mean over families for every seed, where it was made with several.
    """

    method: str
    members: int
    data: str
    accuracies: Tensor  # [f]
    seconds: float
    parameters: int
    control: bool
    by_seed: tuple[float, ...] = ()

    @property
    def label(self) -> str:
        """Method and images, which are one row of a table."""
        return self.method if self.data in ("none", "segments") else f"{self.method}, {self.data}"

    def record(self) -> dict[str, Any]:
        """What a ledger keeps, accuracies of all families included."""
        return {**vars(self), "accuracies": self.accuracies.tolist()}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Scored":
        """What ``record`` gave, read again."""
        own = {"accuracies": torch.tensor(record["accuracies"])}
        return cls(**{**record, **own, "by_seed": tuple(record.get("by_seed", ()))})

    def row(self) -> dict[str, Any]:
        """The row of ``leaderboard.json``."""
        return {
            "method": self.method,
            "members": self.members,
            "data": self.data,
            "accuracy_mean": round(float(self.accuracies.mean()), 6),
            "accuracy_std": round(_spread(self.accuracies), 6),
            "accuracy_worst": round(float(self.accuracies.min()), 6),
            "families": len(self.accuracies),
            "seeds": max(1, len(self.by_seed)),
            "accuracy_seed_std": round(_spread(torch.tensor(self.by_seed)), 6),
            "seconds": round(self.seconds, 6),
            "parameters": self.parameters,
            "control": self.control,
        }


def over_seeds(repeats: Sequence[Scored]) -> Scored:
    """The same row with several seeds as one.

    Args:
        repeats: One row per seed, or the only one of a row that no seed changes.

    Returns:
        The row: for each family the mean over seeds.
    """
    if len(repeats) == 1:
        return repeats[0]
    return replace(
        repeats[0],
        accuracies=torch.stack([one.accuracies for one in repeats]).mean(0),
        seconds=sum(one.seconds for one in repeats) / len(repeats),
        by_seed=tuple(float(one.accuracies.mean()) for one in repeats),
    )


def _spread(values: Tensor) -> float:
    """Standard deviation of a sample; 0 where there is nothing to spread."""
    return float(values.std(correction=1)) if len(values) > 1 else 0.0
