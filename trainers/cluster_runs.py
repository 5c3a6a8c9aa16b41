"""Independent runs of one task: own splits, own scaling, own clusters, made side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from metamerge.errors import ConfigError, ZooError
from zoo.clustered import Runs
from zoo.families import cut_segments
from zoo.parts import TaskSplit, split_task
from zoo.recipe import ZooOptions
from zoo.reference import features_for
from zoo.splits import choose_members, coefficients
from zoo.splits import features as row_features
from zoo.tasks import Task

CLUSTERINGS: dict[str, dict[str, str]] = {
    "labels": {"split": "clusters", "by": "labels"},
    "features": {"split": "clusters", "by": "inputs"},
    "important": {"split": "clusters", "by": "important"},
    "errors": {"split": "clusters", "by": "errors"},
    "activations": {"split": "clusters", "by": "activations"},
    "binned": {"split": "bins"},
    "difficulty": {"split": "difficulty"},
    "classes": {"split": "classes"},
    "dirichlet": {"split": "dirichlet"},
    "quantity": {"split": "quantity"},
    "random": {"split": "disjoint"},
}
"""Clustering -> options of the zoo's split that makes it."""

_ORDERED = ("bins", "difficulty")  # splits whose segments come in an order that means something
_KNOWN_EVERYWHERE = ("inputs", "important", "labels")  # what is known of rows outside training
_TUNED_ON = 5  # runs whose training rows choose the number of clusters


@dataclass(frozen=True)
class Shares:
    """How a run divides its rows: parts of all rows, training gets the rest.

    Attributes:
        validation: Rows that choose the epoch and the learning rate.
        test: Rows that nothing is chosen on.
    """

    validation: float = 0.2
    test: float = 0.2


@dataclass(frozen=True, eq=False)
class Prepared:
    """Runs that wait for their training.

    Attributes:
        task: What they learn.
        runs: Their data.
        test: Test rows of each run, ``[r, t]``.
        nearest: Cluster of every test row: that of the nearest training row, ``[r, t]``.
        routed: The same by inputs alone, as somebody has to who does not know the target.
        scale: Units of one standardised target, ``[r, outputs]``; None for classes.
        quality: Number of clusters -> mean coefficients of the runs that it was chosen on.
    """

    task: Task
    runs: Runs
    test: Tensor
    nearest: Tensor
    routed: Tensor
    scale: Tensor | None
    quality: Mapping[int, Mapping[str, float]]

    @property
    def members(self) -> int:
        """Number of clusters."""
        return len(self.runs.clusters[0])


def subsample(task: Task, rows: int, seed: int) -> Task:
    """Draw rows of a large task; official test rows are all kept.

    Args:
        task: The task.
        rows: Rows to keep beside official test rows; 0, or more than there are, keeps all.
        seed: Seed of the draw.

    Returns:
        The smaller task.
    """
    official = task.test_rows or range(0)
    free = torch.tensor([row for row in range(len(task.inputs)) if row not in official])
    if not 0 < rows < len(free):
        return task
    drawn = torch.randperm(len(free), generator=torch.Generator().manual_seed(seed))[:rows]
    kept = torch.cat([free[drawn].sort().values, torch.tensor(official, dtype=torch.int64)])
    return replace(
        task,
        inputs=task.inputs[kept],
        targets=task.targets[kept],
        test_rows=range(rows, len(kept)) if official else None,
        notes=(*task.notes, f"{rows} of {len(free)} rows, drawn at random"),
    )


def prepare(
    task: Task,
    clustering: str,
    *,
    runs: int,
    seed: int,
    members: Sequence[int],
    coefficient: str = "all",
    algorithm: str = "kmeans",
    shares: Shares = Shares(),
) -> Prepared:
    """Split, scale and cluster the rows of every run.

    The number of clusters is the same for all runs; the training rows of the first five choose it.

    Args:
        task: The task.
        clustering: One of ``CLUSTERINGS``.
        runs: Number of runs.
        seed: Seed of the first run; those of the others follow it.
        members: Numbers of clusters to choose from.
        coefficient: What chooses: see ``choose_members``.
        algorithm: Of clusterings that need one.
        shares: How rows are divided.

    Returns:
        The runs.

    Raises:
        ConfigError: If there is no such clustering, or the task does not suit it.
        ZooError: If rows cannot be cut into so many clusters.
    """
    if clustering not in CLUSTERINGS:
        raise ConfigError(f"clusterings: got {clustering!r}, there are {', '.join(CLUSTERINGS)}.")
    splits = [_split(task, seed + run, shares) for run in range(runs)]
    cutters = [
        Cutter(split, _options(task, clustering, algorithm, seed + run))
        for run, split in enumerate(splits)
    ]
    quality = _qualities(cutters[:_TUNED_ON], members)
    chosen = choose_members(quality, by=coefficient)
    cuts = [cutter.cut(chosen) for cutter in cutters]
    scale = None
    if task.regression:
        known = [split.scaling.get("targets.scale", torch.ones(task.outputs)) for split in splits]
        scale = torch.stack(known).float()
    data = Runs(
        torch.stack([split.task.inputs for split in splits]),
        torch.stack([split.task.targets for split in splits]),
        cuts,
        torch.stack([split.validation for split in splits]),
        [seed + run for run in range(runs)],
    )
    owners = [
        torch.stack([_nearest(points, cut, cutter.split.test) for points, cut, cutter in own])
        for own in (
            [(cutter.everywhere, cut, cutter) for cut, cutter in zip(cuts, cutters, strict=True)],
            [(cutter.inputs, cut, cutter) for cut, cutter in zip(cuts, cutters, strict=True)],
        )
    ]
    test = torch.stack([split.test for split in splits])
    return Prepared(task, data, test, *owners, scale, quality)


class Cutter:
    """Cuts the training rows of one run.

    Args:
        split: The run's rows.
        options: Of the zoo's split.
    """

    def __init__(self, split: TaskSplit, options: ZooOptions) -> None:
        self.split, self.options = split, options
        self.given = features_for(options, split)
        self.inputs = row_features.inputs(split.task.inputs)
        targets = split.task.targets
        self.points = self.inputs  # what the clusters are judged by
        if "features" in self.given:
            self.points = self.given["features"]
        elif "scores" in self.given:
            self.points = self.given["scores"].unsqueeze(1)
        elif options.split == "bins":
            self.points = targets
        known = options.split == "bins" or (
            options.split == "clusters" and options.by in _KNOWN_EVERYWHERE
        )
        self.everywhere = self.points if known else self.inputs

    def cut(self, members: int) -> list[Tensor]:
        """Cut the rows; where clusters have no order of their own, smaller targets come first."""
        own = replace(self.options, members=(members,))
        targets = self.split.task.targets
        if own.split == "classes":
            own = replace(own, classes_per_segment=-(-self.split.task.classes // members))
        generator = torch.Generator().manual_seed(own.seed)
        given: dict[str, Any] = {**self.given, "min_rows": 1}
        found = cut_segments(own, self.split, self.split.segments, members, generator, given)
        if own.split in _ORDERED:
            return found
        return sorted(found, key=lambda rows: float(targets[rows].double().mean()))


def _split(task: Task, seed: int, shares: Shares) -> TaskSplit:
    """Rows of one run. No merger is trained here: of its objective rows a tenth stays unused."""
    free = len(task.inputs) - (len(task.test_rows) if task.test_rows else 0)
    test = shares.test if task.test_rows is None else 0.5  # official ones are taken anyhow
    left = free if task.test_rows else free - round(shares.test * free)
    objective = round(shares.validation * free / 0.9) / left
    return split_task(task, seed=seed, objective=objective, validation_share=0.9, test=test)


def _options(task: Task, clustering: str, algorithm: str, seed: int) -> ZooOptions:
    return ZooOptions(
        task=task.name,
        algorithm=algorithm,
        reference_epochs=20.0,
        segment_size=0,
        train_families=1,
        validation_families=0,
        test_families=0,
        seed=seed,
        **CLUSTERINGS[clustering],
    )


def _qualities(cutters: Sequence[Cutter], members: Sequence[int]) -> dict[int, dict[str, float]]:
    """Mean coefficients of every number of clusters that all of these runs can be cut into."""
    found: dict[int, dict[str, float]] = {}
    faults = []
    for count in members:
        try:
            own = [coefficients(cutter.points, cutter.cut(count)) for cutter in cutters]
        except ZooError as error:
            faults.append(str(error))
            continue
        found[count] = {name: sum(c[name] for c in own) / len(own) for name in own[0]}
    if not found:
        raise ZooError(f"No number of clusters out of {tuple(members)} can be had: {faults[0]}")
    return found


def _nearest(points: Tensor, clusters: Sequence[Tensor], rows: Tensor) -> Tensor:
    """Cluster of the training row that is nearest to each of ``rows``, ``[rows]``."""
    known = torch.cat(list(clusters))
    deviation, mean = torch.std_mean(points[known], 0, correction=0)
    scaled = (points - mean) / deviation.where(deviation > 0, 1.0)
    owner = torch.arange(len(clusters)).repeat_interleave(
        torch.tensor([len(own) for own in clusters])
    )
    return owner[torch.cdist(scaled[rows], scaled[known]).argmin(1)]
