"""Budgets: the images that merges and controls may use, all of them or few."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

Images = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Budget:
    """The images that controls may use.

    Attributes:
        objective: Inputs and targets that a merger is trained on.
        validation: Inputs and targets that it is validated on.
        frozen: Keys of float tensors that no control trains; see ``zoo.architectures.frozen``.
    """

    objective: Images
    validation: Images
    frozen: tuple[str, ...] = ()

    @property
    def everything(self) -> Images:
        """Both parts, objective first."""
        pairs = zip(self.objective, self.validation, strict=True)
        inputs, targets = (torch.cat(pair) for pair in pairs)
        return inputs, targets

    def __len__(self) -> int:
        """Number of images."""
        return len(self.objective[1]) + len(self.validation[1])

    def rows(self, part: str) -> Tensor:
        """Rows of ``everything`` that belong to ``objective``, ``validation`` or ``everything``."""
        first, second = len(self.objective[1]), len(self.validation[1])
        ends = {
            "objective": (0, first),
            "validation": (first, first + second),
            "everything": (0, first + second),
        }
        return torch.arange(*ends[part])

    def few(self, count: int, *, stratified: bool, seed: int = 0) -> "Budget":
        """A part of the images, drawn anew into three quarters and one of which to choose by.

        Smaller draws of one seed are parts of larger ones.

        Args:
            count: How many; all of them where there are no more.
            stratified: Whether there are as many of every class as of any other, one more or less.
            seed: Seed of the draw.

        Returns:
            The images.
        """
        if count >= len(self):
            return self
        inputs, targets = self.everything
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        order = _by_turns(order, targets) if stratified else order
        drawn, cut = order[:count], count - max(1, count // 4)
        parts = [(inputs[own], targets[own]) for own in (drawn[:cut], drawn[cut:])]
        return replace(self, objective=parts[0], validation=parts[1])


def _by_turns(order: Tensor, targets: Tensor) -> Tensor:
    """Rows in another order: one of every class, one more of every class, and so on."""
    own = targets[order]
    same = own[:, None] == own  # [b, b]
    turn = same.tril(-1).sum(1)  # how many of its class come before
    return order[turn.argsort(stable=True)]
