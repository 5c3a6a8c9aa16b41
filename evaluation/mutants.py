"""Mutants of one family beside everything else that the same images make of it.

A mutant starts as the family's mean-logit ensemble. From there it is trained on, pruned to the
width of one member after that training, on the way or before it, or joined at the last layer only;
and what was trained apart at half width is fused to full width. All of it uses the same labelled
images, learning rates are chosen on a part of them, and test images choose nothing.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from evaluation import controls
from evaluation.bench import Bench
from evaluation.budgets import Budget
from evaluation.competitors import SCRATCH_SEED
from evaluation.methods.entries import AVERAGE, USUAL, Entry
from evaluation.metrics import accuracy, family_logits
from evaluation.scored import Scored
from metamerge.ensembles.fusing import Mutant, fused
from metamerge.ensembles.pruning import CRITERIA, Saliency, pruned
from metamerge.structure import OUTPUTS, Layout, discover_program
from metamerge.weights import Weights, stack, unstack
from zoo.architectures import program_of
from zoo.training import cross_entropy, init_networks, predict, train_networks


@dataclass(frozen=True)
class Joined:
    """Members that add up in the last layer and are kept apart before it.

    Attributes:
        weights: Members ``[k, ...]``.
        layout: Their architecture.
    """

    weights: Weights
    layout: Layout

    def answers(self, inputs: Tensor) -> Tensor:
        """Mean of the members' logits, ``[b, c]``."""
        return predict(self.layout.program, self.weights, inputs).mean(0)


Made = Mutant | Joined
Make = Callable[[str, float], Made]
"""A part of the budget and a learning rate -> a network trained with both."""

BATCH = 32  # images per step
SPREAD = 2**40  # between the seeds of two families' fresh networks


@dataclass(frozen=True)
class Schedule:
    """How long everything is trained.

    Attributes:
        epochs: Passes over the images at the width of one member.
        wide_epochs: Passes of networks that hold all members.
        scratch_epochs: Passes of a fresh network of the mutant's width; 0 leaves it out.
        rounds: Steps in which a mutant that is pruned on the way gets narrow.
        rates: Learning rates to choose from.
    """

    epochs: float
    wide_epochs: float
    scratch_epochs: float
    rounds: int
    rates: tuple[float, ...]


class Case:
    """One family, the images it may use, and what was made of both.

    Args:
        bench: The family alone.
        budget: Labelled images.
        data: How rows that use them are marked.
        schedule: How long to train.
        network: Given a factor, makes a fresh network of so many times a member's width.
        seed: Seed of everything random.
    """

    def __init__(
        self,
        bench: Bench,
        budget: Budget,
        data: str,
        schedule: Schedule,
        network: Callable[[float], nn.Module],
        seed: int,
    ) -> None:
        self.bench, self.budget, self.data, self.schedule = bench, budget, data, schedule
        self.layout, self.network, self.seed = bench.layout, network, seed
        self.members = unstack({key: t[0] for key, t in bench.families.items()})
        self.widths = dict(self.layout.spec.groups)  # of one member
        self._kept: dict[tuple[Any, ...], tuple[Mutant, float]] = {}
        self._borrowed = 0.0  # seconds of trainings that a row shares with one before it

    @cached_property
    def start(self) -> Mutant:
        """All members as one network."""
        return fused(self.members, self.layout)

    @cached_property
    def gap(self) -> float:
        """Largest difference between its logits and the mean of the members', on the images."""
        inputs = self.budget.everything[0]
        each = family_logits(self.layout.program, self.bench.families, inputs)[0]
        return float((self.start.answers(inputs) - each.mean(0)).abs().max())

    # ------------------------------------------------------------------------------- training

    def train(
        self, mutant: Mutant, part: str, rate: float, epochs: float, still: Collection[str] = ()
    ) -> Mutant:
        """Train a network on a part of the images.

        Args:
            mutant: The network.
            part: ``objective`` or ``everything``.
            rate: Learning rate at the start; it falls to 0.
            epochs: Passes.
            still: Keys that are not trained, beside buffers.

        Returns:
            The trained network.
        """
        trained = train_networks(
            mutant.layout.program,
            stack([mutant.weights]),
            *self.budget.everything,
            [self.budget.rows(part)],
            epochs=epochs,
            batch_size=BATCH,
            lr=rate,
            seed=self.seed,
            frozen=(*self.budget.frozen, *still),
        ).weights
        return Mutant(unstack(trained)[0], mutant.layout)

    def chosen(self, make: Make) -> Made:
        """Make it with the learning rate that serves the validation images best, on all images."""
        rates = self.schedule.rates
        best = rates[0] if len(rates) == 1 else max(rates, key=partial(self._validated, make))
        return make("everything", best)

    def _validated(self, make: Make, rate: float) -> float:
        inputs, targets = self.budget.validation
        return float(accuracy(make("objective", rate).answers(inputs), targets))

    def _once(self, key: tuple[Any, ...], make: Callable[[], Mutant]) -> Mutant:
        """What several rows go on from is trained once, and its seconds count for each."""
        if key in self._kept:
            mutant, seconds = self._kept[key]
            self._borrowed += seconds
            return mutant
        clock = time.perf_counter()
        mutant = make()
        self._kept[key] = mutant, time.perf_counter() - clock
        return mutant

    def trained_on(self, part: str, rate: float) -> Mutant:
        """The mutant after its training at full width."""
        make = partial(self.train, self.start, part, rate, self.schedule.wide_epochs)
        return self._once(("wide", part, rate), make)

    # ------------------------------------------------------------------------------- pruning

    def cut(self, mutant: Mutant, part: str, criterion: str, times: float = 1.0) -> Mutant:
        """Prune to a multiple of one member's width.

        Args:
            mutant: The network.
            part: Images that its units are judged on.
            criterion: One of ``CRITERIA``, or ``random``.
            times: The multiple.

        Returns:
            The narrower network.
        """
        inputs, targets = (t[self.budget.rows(part)] for t in self.budget.everything)
        if criterion == "random":
            saliency = self._random(mutant)
        else:
            saliency = CRITERIA[criterion](mutant.weights, mutant.layout, inputs, targets)
        widths = {group: max(1, round(times * n)) for group, n in self.widths.items()}
        return pruned(mutant, widths, saliency)

    def _random(self, mutant: Mutant) -> Saliency:
        generator = torch.Generator().manual_seed(self.seed)
        return {g: torch.rand(n, generator=generator) for g, n in mutant.layout.spec.groups.items()}

    def at_once(self, criterion: str, part: str, rate: float) -> Mutant:
        """Pruned before any training, then trained."""
        return self.train(self.cut(self.start, part, criterion), part, rate, self.schedule.epochs)

    def on_the_way(self, part: str, rate: float) -> Mutant:
        """Pruned in rounds, each by the same factor, with training after every one."""
        mutant, rounds = self.start, self.schedule.rounds
        for left in reversed(range(rounds)):
            times = self.bench.members ** (left / rounds)
            mutant = self.cut(mutant, part, "taylor", times)
            wide = self.schedule.wide_epochs / max(1, rounds - 1)
            mutant = self.train(mutant, part, rate, wide if left else self.schedule.epochs)
        return mutant

    def afterwards(self, part: str, rate: float) -> Mutant:
        """Trained at full width, pruned, and trained again."""
        mutant = self.cut(self.trained_on(part, rate), part, "taylor")
        return self.train(mutant, part, rate, self.schedule.epochs)

    # ------------------------------------------------------------------------------- last layer

    def joined(self, frozen: bool, part: str, rate: float) -> Joined:
        """Members that share nothing but their last layer, which adds up what each contributes.

        Args:
            frozen: Whether all but the last layer stays as it is.
            part: Images that they are trained on.
            rate: Learning rate.

        Returns:
            The members.
        """
        last = {k for one in self.layout.producers(OUTPUTS) for k in (one.weight, one.bias) if k}
        floats = {k for k, t in self.members[0].items() if t.is_floating_point()}
        count = len(self.members)
        weights = train_networks(
            self.layout.program,
            stack(self.members),
            *self.budget.everything,
            [self.budget.rows(part)] * count,
            epochs=self.schedule.wide_epochs,
            batch_size=BATCH,
            lr=rate,
            seed=[self.seed] * count,  # all see the same images at the same time
            loss=_together,
            frozen=(*self.budget.frozen, *(floats - last if frozen else ())),
            chunk=count,
        ).weights
        return Joined(weights, self.layout)

    # ------------------------------------------------------------------------------- halves

    def halves(self, shared: bool) -> Mutant:
        """Two networks of half the width, trained apart on segments, fused to full width.

        Args:
            shared: Whether both see all of the family's rows; otherwise each sees a half of them.

        Returns:
            A network with a member's widths.
        """
        return self._once(("halves", shared), partial(self._halves, shared))

    def _halves(self, shared: bool) -> Mutant:
        half, rows = partial(self.network, 0.5), self.bench.judged.segments[0]
        layout, task = self._layout(half()), self.bench.judged.split.task
        mixed = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed))
        trained = train_networks(
            layout.program,
            init_networks(half, [self.fresh, self.fresh + 1]),
            task.inputs,
            task.targets,
            [rows, rows] if shared else [rows[own] for own in mixed.chunk(2)],
            seed=self.seed,
            frozen=self.budget.frozen,
            **self.bench.judged.recipe,
        ).weights
        return fused(unstack(trained), layout)

    @property
    def fresh(self) -> int:
        """Seed of a fresh network that no other family has."""
        return SCRATCH_SEED + SPREAD * self.bench.first

    # ------------------------------------------------------------------------------- rivals

    def from_scratch(self, part: str, rate: float) -> Mutant:
        """A fresh network of the mutant's width."""
        wide = partial(self.network, self.bench.members)
        weights = unstack(init_networks(wide, [self.fresh]))[0]
        return self.train(
            Mutant(weights, self._layout(wide())), part, rate, self.schedule.scratch_epochs
        )

    def _layout(self, network: nn.Module) -> Layout:
        program = program_of(network, self.bench.judged.split.task.inputs.shape[1:])
        return Layout(program, discover_program(program))

    def as_long(self) -> Mutant:
        """The best member, fine-tuned with as many multiplications as the mutant's training."""
        best = Mutant(unstack(self.bench.best(self.budget))[0], self.layout)
        wide, narrow = (operations(m.layout) for m in (self.start, best))
        epochs = self.schedule.wide_epochs * wide / narrow
        short = lambda part, rate: self.train(best, part, rate, self.schedule.epochs)  # noqa: E731
        rate = max(self.schedule.rates, key=partial(self._validated, short))
        return self.train(best, "everything", rate, epochs)

    def merged_and_tuned(self) -> Weights:
        """What merging makes of the family, fine-tuned on the same images."""
        entry = Entry(AVERAGE, (USUAL,), ("refit",))
        start = self.bench.merge(entry, self.bench.given(self.budget, labelled=False))
        return controls.fine_tuned(start, self.layout, self.budget)[0]

    # ------------------------------------------------------------------------------- scoring

    def scored(self, name: str, data: str, make: Callable[[], Made], *, control: bool) -> Scored:
        """Make a network and score it on test images.

        Args:
            name: Of the row.
            data: What it is given.
            make: Makes the network.
            control: Whether it is a control.

        Returns:
            The row; seconds include those of trainings that rows share.
        """
        clock, self._borrowed = time.perf_counter(), 0.0
        with self.bench.judged.split.training():  # test images are for the score alone
            made = make()
        seconds = time.perf_counter() - clock + self._borrowed
        inputs, targets = self.bench.judged.split.images("test")
        found = accuracy(made.answers(inputs), targets)[None]
        sizes = (t.numel() for t in made.weights.values() if t.is_floating_point())
        return Scored(name, self.bench.members, data, found, seconds, sum(sizes), control)


def operations(layout: Layout) -> int:
    """Multiplications that a network's layers make for one input."""
    return sum(
        prod(layout.program.shape(node.refs[1]))
        * prod(_places(layout.program.shape(node.name), layout.by_node[node.name].linear))
        for node in layout.program.nodes
        if node.name in layout.by_node
    )


def _places(shape: Sequence[int], linear: bool) -> Sequence[int]:
    """Sizes of the axes that a layer is repeated along, without the batch."""
    return shape[1:-1] if linear else shape[2:]


def _together(logits: Tensor, targets: Tensor) -> Tensor:
    """Loss of the mean of all networks' logits, dealt out equally, ``[k, b, c]`` -> ``[k]``."""
    whole = cross_entropy(logits.mean(0, keepdim=True), targets[:1])
    return whole.expand(len(logits)) / len(logits)
