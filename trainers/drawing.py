"""What a merger sees in one step: some families, some of their members, some images."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

import torch
from torch import Tensor

from evaluation.gates import noise
from metamerge.mergers import ThresholdObjective
from metamerge.structure import Layout, run
from metamerge.weights import Weights
from trainers.families import Families, thresholds_of

HELD = 2**26  # numbers in the widest maps of the members that gradients are taken of at a time


@dataclass(frozen=True)
class Drawing:
    """How steps are drawn; shares are probabilities.

    Attributes:
        families: Families per step, over all processes.
        groups: Groups that share a step, at most.
        images: Objective images per step, at most.
        noise: Standard deviation of noise on objective images, in units of the inputs' deviation.
        drop: Share of steps in which some members of every family are left out.
        garbage: Share of steps in which one member of every family is noise.
        calibrated: Share of steps in which members are watched on objective images in place of
            learned probes, as they are where a caller has inputs.
        labels: Whether the images' classes are known; if not, the members' soft vote is imitated.
    """

    families: int
    groups: int
    images: int
    noise: float
    drop: float
    garbage: float
    calibrated: float
    labels: bool

    def families_of(self, groups: int) -> int:
        """Families of every group that takes part in a step, where there are so many groups."""
        return max(1, self.families // min(self.groups, groups))


@dataclass(frozen=True)
class Batch:
    """Families of one group in one step.

    Attributes:
        layout: Architecture of the families.
        members: ``[f, m, ...]``.
        answers: What members say of the images, logits ``[f, m, b, c]``.
        inputs: Images, ``[b, ...]``.
        targets: Their classes ``[f, b]``, or probabilities ``[f, b, c]``.
        thresholds: ``[f]``.
        watched: Inputs that take the place of learned probes, or None.
        share: Share that they are of the step's families of their group.
    """

    layout: Layout
    members: Weights
    answers: Tensor
    inputs: Tensor
    targets: Tensor
    thresholds: Tensor
    watched: Tensor | None
    share: float = 1.0

    def __len__(self) -> int:
        return len(self.targets)

    def only(self, rows: Tensor) -> "Batch":
        """Some of the families."""
        members = {key: tensor[rows] for key, tensor in self.members.items()}
        own = {name: getattr(self, name)[rows] for name in ("answers", "targets", "thresholds")}
        share = self.share * len(rows) / len(self)
        return replace(self, members=members, share=share, **own)


def in_parts(batches: Sequence[Batch], probes: int) -> list[list[Batch]]:
    """Share out the families of a step, where all maps of all members do not fit into memory.

    Gradients of the parts add up to that of the step. Every part has families of every group, so
    that all parts have gradients of the same parameters.

    Args:
        batches: Families of the step.
        probes: Number of learned probes that members are watched on.

    Returns:
        Batches of every part.
    """

    def numbers(batch: Batch) -> int:
        inputs = probes if batch.watched is None else len(batch.watched)
        return batch.answers[:, :, 0, 0].numel() * inputs * batch.layout.program.widest

    fewest = min(len(batch) for batch in batches)
    count = min(fewest, ceil(sum(map(numbers, batches)) / HELD))
    if count == 1:
        return [list(batches)]
    device = batches[0].targets.device
    rows = [torch.arange(len(batch), device=device).tensor_split(count) for batch in batches]
    return [
        [batch.only(own) for batch, own in zip(batches, part, strict=True)]
        for part in zip(*rows, strict=True)
    ]


def draw_step(
    step: int,
    seed: int,
    groups: Sequence[Families],
    drawing: Drawing,
    objective: ThresholdObjective,
    share: tuple[int, int] = (0, 1),
) -> list[Batch]:
    """Draw a step; it follows from seed and step alone, so a resumed run repeats it.

    Args:
        step: Number of the step.
        seed: Seed of the training.
        groups: Families of all zoos and sizes.
        drawing: How to draw.
        objective: What thresholds are relative to.
        share: Number of this process, and of all of them: each takes a part of the families.

    Returns:
        A batch for every group that takes part; those that do not are next.
    """
    parts = min(drawing.groups, len(groups))
    own = replace(drawing, families=drawing.families_of(len(groups)))
    turns = range(step * parts, (step + 1) * parts)
    return [draw(one, seed, groups, own, objective, share) for one in turns]


def draw(
    step: int,
    seed: int,
    groups: Sequence[Families],
    drawing: Drawing,
    objective: ThresholdObjective,
    share: tuple[int, int] = (0, 1),
) -> Batch:
    """Draw families of the group whose turn it is.

    Args:
        step: Number of the turn.
        seed: Seed of the training.
        groups: Families of all zoos and sizes, which take turns in random order.
        drawing: How to draw.
        objective: What thresholds are relative to.
        share: Number of this process, and of all of them: each takes a part of the families.

    Returns:
        The batch.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    group = groups[turn(step, seed, len(groups))]
    rows = torch.randperm(len(group), generator=generator)[: drawing.families]
    chosen = torch.randperm(len(group.images[1]), generator=generator)
    device = group.images[0].device
    images = chosen[: drawing.images].to(device)
    jitter = torch.randn(len(images), *group.images[0].shape[1:], generator=generator)
    kept = _kept(len(rows), group.members, drawing.drop, generator)
    spoiled = bool(torch.rand((), generator=generator) < drawing.garbage) and kept.shape[1] > 1
    looked = bool(torch.rand((), generator=generator) < drawing.calibrated)
    rubbish = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
    least = int(torch.randint(64, 513, (), generator=generator))  # the same for all processes

    own = slice(share[0], None, share[1])
    rows, kept = rows[own].to(device), kept[own].to(device)
    members = {key: tensor[rows[:, None], kept] for key, tensor in group.weights.items()}
    answers = group.answers[rows[:, None, None], kept[:, :, None], images].float()
    targets = group.targets(rows, images)
    honest = answers[:, 1:] if spoiled else answers
    thresholds = thresholds_of(honest, targets, objective)
    inputs = _jittered(group.images[0], images, drawing.noise * jitter.to(device))
    if not drawing.labels:
        targets = honest.softmax(-1).mean(1)
        thresholds = thresholds_of(honest, targets.argmax(-1), objective)
    if spoiled:
        members, said = _spoil(members, group.layout, group.images[0][images], rubbish)
        answers = torch.cat([said, answers[:, 1:]], 1)
    watched = None
    if looked:
        watched = group.images[0][chosen[-least:].to(device)]
    return Batch(group.layout, members, answers, inputs, targets, thresholds, watched)


def turn(step: int, seed: int, count: int) -> int:
    """Say whose turn it is: all groups' once, in random order, then all groups' again.

    Args:
        step: Number of the step.
        seed: Seed of the orders.
        count: Number of groups.

    Returns:
        Number of the group.
    """
    order = torch.Generator().manual_seed(seed * 7_368_787 + step // count)
    return int(torch.randperm(count, generator=order)[step % count])


def _kept(families: int, members: int, drop: float, generator: torch.Generator) -> Tensor:
    """Members that stay, ``[f, m']``, in random order; at least two."""
    fewer = bool(torch.rand((), generator=generator) < drop) and members > 2
    count = int(torch.randint(2, members, (), generator=generator)) if fewer else members
    return torch.rand(families, members, generator=generator).argsort(-1)[:, :count]


def _jittered(inputs: Tensor, chosen: Tensor, jitter: Tensor) -> Tensor:
    """Images with noise on them, in the range that all of them have."""
    low, high = inputs.amin(), inputs.amax()
    return (inputs[chosen] + jitter * inputs.std()).clamp(low, high)


def _spoil(
    members: Weights, layout: Layout, inputs: Tensor, generator: torch.Generator
) -> tuple[Weights, Tensor]:
    """Make the first member of every family noise; what these say, ``[f, 1, b, c]``."""
    first = {key: tensor[:, :1] for key, tensor in members.items()}
    garbage = noise(first, generator)
    spoiled = {key: torch.cat([garbage[key], tensor[:, 1:]], 1) for key, tensor in members.items()}
    with torch.no_grad():
        alone = {key: tensor[:, 0] for key, tensor in garbage.items()}
        said = run(layout.program, alone, [inputs], stacked=True)
    return spoiled, said[:, None]
