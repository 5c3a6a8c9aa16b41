"""The settings that all methods are tried on: families of real networks, and the images they get.

Three settings come from zoos that are built on demand; the fourth is a pair of networks that
somebody else trained. A setting has families of members with inits of their own and, but for the
fourth, families of fine-tunes of a common base.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from evaluation.controls import Budget, Images
from metamerge.structure import Layout
from metamerge.weights import Weights, unstack
from zoo.architectures import frozen
from zoo.build import build_with_progress, split_of
from zoo.recipe import ZooOptions, factory_for
from zoo.store import Zoo
from zoo.tasks import Task

IMAGES = 500  # calibration images
ZOOS = {
    "digits": ZooOptions(
        task="digits",
        objective=IMAGES,
        segment_size=300,
        members=(8,),
        train_families=10,
    ),
    "fashion-mlp": ZooOptions(
        task="fashion-mnist",
        objective=IMAGES,
        widths=(256, 256),
        split="disjoint",
        segment_size=5000,
        members=(10,),
        train_families=3,
        epochs=(5.0,),
        lr=(1e-3,),
    ),
    "fashion-cnn": ZooOptions(
        task="fashion-mnist",
        objective=IMAGES,
        architecture="cnn",
        split="disjoint",
        segment_size=4000,
        members=(8,),
        train_families=3,
        epochs=(6.0,),
        lr=(5e-3,),
    ),
}
TITLES = {
    "digits": "digits, MLP 64-32-10, skewed segments of 300 (Dirichlet 0.4)",
    "fashion-mlp": "Fashion-MNIST, MLP 784-256-256-10, segments of 5,000",
    "fashion-cnn": "Fashion-MNIST, CNN 16-32-32, segments of 4,000",
}
SHARED_STEPS = 50  # steps that make the base of a family, on the images of all its segments
QUICK_TEST = 2000  # test images of a quick look


@dataclass(frozen=True, eq=False)
class Draw:
    """Families that may use the same images.

    Attributes:
        families: ``[f, m, ...]``.
        bases: What the members of each family were fine-tuned from, ``[f, ...]``; None if nothing.
        budget: The images that merges and controls may use.
        segments: Rows of the task that each family has learned from; None where nobody knows.
        seed: Seed of everything random.
        shares: Share of every class in what each member learned of its own, ``[f, m, c]``, one
            image of each class added, so that none is 0; None where nobody knows.
    """

    families: Weights
    bases: Weights | None
    budget: Budget
    segments: list[Tensor] | None
    seed: int
    shares: Tensor | None = None

    @property
    def members(self) -> list[list[Weights]]:
        """State dicts, family by family."""
        return [unstack(family) for family in unstack(self.families)]


@dataclass(frozen=True, eq=False)
class Setting:
    """Families of one task and architecture.

    Attributes:
        name: One of ``NAMES``, or that of a reproduction.
        title: For people.
        task: Name of the task, as mergers know it.
        layout: The architecture.
        network: Makes a freshly initialised one.
        starts: ``own`` and ``common`` -> draws of families with inits of their own, or of a base.
        test: Inputs and targets that decide.
        images: Inputs and targets of the whole task, for training on all segments.
        recipe: ``epochs``, ``batch_size`` and ``lr`` of members, for the same.
        identity: What decides the outcome, for telling results apart; JSON can hold it.
        one_family: Whether draws differ in their images and seeds only.
    """

    name: str
    title: str
    task: str
    layout: Layout
    network: Callable[[], nn.Module]
    starts: dict[str, list[Draw]]
    test: Images
    images: Images
    recipe: dict[str, Any]
    identity: dict[str, Any]
    one_family: bool = False

    @property
    def members(self) -> int:
        """Members per family."""
        return next(iter(self.starts["own"][0].families.values())).shape[1]


def zoo_setting(
    name: str, *, folder: Path, families: int, data: str | None, quick: bool, console: Console
) -> Setting:
    """A setting whose families are trained here, or were.

    Args:
        name: Key of ``ZOOS``.
        folder: Where zoos lie.
        families: Number of families; 0 for the usual one.
        data: Folder with the task's files, where it needs some.
        quick: Whether to take fewer and smaller families and fewer test images.
        console: Where to print.

    Returns:
        The setting.
    """
    own = replace(ZOOS[name], validation_families=0, test_families=0, data=data)
    if quick:
        small = own.segment_size if name == "digits" else 1000
        own = replace(own, segment_size=small, members=(min(4, *own.members),), train_families=2)
    if families:
        own = replace(own, train_families=families)
    common = replace(own, init="shared", shared_steps=SHARED_STEPS, snapshots=1)
    zoos = {
        start: build_with_progress(
            replace(options, out=str(folder / f"{name}-{start}-{options.digest[:8]}")), console
        )
        for start, options in (("own", own), ("common", common))
    }
    split = split_of(zoos["own"])
    inputs, targets = split.images("test")
    test = (inputs[:QUICK_TEST], targets[:QUICK_TEST]) if quick else (inputs, targets)
    network = factory_for(own, split.task)
    budget = Budget(split.images("objective"), split.images("validation"), tuple(frozen(network())))
    return Setting(
        name=name,
        title=TITLES[name],
        task=own.task,
        layout=zoos["own"].layout,
        network=network,
        starts={start: [_draw(zoo, budget, split.task, own.seed)] for start, zoo in zoos.items()},
        test=test,
        images=(split.task.inputs, split.task.targets),
        recipe={"epochs": own.epochs[0], "batch_size": own.batch_size, "lr": own.lr[0]},
        identity={"zoos": [zoo.digest for zoo in zoos.values()], "test": len(test[1])},
    )


def _draw(zoo: Zoo, budget: Budget, task: Task, seed: int) -> Draw:
    size = zoo.sizes[0]
    families, rows = zoo.families("train", size), zoo.rows("train", size)
    on_the_way = zoo.snapshots("train", size)  # [f, m, s, ...], the first from before they parted
    bases = {key: t[:, 0, 0] for key, t in on_the_way.items()} or None
    segments = [own[own >= 0].unique().long() for own in rows]
    return Draw(families, bases, budget, segments, seed, _shares(rows, task))


def _shares(rows: Tensor, task: Task) -> Tensor:
    """Share of every class among the rows of each member, ``[f, m, rows]`` -> ``[f, m, c]``."""
    targets = task.targets[rows.clamp_min(0)]
    counts = (F.one_hot(targets, task.classes) * (rows >= 0)[..., None]).sum(2) + 1.0
    return counts / counts.sum(-1, keepdim=True)


def drawn_budget(images: Images, rows: Tensor, seed: int) -> Budget:
    """Draw calibration images, a quarter of them for choosing.

    Args:
        images: Inputs and targets of a whole task.
        rows: Rows to draw from.
        seed: Seed of the draw.

    Returns:
        The images, ``IMAGES`` in all.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = rows[torch.randperm(len(rows), generator=generator)[:IMAGES]]
    cut = len(drawn) * 3 // 4
    return Budget(*((images[0][own], images[1][own]) for own in (drawn[:cut], drawn[cut:])))


def official_rows(task: Task) -> tuple[Tensor, Tensor]:
    """Rows of a task that its publishers set aside for training, and for testing."""
    test = torch.tensor(task.test_rows)
    rows = torch.arange(len(task.targets))
    return rows[~torch.isin(rows, test)], test
