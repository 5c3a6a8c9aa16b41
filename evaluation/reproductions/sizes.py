"""Experiments that are run at several sizes: row by row, and ours beside the published figures."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track as progress
from rich.table import Table
from torch import Tensor

from evaluation.methods.ledger import Ledger
from evaluation.reproductions.pairs import PairOptions
from zoo.style import COLOURS
from zoo.tasks import Task

NAMES = {
    "members": "members",
    "plain": "plain average",
    "matched_activations": "matched by activations",
    "repaired_activations": "matched by activations + REPAIR",
    "matched": "matched by weights",
    "repaired": "matched by weights + REPAIR",
    "refitted": "matched by weights + refit",
}
SHOWN = ("members", "plain", "matched_activations", "repaired_activations", "refitted")


@dataclass(frozen=True)
class Experiment:
    """What is run at several sizes.

    Attributes:
        name: Of the experiment and its files.
        title: Headline.
        size: What grows; the option that lists the sizes is its plural.
        axis: What that is called below the picture.
        published: Size -> name out of ``NAMES`` -> accuracy in %.
    """

    name: str
    title: str
    size: str
    axis: str
    published: Mapping[int, Mapping[str, float]]


Scores = Callable[[PairOptions, Task, int], dict[str, Tensor]]
"""Options, task and size -> name -> test accuracy of every pair."""


def run_sizes(
    experiment: Experiment, options: PairOptions, task: Task, scores: Scores, console: Console
) -> dict[int, dict[str, Any]]:
    """Run all sizes, print the table and write the files; sizes that are done are kept.

    Args:
        experiment: What is run.
        options: Of the run; a dataclass.
        task: What is learned.
        scores: Trains the pairs of one size and merges them.
        console: Where to print.

    Returns:
        Size -> its row.
    """
    out, listed = Path(options.out), f"{experiment.size}s"
    kept = {k: v for k, v in asdict(options).items() if k not in ("out", "data", listed)}
    ledger = Ledger(out / "rows.jsonl", {**kept, "task": task.digest})
    sizes = getattr(options, listed)
    for size in progress(sizes, listed, console=console, transient=True):
        if str(size) not in ledger:
            ledger.add(str(size), scored_row(partial(scores, options, task, size)))
    rows = {size: ledger.rows[str(size)] for size in sizes}
    write_report(experiment, rows, out, asdict(options), console)
    return rows


def scored_row(make: Callable[[], dict[str, Tensor]]) -> dict[str, Any]:
    """Do it, and tell mean and standard deviation over pairs, and how long it took.

    Args:
        make: Returns name -> accuracies ``[f]``.

    Returns:
        ``mean`` and ``std`` (name -> number in [0, 1]), ``pairs`` and ``seconds``.
    """
    clock = time.perf_counter()
    scores = make()
    count = len(scores["members"])
    return {
        "mean": {name: round(float(s.mean()), 4) for name, s in scores.items()},
        "std": {
            name: round(float(s.std(correction=1)) if count > 1 else 0.0, 4)
            for name, s in scores.items()
        },
        "pairs": count,
        "seconds": round(time.perf_counter() - clock, 1),
    }


def write_report(
    experiment: Experiment,
    rows: Mapping[int, dict[str, Any]],
    out: Path,
    options: Mapping[str, Any],
    console: Console,
) -> None:
    """Print ours beside theirs, and write ``<name>.json`` and ``<name>.png``.

    Args:
        experiment: What was run.
        rows: Depth or width -> what ``scored_row`` gave.
        out: Folder.
        options: Of the run, for the JSON file.
        console: Where to print.
    """
    name, published = experiment.name, experiment.published
    table = Table(title=experiment.title, caption="ours: mean ± std over pairs, test accuracy in %")
    table.add_column("")
    for size in rows:
        table.add_column(f"{experiment.size} {size}\nours", justify="right", no_wrap=True)
        table.add_column("\npublished", justify="right")
    for key in NAMES:
        cells = [
            cell for size, row in rows.items() for cell in _cells(key, row, published.get(size, {}))
        ]
        if any(cells):
            table.add_row(NAMES[key], *cells)
    console.print(table)
    out.mkdir(parents=True, exist_ok=True)
    content = {"options": dict(options), "rows": rows, "published": published}
    (out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    _figure(rows, experiment).savefig(out / f"{name}.png", dpi=150)
    console.print(f"[bold]{name}[/] {out}/{name}.json, {name}.png")


def _cells(key: str, row: dict[str, Any], published: Mapping[str, float]) -> tuple[str, str]:
    theirs = f"{published[key]:.1f}" if key in published else ""
    if key not in row["mean"]:
        return "", theirs
    return f"{100 * row['mean'][key]:.1f} ± {100 * row['std'][key]:.1f}", theirs


def _figure(rows: Mapping[int, dict[str, Any]], experiment: Experiment) -> Figure:
    """Ours as lines with their spread, the published figures as crosses of the same colour."""
    figure = Figure(figsize=(8, 4), layout="constrained", facecolor="white")
    axes, published = figure.subplots(), experiment.published
    sizes = sorted({*rows, *published})
    for place, key in enumerate(SHOWN):
        own = [size for size in sorted(rows) if key in rows[size]["mean"]]
        colour = COLOURS[place]
        axes.errorbar(
            [sizes.index(size) for size in own],
            [100 * rows[size]["mean"][key] for size in own],
            yerr=[100 * rows[size]["std"][key] for size in own],
            color=colour,
            marker="o",
            markersize=4,
            linewidth=1.2,
            capsize=2,
            label=NAMES[key],
        )
        told = [size for size in sizes if key in published.get(size, {})]
        values = [published[size][key] for size in told]
        axes.plot([sizes.index(s) for s in told], values, "x", color=colour, markersize=8)
    axes.plot([], [], "x", color="grey", label="published")
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set_xlabel(experiment.axis, fontsize=9)
    axes.set_ylabel("test accuracy in %", fontsize=9)
    axes.set_ylim(0, 100)
    axes.grid(axis="y", linewidth=0.4, alpha=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    figure.legend(fontsize=8, frameon=False, loc="outside right center")
    axes.set_title(experiment.title, fontsize=10)
    return figure
