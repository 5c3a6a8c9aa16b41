"""Pairs of networks that learned the same images from own inits: trained at once, then merged."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from evaluation.methods.settings import official_rows
from evaluation.metrics import accuracy, family_logits
from evaluation.plots import COLOURS
from metamerge.corrections.refit import refit
from metamerge.corrections.repair import repair
from metamerge.registry import bind, get_alignment, list_alignments
from metamerge.structure import Layout, Permutation, Program
from metamerge.weights import Weights
from zoo.architectures import frozen
from zoo.tasks import Task
from zoo.training import init_networks, predict, train_networks

ALIGNMENTS = ("weight_matching", "activation_matching")
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
class Recipe:
    """How members are trained; mergeability depends on all of it.

    Attributes:
        epochs: Passes over all training images.
        batch_size: Images per step.
        lr: AdamW's learning rate at the start; it falls to 0 linearly.
        weight_decay: Decoupled weight decay.
    """

    epochs: float
    batch_size: int
    lr: float
    weight_decay: float


def train_pairs(
    factory: Callable[[], nn.Module],
    program: Program,
    task: Task,
    seeds: Sequence[int],
    recipe: Recipe,
    *,
    images: int = 0,
) -> Weights:
    """Train two networks per seed on all training images, each from an init of its own.

    Args:
        factory: Builds a freshly initialised network.
        program: Its traced program.
        task: What they learn.
        seeds: One per pair.
        recipe: How.
        images: Training images; 0 for all.

    Returns:
        Pairs, every tensor ``[f, 2, ...]``.
    """
    rows = official_rows(task)[0][: images or None]
    networks = [2 * seed + member for seed in seeds for member in (0, 1)]
    trained = train_networks(
        program,
        init_networks(factory, networks),
        task.inputs,
        task.targets,
        [rows] * len(networks),
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        seed=networks,
        frozen=frozen(factory()),
    )
    return {key: t.unflatten(0, (len(seeds), 2)) for key, t in trained.weights.items()}


def merged_scores(
    pairs: Weights, layout: Layout, calibration: Tensor, test: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """Test accuracy of members and of everything that is made of them.

    Args:
        pairs: ``[f, 2, ...]``.
        layout: Their architecture, without batch normalisation.
        calibration: Training images that corrections and activations are measured on.
        test: Inputs and targets that decide.

    Returns:
        Name out of ``NAMES`` -> accuracy of every pair, ``[f]``.
    """
    inputs, targets = test
    scores = {"members": accuracy(family_logits(layout.program, pairs, inputs), targets).mean(1)}
    merged = {"plain": _mean(pairs)}
    for name in (known for known in ALIGNMENTS if known in list_alignments()):
        ending = "" if name == "weight_matching" else "_activations"
        aligned = layout.spec.permute(pairs, _permutation(name, pairs, layout, calibration))
        fused = _mean(aligned)
        merged[f"matched{ending}"] = fused
        merged[f"repaired{ending}"] = repair(fused, aligned, layout, calibration)
        if not ending:
            merged["refitted"] = refit(fused, aligned, layout, calibration)
    for name, weights in merged.items():
        scores[name] = accuracy(predict(layout.program, weights, inputs), targets)
    return scores


def _permutation(name: str, pairs: Weights, layout: Layout, calibration: Tensor) -> Permutation:
    record = get_alignment(name)
    generator = torch.Generator().manual_seed(0)
    at_hand = {"layout": layout, "batches": calibration, "generator": generator}
    return record.function(pairs, layout.spec, **bind(record, at_hand, {}))


def _mean(families: Weights) -> Weights:
    return {key: tensor.mean(1) for key, tensor in families.items()}


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
    out: Path,
    name: str,
    title: str,
    rows: Mapping[int, dict[str, Any]],
    published: Mapping[int, Mapping[str, float]],
    options: Mapping[str, Any],
    *,
    axis: tuple[str, str],
    console: Console,
) -> None:
    """Print ours beside theirs, and write ``<name>.json`` and ``<name>.png``.

    Args:
        out: Folder.
        name: Of the experiment.
        title: Headline.
        rows: Depth or width -> what ``scored_row`` gave.
        published: Depth or width -> name -> accuracy in %.
        options: Of the run, for the JSON file.
        axis: What depth or width is called, in the table and below the picture.
        console: Where to print.
    """
    table = Table(title=title, caption="ours: mean ± std over pairs, test accuracy in %")
    table.add_column("")
    for size in rows:
        table.add_column(f"{axis[0]} {size}\nours", justify="right", no_wrap=True)
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
    _figure(rows, published, axis[1], title).savefig(out / f"{name}.png", dpi=150)
    console.print(f"[bold]{name}[/] {out}/{name}.json, {name}.png")


def _cells(key: str, row: dict[str, Any], published: Mapping[str, float]) -> tuple[str, str]:
    theirs = f"{published[key]:.1f}" if key in published else ""
    if key not in row["mean"]:
        return "", theirs
    return f"{100 * row['mean'][key]:.1f} ± {100 * row['std'][key]:.1f}", theirs


def _figure(
    rows: Mapping[int, dict[str, Any]],
    published: Mapping[int, Mapping[str, float]],
    xlabel: str,
    title: str,
) -> Figure:
    """Ours as lines with their spread, the published figures as crosses of the same colour."""
    figure = Figure(figsize=(8, 4), layout="constrained", facecolor="white")
    axes = figure.subplots()
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
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel("test accuracy in %", fontsize=9)
    axes.set_ylim(0, 100)
    axes.grid(axis="y", linewidth=0.4, alpha=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    figure.legend(fontsize=8, frameon=False, loc="outside right center")
    axes.set_title(title, fontsize=10)
    return figure
