"""The one split of a task into parts that never meet.

A zoo is honest only if three sets of images stay apart: those that members are trained on
(``segments``), those that a merger is trained on (``objective``, of which ``validation`` is held
back for stopping and choosing), and those that decide at the end (``test``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import combinations

import torch
from torch import Tensor

from metamerge.errors import ConfigError, ZooError
from zoo.tasks import Task, suggest

PARTS = ("segments", "objective", "validation", "test")


@dataclass(frozen=True, eq=False)
class TaskSplit:
    """Four sets of rows of one task, pairwise disjoint, each with every class there is.

    Inside ``with split.training():`` the test images are refused. The guard lives on this object
    and holds for every thread; whoever indexes ``task.inputs`` with own rows walks around it.

    Attributes:
        task: The task that the rows belong to.
        segments: Rows that members may be trained on, int64 ``[rows]``; see ``zoo.splits``.
        objective: Rows that a merger is trained on.
        validation: The objective rows that are held back for stopping and choosing.
        test: Rows for the final score.
        scaling: How the task was standardised, if it was: ``mean`` and ``scale`` of ``inputs`` and,
            in a regression, of ``targets``; new inputs want the same before a network reads them.
    """

    task: Task
    segments: Tensor = field(repr=False)
    objective: Tensor = field(repr=False)
    validation: Tensor = field(repr=False)
    test: Tensor = field(repr=False)
    scaling: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    _trainings: list[None] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse parts that are empty, overlap, miss a class or move official test rows.

        Raises:
            ZooError: If the four parts are not an honest split of the task.
        """
        parts = {part: getattr(self, part) for part in PARTS}
        for part, rows in parts.items():
            _check_part(self.task, part, rows)
        for (one, rows), (other, others) in combinations(parts.items(), 2):
            shared = int(torch.isin(rows, others).sum())
            if shared:
                raise ZooError(
                    f"TaskSplit of {self.task.name!r}: {one!r} and {other!r} share {shared} rows. "
                    "A row may be in one part only; split_task() cuts parts that never meet."
                )

    def rows(self, part: str) -> Tensor:
        """Return the row numbers of one part.

        Args:
            part: One of ``PARTS``.

        Returns:
            Row numbers in the task, int64 ``[rows]``.

        Raises:
            ConfigError: If there is no such part.
        """
        if part not in PARTS:
            raise ConfigError(f"TaskSplit: no part {part!r}{suggest(part, PARTS)}")
        return getattr(self, part)

    def images(self, part: str) -> tuple[Tensor, Tensor]:
        """Return the images of one part and their classes.

        Args:
            part: One of ``PARTS``.

        Returns:
            New tensors: inputs ``[rows, ...]`` and targets ``[rows]``, or ``[rows, outputs]``.

        Raises:
            ConfigError: If there is no such part.
            ZooError: If test images are asked for inside ``training()``.
        """
        rows = self.rows(part)
        if part == "test" and self._trainings:
            raise ZooError(
                "TaskSplit.images('test') was called inside `with split.training():`. Stop and "
                "choose on 'validation'; ask for the test images after the block."
            )
        return self.task.inputs[rows], self.task.targets[rows]

    @contextmanager
    def training(self) -> Iterator[None]:
        """Refuse test images for as long as the block lasts; blocks may be nested."""
        self._trainings.append(None)
        try:
            yield
        finally:
            self._trainings.pop()


def split_task(
    task: Task,
    *,
    seed: int = 0,
    objective: float | int = 0.25,
    validation_share: float | int = 0.25,
    test: float | int = 0.25,
) -> TaskSplit:
    """Cut a task into segments, objective, validation and test rows, stratified by class.

    Every part has the class frequencies of the task to within one row; of a regression, the
    frequencies of the ten deciles of its first output. A task that asks for it is standardised by
    mean and standard deviation of the segments, so no other row has a say in them. A float is a
    fraction, an int a number of rows.

    Args:
        task: What is cut.
        seed: Same seed, same split.
        objective: Images for training mergers, validation included: of all rows but test.
        validation_share: Part of those objective images that is held back.
        test: Images for the final score, of all rows. A task with official test rows keeps
            exactly those, whatever is asked here.

    Returns:
        The split; rows are ascending within every part.

    Raises:
        ConfigError: If an amount is no fraction in (0, 1) and no number of rows that leaves some.
        ZooError: If a part would miss a class.
    """
    generator = torch.Generator().manual_seed(seed)
    strata = _strata(task)
    everything = torch.arange(len(task.targets))
    if task.test_rows is None:
        test_part, free = _draw(strata, everything, test, "test", generator)
    else:
        official = torch.zeros(len(everything), dtype=torch.bool)
        official[task.test_rows.start : task.test_rows.stop] = True
        test_part, free = everything[official], everything[~official]
    held_back, segments = _draw(strata, free, objective, "objective", generator)
    validation, objective_part = _draw(
        strata, held_back, validation_share, "validation_share", generator
    )
    parts = (segments, objective_part, validation, test_part)
    if not task.standardise:
        return TaskSplit(task, *parts)
    scaled, scaling = _standardised(task, segments)
    return TaskSplit(scaled, *parts, scaling)


def _strata(task: Task) -> Tensor:
    """Class of every row; of a regression, the decile of its first output. ``[rows]``."""
    if not task.regression:
        return task.targets
    first = task.targets[:, 0].double()
    deciles = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    return torch.bucketize(first, first.quantile(deciles))


def _standardised(task: Task, rows: Tensor) -> tuple[Task, dict[str, Tensor]]:
    """The task with inputs, and numbers to predict, of mean 0 and deviation 1 on ``rows``."""
    changed, scaling = {}, {}
    for name in ("inputs", "targets") if task.regression else ("inputs",):
        values = getattr(task, name)
        known = values[rows].double()
        mean, deviation = known.mean(0), known.std(0, correction=0)
        scale = deviation.where(deviation > 0, 1.0)  # what never varies stays at 0
        changed[name] = ((values.double() - mean) / scale).float()
        scaling |= {f"{name}.mean": mean, f"{name}.scale": scale}
    scaled = replace(task, standardise=False, **changed)
    scaled.__dict__["digest"] = task.digest  # of the data as they came
    return scaled, scaling


def _draw(
    strata: Tensor, rows: Tensor, amount: float | int, option: str, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw ``amount`` of ``rows`` stratified by class; return those drawn and those left."""
    number = _number_of_rows(amount, len(rows), option)
    shuffled = rows[torch.randperm(len(rows), generator=generator)]
    shuffled = shuffled[strata[shuffled].argsort(stable=True)]  # class by class
    counts = torch.bincount(strata[rows])  # [classes]

    # Largest remainders: whole rows first, the rest to the classes that lost most by rounding.
    take = counts * number // len(rows)
    lost = counts * number % len(rows)
    take[lost.argsort(descending=True, stable=True)[: number - int(take.sum())]] += 1

    place = torch.arange(len(rows)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    drawn = place < take.repeat_interleave(counts)  # [rows]
    return shuffled[drawn].sort().values, shuffled[~drawn].sort().values


def _number_of_rows(amount: float | int, available: int, option: str) -> int:
    """Read a fraction or a count as a number of rows that leaves at least one row."""
    if isinstance(amount, bool) or not isinstance(amount, int | float):
        raise ConfigError(
            f"split_task: {option} must be a fraction (float) or a number of rows (int), "
            f"got {amount!r}."
        )
    if isinstance(amount, float) and not 0 < amount < 1:
        raise ConfigError(
            f"split_task: {option} as a fraction must be in (0, 1), got {amount}. "
            "For a number of rows give an int."
        )
    number = round(amount * available) if isinstance(amount, float) else amount
    if not 0 < number < available:
        raise ConfigError(
            f"split_task: {option}={amount} is {number} of {available} rows; it must take at "
            "least one row and leave at least one."
        )
    return number


def _check_part(task: Task, part: str, rows: Tensor) -> None:
    """Refuse one part of a split that is empty, malformed, one-sided or takes official rows."""
    where = f"TaskSplit of {task.name!r}: {part!r}"
    if rows.dtype != torch.int64 or rows.ndim != 1:
        raise ZooError(
            f"{where} must be int64 row numbers [rows], got {rows.dtype} {tuple(rows.shape)}."
        )
    if len(rows) == 0:
        raise ZooError(f"{where} is empty. Give every part some rows.")
    if rows.min() < 0 or rows.max() >= len(task.targets):
        raise ZooError(
            f"{where} names rows {int(rows.min())} to {int(rows.max())}, "
            f"the task has rows 0 to {len(task.targets) - 1}."
        )
    repeated = len(rows) - len(rows.unique())
    if repeated:
        raise ZooError(f"{where} names {repeated} rows more than once.")
    if task.test_rows is not None:
        official = (rows >= task.test_rows.start) & (rows < task.test_rows.stop)
        wrong = int((official != (part == "test")).sum())
        if wrong:
            side = "are not" if part == "test" else "are"
            raise ZooError(f"{where} has {wrong} rows that {side} official test rows of the task.")
    if task.regression:
        return
    counts = torch.bincount(task.targets[rows], minlength=task.classes)
    missing = (counts == 0).nonzero().flatten().tolist()
    if missing:
        raise ZooError(
            f"{where} has {len(rows)} rows, but none of class {', '.join(map(str, missing))}. "
            f"Give it more rows: every part needs all {task.classes} classes."
        )
