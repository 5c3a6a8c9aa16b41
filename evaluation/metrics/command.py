"""Score networks: ``python -m evaluation.metrics --zoo zoos/digits``.

Members, their ensemble and their average, before and after alignment, are scored on one part of the
images, the test images unless another part is asked for; how they hang together is measured on the
lines between them and on the simplex that they span. A table goes to the terminal, everything to a
file. Nothing here chooses anything.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track as progress
from rich.table import Table

from evaluation.metrics.judging import Group, checkpoint_group, zoo_groups
from evaluation.metrics.reporting import STATES, family_metrics
from metamerge.errors import ConfigError
from metamerge.registry import list_alignments
from zoo.build import split_of
from zoo.files import write_json
from zoo.options import command
from zoo.parts import PARTS, split_task
from zoo.store import FAMILY_PARTS, load_zoo
from zoo.tasks import load_task

SHORT = {
    "accuracy": "accuracy",
    "negative_log_likelihood": "NLL",
    "calibration_error": "ECE",
    "agreement_with_ensemble": "as ensemble",
    "mean_absolute_error": "MAE",
    "mean_squared_error": "MSE",
    "r2": "R2",
}


@dataclass(frozen=True)
class MetricsOptions:
    """Score the families of a zoo, or checkpoints that learned one task."""

    zoo: str | None = None  # folder of a zoo
    part: str = "test"  # which of its families: train, validation or test
    members: int | None = None  # of how many members; the most there are, if not given
    families: int = 0  # how many of them; 0: all
    checkpoints: tuple[str, ...] = ()  # or: files, folders, addresses of zoo members
    task: str | None = None  # of the checkpoints: a data set by name, or a file
    data: str | None = None  # folder with the task's files, where it needs some
    target: str | None = None  # column to predict, of a task that is a table
    objective: int = 400  # of the checkpoints' task: images kept back for mergers
    architecture: str | None = None  # of checkpoints that do not carry theirs: mlp, cnn, ...
    widths: tuple[int, ...] | None = None  # of the architecture
    split: str = "test"  # images to score on: segments, objective, validation or test
    align: str = "weight_matching"  # alignment of the members; none for as they are alone
    points: int = 11  # mixtures on the line between two members, ends included; 0: no lines
    draws: int = 32  # random mixtures of all members; 0: none
    bins: int = 15  # of the calibration error
    calibration: int = 256  # objective images on which units are watched, at most
    seed: int = 0  # of the draws, and of the split of the checkpoints' task
    out: str = "metrics.json"  # file of everything

    def __post_init__(self) -> None:
        """Refuse options that make no sense.

        Raises:
            ConfigError: Naming the option.
        """
        if (self.zoo is None) == (not self.checkpoints):
            raise ConfigError("zoo, checkpoints: give one of them.")
        if self.checkpoints and self.task is None:
            raise ConfigError("task: name the task that the checkpoints learned.")
        known = {
            "part": FAMILY_PARTS,
            "split": PARTS,
            "align": ("none", *list_alignments()),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ConfigError(
                    f"{name}: expected one of {', '.join(values)}, got {getattr(self, name)!r}."
                )
        least = {"families": 0, "draws": 0, "bins": 1, "calibration": 2}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ConfigError(
                    f"{name}: expected at least {smallest}, got {getattr(self, name)}."
                )
        if self.points != 0 and self.points < 3:
            raise ConfigError(f"points: expected 0 or at least 3, got {self.points}.")


def measure(options: MetricsOptions, console: Console) -> dict[str, Any]:
    """Score everything, print the table, write the file.

    Args:
        options: What to score.
        console: Where to print.

    Returns:
        What the file holds.

    Raises:
        ConfigError: If options do not fit zoo or checkpoints.
        ZooError: If zoo or task cannot be read.
    """
    groups, task = _groups(options)
    how = {name: getattr(options, name) for name in ("align", "points", "draws", "bins", "seed")}
    found = []
    for group in progress(groups, "metrics", console=console, transient=True):
        found += family_metrics(group, **how)
    content = {
        "options": asdict(options),
        "task": {"name": task.name, "digest": task.digest},
        "split": options.split,
        "rows": len(groups[0].images[0]),
        "families": found,
    }
    _print(console, content)
    path = Path(options.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)
    console.print(f"[bold]metrics[/] {path}")
    return content


def _groups(options: MetricsOptions) -> tuple[list[Group], Any]:
    if options.zoo is None:
        task = load_task(options.task, options.data, target=options.target)
        split = split_task(task, seed=options.seed, objective=options.objective)
        group = checkpoint_group(
            options.checkpoints,
            split,
            options.split,
            architecture=options.architecture,
            widths=options.widths,
            calibration=options.calibration,
        )
        return [group], task
    zoo = load_zoo(options.zoo)
    members = options.members or max(zoo.sizes)
    groups = zoo_groups(
        zoo,
        options.part,
        members,
        options.split,
        most=options.families,
        calibration=options.calibration,
    )
    return list(groups), split_of(zoo).task


def _print(console: Console, content: dict[str, Any]) -> None:
    """Each network where there is one family, and means over families otherwise."""
    families = content["families"]
    names = [name for name in SHORT if name in families[0]["members"][0]]
    if any("agreement_with_ensemble" in one[STATES[0]]["average"] for one in families):
        names.append("agreement_with_ensemble")
    table = Table(
        title=f"{content['task']['name']}, {content['rows']} {content['split']} rows: "
        f"{_count(len(families))} of {len(families[0]['members'])}",
        title_justify="left",
        box=SIMPLE,
        pad_edge=False,
    )
    table.add_column("", overflow="fold")
    for name in names:
        table.add_column(SHORT[name], justify="right", no_wrap=True)
    members = [member for one in families for member in one["members"]]
    if len(families) == 1:
        for member in members:
            table.add_row(member["name"], *_cells([member], names))
    table.add_row("members", *_cells(members, names))
    table.add_row("ensemble", *_cells([one["ensemble"] for one in families], names))
    for state in STATES:
        if state in families[0]:
            own = [one[state]["average"] for one in families]
            table.add_row(f"average {state}", *_cells(own, names))
    table.caption = "mean ± standard deviation"
    console.print(table)
    console.print(_connected(families))


def _connected(families: Sequence[dict[str, Any]]) -> Table:
    """How members hang together, as trained and aligned; means over families."""
    table = Table(box=SIMPLE, pad_edge=False, title_justify="left", title="Between members")
    states = [state for state in STATES if state in families[0]]
    for name in ("", *states):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    lines = {
        "loss barrier of two": ("barriers", "mean"),
        "excess loss of the average": ("simplex", "at_average"),
        "excess loss of random mixtures": ("simplex", "mean"),
        "cosine": ("cosine",),
        "distance over mean norm": ("distance",),
    }
    ratios = families[0][states[0]]["variance_ratio"]
    lines |= {f"variance ratio, {key}": ("variance_ratio", key) for key in ratios}
    for what, path in lines.items():
        found = [[_at(one[state], path) for one in families] for state in states]
        if any(value is not None for own in found for value in own):
            table.add_row(what, *(_spread([v for v in own if v is not None]) for own in found))
    return table


def _at(told: dict[str, Any], path: Sequence[str]) -> float | None:
    """A number in a dict of dicts; None where it was not measured."""
    for name in path:
        told = told.get(name) if told is not None else None
    return told


def _count(families: int) -> str:
    return "a family" if families == 1 else f"{families} families"


def _cells(scores: Sequence[dict[str, Any]], names: Sequence[str]) -> list[str]:
    return [_spread([one[name] for one in scores if one.get(name) is not None]) for name in names]


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    numbers = torch.tensor(values, dtype=torch.float64)
    if len(values) == 1:
        return f"{float(numbers):.3f}"
    return f"{float(numbers.mean()):.3f} ± {float(numbers.std(correction=1)):.3f}"


def main() -> None:
    """Entry point of ``python -m evaluation.metrics``."""
    command(
        MetricsOptions,
        lambda options: measure(options, Console()),
        prog="python -m evaluation.metrics",
    )
