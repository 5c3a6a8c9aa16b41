"""Whose metrics are wanted: families of a zoo, or checkpoints, and on which images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metamerge.errors import ConfigError
from metamerge.network import Given, find_network
from metamerge.sources import read_members
from metamerge.structure import Layout
from metamerge.weights import Weights, stack, widened
from zoo import architectures
from zoo.build import split_of
from zoo.parts import TaskSplit
from zoo.store import Zoo
from zoo.variants import Variants, renamed


@dataclass(frozen=True, eq=False)
class Group:
    """Families that are scored on the same images.

    Attributes:
        names: Of the families.
        members: Their members, ``[f, m, ...]``.
        member_names: Names of the members, the same in every family.
        layout: Their architecture.
        images: Inputs ``[b, ...]`` and targets: classes ``[b]``, or numbers ``[b, o]``.
        calibration: Other inputs, ``[r, ...]``, on which units are watched.
        counts: Images of every class that members learned from, ``[f, m, c]``; None where nobody
            knows, or where there are no classes.
        segments: Which of the images members learned from, of a group of one family; empty where
            they learned from none of them.
    """

    names: Sequence[str]
    members: Weights
    member_names: Sequence[str]
    layout: Layout
    images: tuple[Tensor, Tensor]
    calibration: Tensor
    counts: Tensor | None = None
    segments: Sequence[Tensor] = ()

    def part(self, at: slice) -> "Group":
        """Some of the families."""
        return replace(
            self,
            names=self.names[at],
            members={key: tensor[at] for key, tensor in self.members.items()},
            counts=None if self.counts is None else self.counts[at],
        )


def zoo_groups(
    zoo: Zoo, part: str, members: int, name: str, *, most: int = 0, calibration: int = 256
) -> Iterator[Group]:
    """Families of a zoo, by the images that they see.

    Families that see the same images and know all classes come as one group, in the task's numbers
    of classes; others one by one, in their own, and so do all on the images they learned from.

    Args:
        zoo: The zoo.
        part: Part of the families: ``train``, ``validation`` or ``test``.
        members: Members per family.
        name: Part of the images, one of ``zoo.parts.PARTS``.
        most: Families at most; 0 for all.
        calibration: Objective images on which units are watched, at most.

    Yields:
        The groups.

    Raises:
        ZooError: If the images may not be looked at, or nobody knows which they are.
    """
    split, layout = split_of(zoo), zoo.layout
    families = {k: t[: most or len(t)] for k, t in zoo.families(part, members).items()}
    count = len(next(iter(families.values())))
    variants = Variants.from_records(zoo.records(part, members))
    rows = zoo.rows(part, members)[:count]
    names = [zoo.address(part, members, family) for family in range(count)]
    numbers = [str(member) for member in range(members)]
    classes = variants.classes
    whole = variants.places is None and (classes is None or bool((classes >= 0).all()))
    if whole and classes is not None:
        families = renamed(families, layout, classes[:count])
    if whole and name != "segments":
        watched = split.images("objective")[0][:calibration]
        counts = None if split.task.regression else _counts(split, rows)
        yield Group(
            names, families, numbers, layout, split.images(name), watched, counts
        )  # fmt: skip
        return
    for family in range(count):
        own = {key: tensor[family : family + 1] for key, tensor in families.items()}
        if whole:
            images, watched = split.images(name), split.images("objective")[0]
        else:
            images = variants.images(split, name, family)
            watched = variants.images(split, "objective", family)[0]
        segments = _places(split, rows[family], variants, family) if name == "segments" else ()
        yield Group(
            names[family : family + 1], own, numbers, layout, images, watched[:calibration],
            segments=segments,
        )  # fmt: skip


def checkpoint_group(
    checkpoints: Sequence[str],
    split: TaskSplit,
    name: str,
    *,
    architecture: str | None = None,
    widths: tuple[int, ...] | None = None,
    calibration: int = 256,
) -> Group:
    """Checkpoints as one family.

    Args:
        checkpoints: Whatever ``merge`` takes: files, folders, addresses of zoo members.
        split: The task that they learned, cut into parts.
        name: Part of the images, one of ``zoo.parts.PARTS``.
        architecture: Of checkpoints that do not carry it; see ``zoo.architectures.build``.
        widths: Of the architecture.
        calibration: Objective images on which units are watched, at most.

    Returns:
        The group.

    Raises:
        ConfigError: If their network is not known, or is not one for the task.
        CheckpointError: If one cannot be read.
    """
    shape = tuple(split.task.inputs.shape[1:])
    model = None
    if architecture is not None:
        model = architectures.build(architecture, shape, split.task.outputs, widths=widths)
    sources, found, named = read_members(list(checkpoints))
    layout, named = find_network(
        Given(found, sources, model, (torch.zeros(2, *shape), None)), named
    )
    outputs = layout.program.shapes[layout.program.output][-1]
    if outputs != split.task.outputs:
        raise ConfigError(
            f"task: {split.task.name!r} has {split.task.outputs} "
            f"{'numbers to predict' if split.task.regression else 'classes'}, the checkpoints put "
            f"out {outputs}. Name the task that they learned."
        )
    members = stack(widened([weights for _, weights in named]))
    return Group(
        [f"{len(named)} checkpoints"],
        {key: tensor[None] for key, tensor in members.items()},
        [one for one, _ in named],
        layout,
        split.images(name),
        split.images("objective")[0][:calibration],
    )


def _counts(split: TaskSplit, rows: Tensor) -> Tensor:
    """Rows ``[f, m, longest]``, padded with -1 -> how many of every class, ``[f, m, c]``."""
    classes = split.task.targets[rows.clamp_min(0).long()].where(rows >= 0, split.task.classes)
    return torch.nn.functional.one_hot(classes, split.task.classes + 1)[..., :-1].sum(-2)


def _places(split: TaskSplit, rows: Tensor, variants: Variants, family: int) -> list[Tensor]:
    """Where each member's rows stand among the images that the family sees of the segments."""
    known = variants.known(family, split.rows("segments"), split.task.targets)
    return [torch.isin(known, own[own >= 0]).nonzero().flatten() for own in rows.long()]
