"""Merging families in many ways: any method, any alignments, any corrections, through merge()."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from evaluation.methods.entries import Entry
from metamerge.alignment.aligning import align_members
from metamerge.api import merge
from metamerge.checkpoints import Checkpoint
from metamerge.registry import get_alignment, get_method
from metamerge.structure import Layout
from metamerge.weights import Weights, stack, unstack

KEPT = 512  # aligned families that are kept for other rows

Aligned = tuple[list[Weights], float]
"""Members of one family, and the seconds that it took to align them."""


@dataclass(frozen=True, eq=False)
class Given:
    """The images that merges get.

    Attributes:
        inputs: ``[b, ...]``; None for nothing but weights.
        labels: Their classes ``[b]``, or ``[f, b]`` where families number classes by themselves;
            None where nobody tells.
    """

    inputs: Tensor | None = None
    labels: Tensor | None = None

    def of(self, family: int) -> Tensor | tuple[Tensor, Tensor] | None:
        """What ``merge`` takes as ``batches`` for one family."""
        if self.inputs is None or self.labels is None:
            return self.inputs
        return self.inputs, self.labels if self.labels.ndim == 1 else self.labels[family]


NOTHING = Given()


class Merging:
    """Families that are merged; what was aligned for one row is not aligned again for another.

    Args:
        layout: Their architecture.
        families: Members as they were trained, ``[f, m, ...]``.
        bases: What the members of each family were fine-tuned from, ``[f, ...]``; None if nothing.
        seed: Seed of the first family's merge; each of the others has the next one.
        name: What reports call the families.
    """

    def __init__(
        self,
        layout: Layout,
        families: Weights,
        *,
        bases: Weights | None = None,
        seed: int = 0,
        name: str = "family",
    ) -> None:
        self.layout, self.families, self.bases = layout, families, bases
        self.seed, self.name = seed, name
        self._aligned: Callable[..., Aligned] = lru_cache(maxsize=KEPT)(self._align)

    @cached_property
    def members(self) -> list[list[Weights]]:
        """State dicts, family by family."""
        return [unstack(family) for family in unstack(self.families)]

    def merged(self, entry: Entry, given: Given = NOTHING, *, merger: Any = None) -> Weights:
        """Merge every family through the public interface.

        Args:
            entry: How.
            given: The images that it may use.
            merger: A trained merger or its folder, for learned methods.

        Returns:
            Fused networks ``[f, ...]``.
        """
        resources = get_method(entry.method).resources
        program = self.layout.program.to_json()
        fused = []
        for index in range(len(self.members)):
            own = [
                Checkpoint(f"{self.name}/{index}/{m}", weights, program)
                for m, weights in enumerate(self.aligned(index, entry.alignments, given)[0])
            ]
            arguments: dict[str, Any] = dict(entry.options)
            if "base" in resources and self.bases is not None:
                arguments["base"] = {key: t[index].clone() for key, t in self.bases.items()}
            if "merger" in resources:
                arguments["merger"] = merger
            made = merge(
                own,
                method=entry.method,
                align=None,
                correct=list(entry.correct) or None,
                batches=given.of(index),
                seed=self.seed + index,
                device="cpu",
                **arguments,
            )
            fused.append(made.weights)
        return stack(fused)

    def aligned(self, index: int, chain: tuple[str, ...], given: Given) -> Aligned:
        """Members of one family in common slots.

        Args:
            index: Which family.
            chain: Names of alignments, in their order; none leaves members as they are.
            given: What alignments may look at.

        Returns:
            One state dict per member, and the seconds that it took when it was done.
        """
        looks = any("batches" in get_alignment(name).resources for name in chain)
        return self._aligned(index, chain, given if looks else NOTHING)

    def seconds_aligning(self, entry: Entry, given: Given = NOTHING) -> float:
        """Seconds per family that the members' alignment took, for whichever row that was."""
        count = len(self.members)
        told = [self.aligned(index, entry.alignments, given)[1] for index in range(count)]
        return sum(told) / count

    def _align(self, index: int, chain: tuple[str, ...], given: Given) -> Aligned:
        if not chain:
            return self.members[index], 0.0
        generator = torch.Generator().manual_seed(self.seed + index)
        at_hand = {"batches": given.of(index), "generator": generator}
        clock = time.perf_counter()
        members, _ = align_members(self.members[index], self.layout, chain, resources=at_hand)
        return members, time.perf_counter() - clock
