"""The bench: one number of members, everything that is made of them, scored on test images."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import Tensor

from evaluation.budgets import Budget
from evaluation.by_heart import best_network, mean_network
from evaluation.controls import best_members
from evaluation.judged import Judged
from evaluation.merging import NOTHING, Given, Merging
from evaluation.methods.entries import Entry
from evaluation.metrics import accuracy, family_logits
from evaluation.scored import Scored
from metamerge.weights import Weights
from zoo.training import predict
from zoo.variants import renamed


class Bench:
    """What rows share: aligned members, budgets, and the way to score.

    Merges get members as they are, with the numbers that their family gives to classes. Whatever
    comes out, and what controls work on, has the task's numbers.

    Args:
        judged: The families.
        seed: Seed of everything random.
        first: Number of the first family, where they are some of many.
    """

    def __init__(self, judged: Judged, seed: int, first: int = 0) -> None:
        self.judged, self.seed, self.layout = judged, seed, judged.layout
        self.first = first
        self.members, self.count = judged.members, len(judged)
        self.budget = judged.budget
        self.families = self.in_task(judged.families)
        told = {"bases": judged.bases, "seed": seed, "name": judged.name}
        self.merging = Merging(judged.layout, judged.families, **told)
        self._best: dict[int, tuple[Budget, Weights]] = {}

    def in_task(self, weights: Weights) -> Weights:
        """Networks ``[f, ...]`` or members ``[f, m, ...]`` with the task's numbers of classes."""
        classes = self.judged.classes
        return weights if classes is None else renamed(weights, self.layout, classes)

    # ------------------------------------------------------------------------------- merging

    def given(self, budget: Budget, *, labelled: bool) -> Given:
        """The images of a budget as merges get them, with the classes that families call them.

        Args:
            budget: The images.
            labelled: Whether labels are among it.

        Returns:
            Inputs, or inputs and labels.
        """
        inputs, targets = budget.everything
        if not labelled:
            return Given(inputs)
        classes = self.judged.classes
        return Given(inputs, targets if classes is None else classes[:, targets])

    def merge(self, entry: Entry, given: Given = NOTHING, merger: Any = None) -> Weights:
        """Merge every family through the public interface.

        Args:
            entry: How.
            given: Images that it may use.
            merger: A trained merger, for learned methods.

        Returns:
            Fused networks ``[f, ...]`` with the task's numbers of classes.
        """
        return self.in_task(self.merging.merged(entry, given, merger=merger))

    # ------------------------------------------------------------------------------- scoring

    def merged(
        self, name: str, data: str, entry: Entry, given: Given = NOTHING, merger: Any = None
    ) -> Scored:
        """Merge and score; seconds count the alignment in full, whichever row it was made for.

        Args:
            name: Of the row.
            data: What it is given at merge time, as tables say it.
            entry: How.
            given: Images that it may use.
            merger: A trained merger, for learned methods.

        Returns:
            The row.
        """
        aligning = self.merging.seconds_aligning(entry, given)
        row = self.timed(name, data, lambda: self.merge(entry, given, merger), control=False)
        return replace(row, seconds=row.seconds + aligning)

    def timed(self, name: str, data: str, make: Callable[[], Weights], *, control: bool) -> Scored:
        """Make networks with the task's numbers of classes and score them on test images.

        Args:
            name: Of the row.
            data: What they are given.
            make: Makes the networks, ``[f, ...]``.
            control: Whether it is a control.

        Returns:
            The row.
        """
        clock = time.perf_counter()
        weights = make()
        seconds = (time.perf_counter() - clock) / self.count
        inputs, targets = self.judged.split.images("test")
        found = accuracy(predict(self.layout.program, weights, inputs), targets)
        parameters = self.judged.parameters
        return Scored(name, self.members, data, found, seconds, parameters, control)

    def voted(self, name: str, vote: Callable[[Tensor], Tensor], *, networks: int) -> Scored:
        """Score what members say together on test images, or alone.

        Args:
            name: Of the row.
            vote: Logits ``[f, m, b, c]`` -> classes ``[f, ..., b]``.
            networks: Networks that have to be kept for it.

        Returns:
            The row; seconds are those of all members and the vote.
        """
        logits, running = self._said
        clock = time.perf_counter()
        classes = vote(logits)
        seconds = running + (time.perf_counter() - clock) / self.count
        right = (classes == self.judged.split.images("test")[1]).float().flatten(1).mean(1)
        parameters = networks * self.judged.parameters
        return Scored(name, self.members, "none", right, seconds, parameters, True)

    @cached_property
    def _said(self) -> tuple[Tensor, float]:
        """Logits of all members on test images, and the seconds that they took, per family."""
        clock = time.perf_counter()
        inputs = self.judged.split.images("test")[0]
        logits = family_logits(self.layout.program, self.families, inputs)
        return logits, (time.perf_counter() - clock) / self.count

    def best(self, budget: Budget) -> Weights:
        """Members that score best on a budget, found once for each."""
        if id(budget) not in self._best:
            chosen = best_members(self.families, self.layout, budget)
            self._best[id(budget)] = budget, chosen  # kept, so that no other gets its id
        return self._best[id(budget)][1]

    # ------------------------------------------------------------------------------- null mergers

    def null(self, which: str) -> Weights:
        """What a merger could put out that knows the zoo by heart and ignores its members.

        Args:
            which: ``mean`` or ``best``.

        Returns:
            The same network for all families, ``[f, ...]``, with the task's numbers of classes
            where the network's are taken for those of the family.
        """
        members, classes = self.judged.training
        if which == "mean":
            one = mean_network(members, self.layout)
        else:
            one = best_network(members, self.layout, *self.budget.validation, classes)
        same = {key: tensor.expand(self.count, *tensor.shape[1:]) for key, tensor in one.items()}
        return self.in_task(same)
