"""Members in training: what each learns from, and what it does in a round."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metamerge.outer.position import learned
from metamerge.structure import Program
from metamerge.weights import Weights
from zoo.adam import Moments
from zoo.augmentation import Augmentation
from zoo.chunks import Transform
from zoo.training import train_networks

CHECKED = 10  # steps between two looks at how far members have gone
SEEDS = 2**12  # seeds that a round has for itself


@dataclass(frozen=True, eq=False)
class Learners:
    """Segments and everything that training on them needs.

    Attributes:
        program: The architecture.
        inputs: Of the whole task, on the device where members are trained.
        targets: Likewise.
        rows: Rows of the task that each member learns from.
        seeds: Seed of the order in which each meets them, and of its augmentation.
        augmentation: What members see of their images.
        settings: What ``train_networks`` takes beside, ``batch_size`` among it.
    """

    program: Program
    inputs: Tensor
    targets: Tensor
    rows: Sequence[Tensor]
    seeds: Sequence[int]
    augmentation: Augmentation
    settings: Mapping[str, Any]

    def only(self, numbers: Sequence[int]) -> "Learners":
        """Some of them, in the given order."""
        chosen = {name: [getattr(self, name)[i] for i in numbers] for name in ("rows", "seeds")}
        return replace(self, **chosen)

    def together(self, seed: int) -> "Learners":
        """A single one that learns from the union of all segments."""
        return replace(self, rows=[torch.cat(list(self.rows)).unique()], seeds=[seed])


@dataclass(frozen=True)
class Stint:
    """What members do in one round.

    Attributes:
        number: Of the round, from 0.
        epochs: Passes over the own segment, at most.
        lr: Learning rate at the start.
        last_lr: Where it arrives, linearly; not used with ``divergence``, whose end nobody knows.
        divergence: Distance from the start, in norms of the start, beyond which a member stops; 0
            for no such limit.
    """

    number: int
    epochs: float
    lr: float
    last_lr: float
    divergence: float = 0.0


class Worked(NamedTuple):
    """What a round made of ``n`` members: weights ``[n, ...]``, moments, images seen ``[n]``."""

    weights: Weights
    moments: Moments
    images: Tensor


def work(learners: Learners, start: Weights, moments: Moments | None, stint: Stint) -> Worked:
    """Train all members apart for one round.

    Args:
        learners: Their segments.
        start: Where each starts, ``[n, ...]``.
        moments: What their optimisers remember; None to begin anew.
        stint: What they do.

    Returns:
        What became of them.
    """
    moments = moments or Moments.none_yet(start)
    if not learners.rows:  # a process without members
        return Worked(start, moments, torch.zeros(0, dtype=torch.long))
    seeds = [seed + SEEDS * stint.number for seed in learners.seeds]
    if stint.divergence:
        return _work_on_a_leash(replace(learners, seeds=seeds), start, moments, stint)
    trained = train_networks(
        learners.program,
        start,
        learners.inputs,
        learners.targets,
        learners.rows,
        epochs=stint.epochs,
        lr=stint.lr,
        last_lr=stint.last_lr,
        seed=seeds,
        moments=moments,
        transform=_transform(learners.augmentation, seeds),
        **learners.settings,
    )
    return Worked(trained.weights, trained.moments, trained.steps * learners.settings["batch_size"])


def _work_on_a_leash(learners: Learners, start: Weights, moments: Moments, stint: Stint) -> Worked:
    """A few steps at a time, until every member is as far as it may go, or has used its passes."""
    size = learners.settings["batch_size"]
    lengths = torch.tensor([len(own) for own in learners.rows])
    most = (stint.epochs * lengths.double() / size).ceil().long()
    weights = {key: tensor.clone() for key, tensor in start.items()}
    steps, at_work, leg = torch.zeros_like(lengths), torch.arange(len(lengths)), 0
    kept = moments.only(at_work)
    while len(at_work):
        own = learners.only(at_work.tolist())
        seeds = [seed + leg for seed in own.seeds]
        count = (most - steps)[at_work].clamp(max=CHECKED)
        trained = train_networks(
            own.program,
            _chosen(weights, at_work),
            own.inputs,
            own.targets,
            own.rows,
            epochs=(count - 0.5) * size / lengths[at_work],  # rounded up
            lr=stint.lr,
            last_lr=stint.lr,
            seed=seeds,
            moments=kept.only(at_work),
            transform=_transform(own.augmentation, seeds),
            **own.settings,
        )
        pairs = zip((weights, *kept[:2]), (trained.weights, *trained.moments[:2]), strict=True)
        for room, found in pairs:
            for key, tensor in found.items():
                room[key][at_work] = tensor
        kept.steps[at_work] = trained.moments.steps
        steps[at_work] += trained.steps
        gone = distances(trained.weights, _chosen(start, at_work))
        at_work = at_work[(gone <= stint.divergence) & (steps < most)[at_work]]
        leg += 1
    return Worked(weights, kept, steps * size)


def distances(weights: Weights, start: Weights) -> Tensor:
    """How far networks are from where they started, in norms of the start.

    Args:
        weights: ``[n, ...]``.
        start: ``[n, ...]``.

    Returns:
        ``[n]``; running statistics and counters have no say.
    """
    pairs = [(tensor, start[key]) for key, tensor in weights.items() if learned(key, tensor)]
    gone = sum((now - then).flatten(1).square().sum(1) for now, then in pairs)
    return (gone / sum(then.flatten(1).square().sum(1) for _, then in pairs)).sqrt()


def _chosen(weights: Weights, numbers: Tensor) -> Weights:
    return {key: tensor[numbers] for key, tensor in weights.items()}


def _transform(augmentation: Augmentation, seeds: Sequence[int]) -> Transform | None:
    if not augmentation:
        return None
    own = torch.tensor(seeds)

    def transform(
        inputs: Tensor, targets: Tensor, networks: Tensor, step: int | None
    ) -> tuple[Tensor, Tensor]:
        return augmentation.apply(inputs, own[networks], step), targets

    return transform
