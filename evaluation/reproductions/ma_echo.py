"""One-shot merging of extremely skewed members: ``python -m evaluation.reproductions.ma_echo``.

Paper: Su, Li and Xue, "One-Shot Federated Learning without Server-side Training", Neural Networks
2023, arXiv:2204.12493 (MA-Echo): MNIST, perceptrons 784-400-200-100-10 without biases, five members
with inits of their own, classes dealt out by Dirichlet(0.01), ten epochs of SGD at 0.01 with
momentum 0.5 and batches of 64. Their averages and their ensemble are told which classes each member
has seen and leave its other output rows out; rows that do so here are named "known classes". All
training images are dealt out, so calibration images are images that some member saw.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track as progress
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

from evaluation.compare import terminal
from evaluation.methods.control_rows import control_calls
from evaluation.methods.entries import USUAL
from evaluation.methods.ledger import digest_of
from evaluation.methods.rows import Call, merge_calls, merging_of, row_of, scored
from evaluation.methods.settings import Draw, Setting, drawn_budget, official_rows
from evaluation.methods.table import setting_rows
from evaluation.methods.tables import print_tables, write_tables
from evaluation.metrics import accuracy, family_logits
from evaluation.reproductions.skewed import family, known_classes, network, shares
from metamerge.corrections.refit import Target, mean_target, mixed_target, refit
from metamerge.registry import get_alignment, list_alignments
from metamerge.structure import OUTPUTS, Layer, Layout, discover_program
from metamerge.weights import Weights, stack
from zoo.architectures import program_of
from zoo.options import command
from zoo.tasks import Task, load_task

NAME = "ma-echo"
KNOWN = "known classes"
MEAN, SPREAD = 0.1307, 0.3081  # of MNIST's pixels, as inputs are standardised
PUBLISHED = {  # accuracy in %, and the row that it belongs to; the last is the paper's own method
    "ensemble": (80.0, f"ensemble, {KNOWN}"),
    "averaging": (19.1, f"average, {KNOWN}"),
    "optimal transport": (10.1, f"optimal_transport > average, {KNOWN}"),
    "MA-Echo": (82.5, None),
}


@dataclass(frozen=True)
class MaEchoOptions:
    """Merge five MNIST networks that know about two classes each, as MA-Echo's paper does."""

    data: str | None = None  # folder with the IDX files of MNIST
    out: str = "runs/ma_echo"  # folder of the table and its picture
    seeds: int = 5  # families, each with a split and inits of its own
    members: int = 5  # networks per family
    alpha: float = 0.01  # skew of the Dirichlet distribution
    epochs: int = 10  # passes of a member over its images
    batch_size: int = 64  # images per step
    lr: float = 0.01  # of SGD, constant
    momentum: float = 0.5  # of SGD
    images: int = 0  # training images that are dealt out; 0 for all
    controls: bool = True  # whether to train the controls as well
    limit: int = 600  # seconds after which a row is given up
    seed: int = 0  # first seed


def ma_echo_setting(
    options: MaEchoOptions, task: Task, console: Console
) -> tuple[Setting, list[Tensor]]:
    """All families, those that were trained before from disk, and what members have seen.

    Args:
        options: How.
        task: MNIST.
        console: Where to show progress.

    Returns:
        The setting, and the classes that the members of each family know, ``[m, classes]``.
    """
    apart = ("out", "data", "controls", "limit", "seeds", "seed")
    shaping = {key: v for key, v in asdict(options).items() if key not in apart}
    identity = {**shaping, "task": task.digest}
    images = ((task.inputs - MEAN) / SPREAD, task.targets)
    free, test = official_rows(task)
    draws, known = [], []
    seeds = range(options.seed, options.seed + options.seeds)
    for seed in progress(seeds, "families", console=console, transient=True):
        dealt = shares(task.targets, free[: options.images or None], options, seed)
        known.append(known_classes(task.targets, dealt))
        place = Path(options.out) / f"family-{seed}-{digest_of(identity)}.safetensors"
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            partly = place.with_suffix(".partial")
            save_file(family(images, dealt, options, seed), partly)
            partly.replace(place)
        one = {key: tensor[None] for key, tensor in load_file(place).items()}
        draws.append(Draw(one, None, drawn_budget(images, free, seed), None, seed))
    program = program_of(network(), tuple(task.inputs.shape[1:]))
    setting = Setting(
        name=NAME,
        title=f"MNIST, MLP 784-400-200-100-10 without biases, Dirichlet({options.alpha:g})",
        task="standardised mnist",
        layout=Layout(program, discover_program(program)),
        network=network,
        starts={"own": draws},
        test=(images[0][test], images[1][test]),
        images=images,
        recipe={},
        identity={**identity, "seeds": list(seeds)},
    )
    return setting, known


def known_calls(setting: Setting, known: Sequence[Tensor]) -> Iterator[Call]:
    """Rows that are told which classes each member has seen.

    Args:
        setting: The setting.
        known: ``[m, classes]`` per family.

    Yields:
        One call per row: the ensemble, averages behind every alignment, and refit.
    """
    draws = setting.starts["own"]
    seen = {draw.seed: own for draw, own in zip(draws, known, strict=True)}
    about = {"start": "own", "method": f"ensemble, {KNOWN}", "data": "none", "control": True}
    yield Call(about, partial(_ensemble, setting, seen))
    for align in (None, *list_alignments()):
        batches = align is not None and "batches" in get_alignment(align).required
        name = f"average, {KNOWN}" if align is None else f"{align} > average, {KNOWN}"
        data = "unlabelled" if batches else "none"
        about = {"start": "own", "method": name, "data": data, "control": False}
        yield Call(about, partial(scored, setting, draws, partial(_average, setting, seen, align)))
    about = {"start": "own", "method": f"{USUAL} > average > refit, {KNOWN}"}
    about |= {"data": "unlabelled", "control": False}
    yield Call(about, partial(scored, setting, draws, partial(_refit, setting, seen)))


def _ensemble(setting: Setting, seen: Mapping[int, Tensor]) -> dict[str, Any]:
    """Mean of each class's logit over the members that know it."""
    inputs, targets = setting.test
    clock, found = time.perf_counter(), []
    for draw in setting.starts["own"]:
        logits = family_logits(setting.layout.program, draw.families, inputs)  # [1, m, b, c]
        mean = torch.einsum("fmbc,mc->fbc", logits, _shared(seen[draw.seed]))
        found.append(accuracy(mean, targets))
    seconds = (time.perf_counter() - clock) / len(found)
    return row_of(setting, torch.cat(found), seconds, setting.members)


def _shared(known: Tensor) -> Tensor:
    """Equal coefficients over the members that know a class, ``[m, c]``; over all if none does."""
    some = known + (known.sum(0, keepdim=True) == 0)
    return some / some.sum(0, keepdim=True)


def _aligned(setting: Setting, align: str | None, draw: Draw) -> Weights:
    """Members in common slots, ``[1, m, ...]``."""
    chain = () if align is None else (align,)
    merging, given = merging_of(setting, draw, "unlabelled")
    members, _ = merging.aligned(0, chain, given)
    return {key: tensor[None] for key, tensor in stack(members).items()}


def _average(
    setting: Setting, seen: Mapping[int, Tensor], align: str | None, draw: Draw
) -> Weights:
    """Mean of the members; output rows over those that know the class."""
    aligned = _aligned(setting, align, draw)
    fused = {key: tensor.mean(1) for key, tensor in aligned.items()}
    last = setting.layout.layers[-1].weight
    fused[last] = torch.einsum("fmci,mc->fci", aligned[last], _shared(seen[draw.seed]))
    return fused


@torch.no_grad()
def _refit(setting: Setting, seen: Mapping[int, Tensor], draw: Draw) -> Weights:
    """Refit whose output units are fitted to the members that know the class."""
    mixing = _shared(seen[draw.seed])[None]  # [1, m, c]

    def targets(layer: Layer, observed: Tensor) -> Target:
        if layer.target != OUTPUTS:
            return mean_target(layer, observed)
        return Target(mixed_target(observed, mixing), 1.0)

    aligned = _aligned(setting, USUAL, draw)
    start = _average(setting, seen, USUAL, draw)
    return refit(start, aligned, setting.layout, draw.budget.everything[0], targets=targets)


def ma_echo(options: MaEchoOptions, console: Console) -> list[dict[str, Any]]:
    """Train the families, merge them in every way, print ours beside the published figures.

    Args:
        options: Of the run.
        console: Where to print.

    Returns:
        All rows, best first.
    """
    out = Path(options.out)
    setting, known = ma_echo_setting(options, load_task("mnist", options.data), console)
    calls = [*known_calls(setting, known), *merge_calls(setting, None)]
    calls += control_calls(setting) if options.controls else ()
    rows = setting_rows(setting, calls, out, options.limit, console)
    titles = {NAME: setting.title}
    write_tables(out, "ma_echo", rows, titles)
    print_tables(console, rows, titles)
    console.print(published_table(rows))
    console.print(f"[bold]ma_echo[/] {out}/ma_echo.json, ma_echo.csv, ma_echo.md, ma_echo-*.png")
    return rows


def published_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The published figures, ours of the same kind, and our best of each kind of data.

    Args:
        rows: All rows.

    Returns:
        A table for the terminal.
    """
    table = Table(title="published figures beside ours, test accuracy in %")
    for name in ("", "published", "ours", "which row"):
        table.add_column(name, justify="left" if name in ("", "which row") else "right")
    for name, (figure, method) in PUBLISHED.items():
        same = [row for row in rows if row["method"] == method and "accuracy_mean" in row]
        table.add_row(name, f"{figure:.1f}", *_ours(same))
    merged = [row for row in rows if not row["control"] and "accuracy_mean" in row]
    for data in ("none", "unlabelled", "labelled"):
        own = [row for row in merged if row["data"] == data]
        table.add_row(f"best merge, images: {data}", "", *_ours(own))
    return table


def _ours(rows: Sequence[dict[str, Any]]) -> tuple[str, str]:
    if not rows:
        return "", ""
    best = max(rows, key=lambda row: row["accuracy_mean"])
    told = f"{100 * best['accuracy_mean']:.1f} ± {100 * best['accuracy_std']:.1f}"
    return told, best["method"]


def main() -> None:
    """Entry point of ``python -m evaluation.reproductions.ma_echo``."""
    prog = "python -m evaluation.reproductions.ma_echo"
    command(MaEchoOptions, lambda options: ma_echo(options, terminal()), prog=prog)


if __name__ == "__main__":
    main()
