"""Trainings in rounds: table and picture of one, or of several beside each other.

    python -m evaluation.rounds --runs "average=runs/average" "refit=runs/refit" --out runs/merges

Accuracy is that on test images, mean and standard deviation over seeds. Learning rates are chosen
on validation images, one for all seeds.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, LogLocator, MaxNLocator
from rich.console import Console
from rich.table import Table
from torch import Tensor

from evaluation.compare import terminal
from metamerge.errors import ConfigError
from zoo.options import command
from zoo.style import COLOURS

MARGIN = 0.01  # accuracy below training on the union that counts as reaching it
SLACK = 0.03  # share of images by which trainings with as many passes may differ
SHOWN = 0.15  # accuracy below it at which the picture ends

Row = Mapping[str, Any]
"""A training: ``members``, ``seed``, ``lr``, ``curve`` (``test``, ``validation``, ... by rounds),
``bytes_per_round`` and, where one was made, the row of training on the ``union``."""


@dataclass(frozen=True)
class PictureOptions:
    """Show several trainings in rounds beside each other."""

    runs: tuple[str, ...] = ()  # folders that trainers/rounds.py wrote, each as name=folder
    out: str = "runs/rounds-compared"  # picture and table, as <out>.png and <out>.json
    title: str = ""  # headline of the picture
    margin: float = SHOWN  # accuracy below training on the union at which the picture ends


def chosen(rows: Sequence[Row]) -> dict[int, list[Row]]:
    """Rows with the learning rate that is best on validation images at the end.

    Args:
        rows: Of all numbers of members, seeds and rates.

    Returns:
        Number of members -> one row per seed.
    """
    found = {}
    for members in dict.fromkeys(row["members"] for row in rows):
        own = [row for row in rows if row["members"] == members]
        rates = dict.fromkeys(row["lr"] for row in own)
        by_rate = {rate: [row for row in own if row["lr"] == rate] for rate in rates}
        found[members] = max(
            by_rate.values(), key=lambda own: float(_last(own, "validation").mean())
        )
    return found


def unions(rows: Sequence[Row]) -> list[Row]:
    """Rows of training on the union, with a learning rate that is chosen alike.

    Args:
        rows: Of one number of members.

    Returns:
        One row per seed; empty if there are none.
    """
    own = [row["union"] for row in rows if "union" in row]
    return next(iter(chosen(own).values()), [])


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What every number of members came to.

    Args:
        rows: Of all numbers of members, seeds and rates.

    Returns:
        For each: accuracies with their deviations over seeds, and how many rounds and bytes it
        takes until the mean over seeds is within a point of that of the union's end; None if never.
    """
    found = []
    for members, best in chosen(rows).items():
        curve, last = mean_curve(best, "test"), _last(best, "test")
        entry = {
            "members": members,
            "lr": best[0]["lr"],
            "seeds": len(best),
            "rounds": len(curve),
            "images": float(
                torch.tensor([sum(r["curve"]["images"]) for r in best]).double().mean()
            ),
            "test_mean": float(last.mean()),
            "test_std": _spread(last),
            "validation_mean": float(_last(best, "validation").mean()),
            "bytes_per_round": best[0]["bytes_per_round"],
            "bytes": best[0]["bytes_per_round"] * len(curve),
        }
        union = unions([row for row in rows if row["members"] == members])
        if union:
            ceiling = _last(union, "test")
            reached = (curve >= float(ceiling.mean()) - MARGIN).nonzero().flatten()
            first = int(reached[0]) + 1 if len(reached) else None
            entry |= {
                "union_lr": union[0]["lr"],
                "union_mean": float(ceiling.mean()),
                "union_std": _spread(ceiling),
                "rounds_to_union": first,
                "bytes_to_union": first and first * entry["bytes_per_round"],
            }
        found.append(entry)
    return found


def mean_curve(rows: Sequence[Row], name: str) -> Tensor:
    """Mean over seeds by rounds, as far as all of them went, ``[rounds]``."""
    return _curves(rows, name).mean(0)


def _curves(rows: Sequence[Row], name: str) -> Tensor:
    """``[seeds, rounds]``."""
    curves = [row["curve"][name] for row in rows]
    return torch.tensor([own[: min(map(len, curves))] for own in curves])


def _last(rows: Sequence[Row], name: str) -> Tensor:
    return torch.tensor([row["curve"][name][-1] for row in rows])


def _spread(values: Tensor) -> float:
    return float(values.std(correction=1)) if len(values) > 1 else 0.0


# ----------------------------------------------------------------------------------------------
# files, table, picture


def write_rounds(out: Path, rows: Sequence[Row], told: Mapping[str, Any]) -> list[Path]:
    """Write ``rounds.json`` and ``rounds.png``.

    Args:
        out: Folder, made if missing.
        rows: Of all numbers of members, seeds and rates.
        told: Options and task.

    Returns:
        The files.
    """
    out.mkdir(parents=True, exist_ok=True)
    series = {f"K = {members}": own for members, own in by_members(rows).items()}
    files = [out / "rounds.json", out / "rounds.png"]
    content = {**told, "summary": summary(rows), "rows": list(rows)}
    files[0].write_text(json.dumps(content, indent=1) + "\n")
    title = f"{told['task']}: {told['options']['method']}, {told['options']['outer']}"
    rounds_figure(series, title=title).savefig(files[1], dpi=150)
    return files


def by_members(rows: Sequence[Row]) -> dict[int, list[Row]]:
    """Number of members -> its rows."""
    found: dict[int, list[Row]] = {}
    for row in rows:
        found.setdefault(row["members"], []).append(row)
    return found


def print_rounds(console: Console, series: Mapping[str, Sequence[Row]], title: str) -> None:
    """Print what every series came to.

    Args:
        console: Where to print.
        series: Name -> rows of one number of members.
        title: Headline.
    """
    caption = (
        "Test accuracy in %, mean ± std over seeds. union - 1: first round less than a point below "
        "the end of training on the union; MB until: what was sent until then."
    )
    table = Table(title=title, caption=caption)
    for name in ("", "rounds", "accuracy", "union", "union - 1", "MB/round", "MB until"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for name, rows in series.items():
        (own,) = summary(rows)
        table.add_row(name, str(own["rounds"]), *cells(own))
    console.print(table)


def cells(own: Mapping[str, Any]) -> list[str]:
    """Accuracy, that of the union, rounds to it, megabytes of a round and of all of these."""
    union = (
        f"{100 * own['union_mean']:.1f} ± {100 * own['union_std']:.1f}"
        if "union_mean" in own
        else ""
    )
    first = own.get("rounds_to_union")
    return [
        f"{100 * own['test_mean']:.1f} ± {100 * own['test_std']:.1f}",
        union,
        str(first or ("never" if union else "")),
        f"{own['bytes_per_round'] / 1e6:.1f}",
        f"{own['bytes_to_union'] / 1e6:.0f}" if first else "",
    ]


def rounds_figure(
    series: Mapping[str, Sequence[Row]], *, title: str, margin: float = SHOWN
) -> Figure:
    """Accuracy against rounds and against megabytes, with bands over seeds.

    Args:
        series: Name -> rows of one number of members, all rates.
        title: Headline.
        margin: How far below training on the union the picture goes.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(9, 3.8), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2, sharey=True)
    ceilings, drawn = [], set()
    for (name, rows), colour in zip(series.items(), COLOURS * len(series), strict=False):
        ((_, best),) = chosen(rows).items()
        rounds = 1 + torch.arange(len(mean_curve(best, "test")))
        _band(left, rounds, best, colour, name)
        _band(right, rounds * best[0]["bytes_per_round"] / 1e6, best, colour, name)
        union = unions(rows)
        if not union:
            continue
        ceilings.append(float(_last(union, "test").mean()))
        curve = mean_curve(union, "test").numpy()
        if tuple(curve) not in drawn:  # series may share it
            style = {"linestyle": "--", "color": "#555555", "linewidth": 1.3}
            label = None if drawn else "training on the union"
            drawn.add(tuple(curve))
            left.plot(1 + torch.arange(len(curve)), 100 * curve, label=label, **style)
            right.axhline(100 * curve[-1], **style)
    _dress(left, right, title, ceilings, margin)
    return figure


def _band(axes: Axes, places: Tensor, rows: Sequence[Row], colour: str, label: str) -> None:
    curves = 100 * _curves(rows, "test")
    mean = curves.mean(0)
    axes.plot(places, mean, color=colour, linewidth=1.6, label=label, marker="o", markersize=2.5)
    if len(curves) > 1:
        spread = curves.std(0, correction=1)
        axes.fill_between(places, mean - spread, mean + spread, color=colour, alpha=0.2, lw=0)


def _dress(left: Axes, right: Axes, title: str, ceilings: list[float], margin: float) -> None:
    for axes in (left, right):
        axes.grid(linewidth=0.4, alpha=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    if ceilings:
        low = max(left.get_ylim()[0], 100 * (min(ceilings) - margin))
        left.set_ylim(low, 100 * max(ceilings) + 1.5)
    left.set_xlabel("rounds", fontsize=9)
    left.set_ylabel("test accuracy in %", fontsize=9)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.set_xscale("log")
    right.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    for axis in (right.xaxis.set_major_formatter, right.xaxis.set_minor_formatter):
        axis(LogFormatter(labelOnlyBase=False, minor_thresholds=(9, 9)))
    right.tick_params(axis="x", which="both", labelsize=8)
    right.set_xlabel("sent in MB: K networks up and K down every round", fontsize=9)
    left.legend(fontsize=8, frameon=False, loc="lower right")
    left.figure.suptitle(title, fontsize=10)


def borrow_unions(series: dict[str, list[Row]]) -> None:
    """Give rows without training on the union that of a row of the same seed and images.

    Args:
        series: Name -> rows; changed where rows can borrow.
    """
    own = [row for rows in series.values() for row in rows if "union" in row]
    for name, rows in series.items():
        lenders = [[other for other in own if _same_union(row, other)] for row in rows]
        if all("union" not in row and found for row, found in zip(rows, lenders, strict=True)):
            series[name] = [
                {**row, "union": found[0]["union"]}
                for row, found in zip(rows, lenders, strict=True)
            ]


def _same_union(row: Row, other: Row) -> bool:
    """Whether both make as many passes (but for last batches) over as many images."""
    seen, theirs = (sum(one["curve"]["images"]) for one in (row, other))
    same = row["seed"] == other["seed"] and row["images"] == other["images"]
    return same and abs(seen - theirs) <= SLACK * theirs


def compared(options: PictureOptions) -> None:
    """Read several trainings, print the table, write the picture.

    Args:
        options: Which.

    Raises:
        ConfigError: If there are none, or one cannot be read.
    """
    if not options.runs:
        raise ConfigError("runs: name some, as in --runs average=runs/average refit=runs/refit.")
    series: dict[str, list[Row]] = {}
    for told in options.runs:
        name, _, folder = told.rpartition("=")
        try:
            content = json.loads((Path(folder) / "rounds.json").read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"runs: {folder} holds no rounds.json that can be read.") from error
        for members, rows in by_members(content["rows"]).items():
            several = len({row["members"] for row in content["rows"]}) > 1
            series[f"{name or folder}, K = {members}" if several else name or folder] = rows
    borrow_unions(series)
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    told = {name: summary(rows)[0] for name, rows in series.items()}
    out.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n")
    picture = out.with_suffix(".png")
    rounds_figure(series, title=options.title, margin=options.margin).savefig(picture, dpi=150)
    console = terminal()
    print_rounds(console, series, options.title)
    console.print(f"[bold]rounds[/] {out.with_suffix('.json')}, {picture}")


def main() -> None:
    """Entry point of ``python -m evaluation.rounds``."""
    command(PictureOptions, compared, prog="python -m evaluation.rounds")


if __name__ == "__main__":
    main()
