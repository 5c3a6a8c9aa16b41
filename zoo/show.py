"""Look at a zoo: ``python -m zoo.show --zoo zoos/digits``.

A table of its families (members, accuracy, distances) goes to the terminal, four pictures into a
folder: members in weight space before and after alignment, what every segment holds, training
curves, and the way of the weights of one member.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from metamerge.alignment import weight_matching
from metamerge.errors import ConfigError
from metamerge.weights import Weights
from zoo.options import command
from zoo.pictures import curves_figure, path_figure, segments_figure, weight_space_figure
from zoo.store import Zoo, load_zoo
from zoo.weight_space import principal_components

SCORES = {"validation_accuracy": "validation accuracy", "validation_r2": "validation R2"}
_FOREIGN = ("test_accuracy", "validation_accuracy", "train_accuracy")
_NETWORKS = 64  # networks at most that are drawn and whose distances are measured


@dataclass(frozen=True)
class ShowOptions:
    """Look at a zoo: a table, and pictures of one group of its families."""

    zoo: str = "zoos/digits"  # folder of the zoo
    part: str | None = None  # which families are drawn: train, validation or test
    members: int | None = None  # of how many members; the most there are, if not given
    families: int = 4  # how many of them
    member: int = 0  # whose way is drawn, in the first family
    out: str | None = None  # folder of the pictures; <zoo>.pictures

    def __post_init__(self) -> None:
        """Refuse options that make no sense.

        Raises:
            ConfigError: Naming the option.
        """
        if self.families < 1:
            raise ConfigError(f"families: expected at least 1, got {self.families}.")
        if self.member < 0:
            raise ConfigError(f"member: expected 0 or more, got {self.member}.")


def show(options: ShowOptions, console: Console) -> list[Path]:
    """Print the table and draw the pictures.

    Args:
        options: What to look at.
        console: Where to print.

    Returns:
        The pictures.

    Raises:
        ConfigError: If there is no such group or member.
        ZooError: If the zoo cannot be read.
    """
    zoo = load_zoo(options.zoo)
    console.print(overview(zoo))
    part, members = _chosen(zoo, options)
    folder = Path(options.out or f"{options.zoo.rstrip('/')}.pictures")
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, figure in pictures(zoo, part, members, options).items():
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=130)
        made.append(path)
        console.print(f"[bold]picture[/] {path}")
    if not zoo.snapshots(part, members):
        console.print(
            "No snapshots were kept: build with --snapshots 10 to see weights on the way."
        )
    return made


def overview(zoo: Zoo) -> Table:
    """A row per group of families.

    Distances are means over pairs of members of ``|a - b|`` relative to the mean norm, over all
    floating tensors of at most 16 families.

    Args:
        zoo: The zoo.

    Returns:
        The table.
    """
    table = Table(
        title=f"{zoo.folder}: {_what(zoo)}", title_justify="left", box=SIMPLE, pad_edge=False
    )
    for name in ("families", "n", "rows", "score", "range", "apart", "aligned", "others"):
        table.add_column(name, justify="left" if name == "families" else "right", no_wrap=True)
    for name, group in zoo.groups.items():
        part, members = group["part"], group["members"]
        records = zoo.records(part, members)
        rows, score = records.get("rows"), _scores(records)[0]
        known = score[score.isfinite()]
        shown = ["unknown", ""]
        if len(known):
            shown = [f"{known.mean():.2f} ± {known.std(correction=0):.2f}"]
            shown.append(f"{known.min():.2f}..{known.max():.2f}")
        size = "unknown" if rows is None else f"{rows.float().mean():.0f}"
        cells = [str(group["families"]), size, *shown, *_distances(zoo, part, members)]
        table.add_row(name, *cells)
    table.caption = (
        "n: families. score: accuracy or R2 of members, mean ± deviation. apart: mean distance "
        "within families over the mean norm. aligned: that after weight matching. others: that of "
        "first members of families."
    )
    return table


def _what(zoo: Zoo) -> str:
    if zoo.options is None:
        return f"adopted from {zoo.manifest['source']['folder']}"
    told = zoo.options
    return f"{told['task']}, {told['architecture']}, split {told['split']}, init {told['init']}"


def _chosen(zoo: Zoo, options: ShowOptions) -> tuple[str, int]:
    """Part and size of the families to draw."""
    groups = [
        (group["part"], group["members"])
        for group in zoo.groups.values()
        if options.part in (None, group["part"]) and options.members in (None, group["members"])
    ]
    if not groups:
        raise ConfigError(
            f"part, members: {zoo.folder} has no families {options.part or 'of any part'} of "
            f"{options.members or 'any number'}; there are {sorted(zoo.groups)}."
        )
    order = ("test", "validation", "train")
    part, members = max(groups, key=lambda group: (group[1], -order.index(group[0])))
    if options.member >= members:
        raise ConfigError(f"member: got {options.member}, families {part} have {members} members.")
    return part, members


def _scores(records: Weights) -> tuple[Tensor, str]:
    """Score of every member ``[f, m]`` and what it is."""
    for name in (*SCORES, *_FOREIGN):
        if name in records:
            return records[name].float(), SCORES.get(name, name.replace("_", " "))
    shape = next(iter(records.values())).shape[:2]
    return torch.full(shape, torch.nan), "score"


def _some(zoo: Zoo, part: str, members: int, families: int) -> Weights:
    """The first families, ``[f, m, ...]``, as many as can be drawn."""
    count = max(1, min(families, _NETWORKS // members))
    return {key: tensor[:count] for key, tensor in zoo.families(part, members).items()}


def _flat(weights: Weights) -> Tensor:
    """All floating tensors side by side, ``[f, m, p]``."""
    parts = [tensor.flatten(2).float() for tensor in weights.values() if tensor.is_floating_point()]
    return torch.cat(parts, dim=2)


def _distances(zoo: Zoo, part: str, members: int) -> list[str]:
    """Within families as they are and aligned, and between families."""
    some = _some(zoo, part, members, 16)
    points = _flat(some)
    shown = [_relative(points) if members > 1 else None, None, None]
    if zoo.manifest["program"] is not None and members > 1:
        spec = zoo.layout.spec
        shown[1] = _relative(_flat(spec.permute(some, weight_matching(some, spec))))
    if len(points) > 1:
        shown[2] = _relative(points[None, :, 0])
    return ["" if value is None else f"{value:.2f}" for value in shown]


def _relative(points: Tensor) -> float:
    """Mean distance of pairs over the mean norm; ``[f, m, p]``."""
    apart = torch.cdist(points, points)
    m = points.shape[1]
    mean = apart.sum((1, 2)) / (m * (m - 1))
    return float((mean / points.norm(dim=2).mean(1)).mean())


def pictures(zoo: Zoo, part: str, members: int, options: ShowOptions) -> dict[str, Figure]:
    """Draw one group of families.

    Args:
        zoo: The zoo.
        part: Part of the families.
        members: Members per family.
        options: How many families, and whose way.

    Returns:
        File stem -> figure; those that the zoo has something to tell for.
    """
    records = zoo.records(part, members)
    title = f"{zoo.folder}, {part} families of {members}"
    some = _some(zoo, part, members, options.families)
    count = len(next(iter(some.values())))
    scores, label = _scores(records)
    drawn = {"weight_space": _weight_space(zoo, some, scores[:count], label, title)}
    if "rows_per_class" in records:
        counts = records["rows_per_class"][:count]
        task = zoo.manifest["task"]
        labels = task["labels"] or [str(number) for number in range(task["classes"])]
        shown = [name[:10] for name in labels]
        drawn["segments"] = segments_figure(list(counts), shown, title=title, label="images")
    curves = {
        name: records[key][:count].flatten(0, 1)
        for key, name in (("losses", "training loss"), ("held_back_losses", "loss held back"))
        if key in records
    }
    if curves:
        drawn["curves"] = curves_figure(curves, title=title)
    snapshots = zoo.snapshots(part, members)
    if snapshots:
        drawn["path"] = _path(snapshots, some, options.member, f"{title}, family 0")
    return drawn


def _weight_space(zoo: Zoo, some: Weights, scores: Tensor, label: str, title: str) -> Figure:
    spaces = {"as trained": _plane(_flat(some))}
    if zoo.manifest["program"] is not None:
        spec = zoo.layout.spec
        together = {key: tensor.flatten(0, 1)[None] for key, tensor in some.items()}
        aligned = spec.permute(together, weight_matching(together, spec))
        shape = scores.shape
        back = {key: tensor[0].unflatten(0, shape) for key, tensor in aligned.items()}
        spaces["all aligned with each other"] = _plane(_flat(back))
    return weight_space_figure(spaces, scores, label=label, title=title)


def _plane(points: Tensor) -> Tensor:
    """Coordinates on the first two principal components, ``[f, m, p]`` -> ``[f, m, 2]``."""
    found = principal_components({"all": points.flatten(0, 1)})
    return found.places.unflatten(0, points.shape[:2])


def _path(snapshots: Weights, final: Weights, member: int, title: str) -> Figure:
    """Weights of the first family on their way, the end included."""
    way: dict[str, Any] = {
        key: torch.cat([tensor[0], final[key][0][:, None]], dim=1)  # [m, s + 1, ...]
        for key, tensor in snapshots.items()
        if tensor.is_floating_point()
    }
    change = {
        key: (own[member] - own[member, :1]).flatten(1).norm(dim=1)
        / own[member, 0].norm().clamp(min=1e-12)
        for key, own in way.items()
    }
    return path_figure(_plane(_flat(way)), change, member=member, title=title)


def main() -> None:
    """Entry point of ``python -m zoo.show``."""
    command(ShowOptions, lambda options: show(options, Console()), prog="python -m zoo.show")


if __name__ == "__main__":
    main()
