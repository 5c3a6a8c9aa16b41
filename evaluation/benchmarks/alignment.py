"""How close, how fast, and to what avail are members aligned, beside other people's packages?

``python -m evaluation.benchmarks.alignment`` trains networks on MNIST (``METAMERGE_MNIST``) and
aligns the same members in one run by all our alignments, by ``rebasin``, by ``sinkhorn-rebasin``
(whose package has the same name: an environment of its own is made for it, once, in ``cache``),
and by layer-wise optimal transport written with POT. For all of them our code computes what was
reached: the matching cost (0 for members that are permutations of each other), the distance of a
pair, and the accuracy of the plain average on test images. Seconds are processor time, on one
thread, of the aligning alone, the median of ``repeats``. What is not installed is said.

``value`` is how many times faster ``weight_matching`` is than the faster of ``rebasin`` and
``sinkhorn-rebasin``, the least of all pairs.
"""

import importlib.util
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from evaluation.benchmarks.aligners import (
    Aligner,
    Case,
    own,
    pot_fusion,
    rebasin,
    sinkhorn_environment,
    sinkhorn_rebasin,
)
from metamerge.alignment import matching_cost
from metamerge.registry import list_alignments
from metamerge.structure import Layout, discover_program, run
from metamerge.weights import Weights, stack, unstack
from zoo import architectures
from zoo.options import command
from zoo.tasks import Task, load_task
from zoo.training import init_networks, train_networks

IMAGES = 256  # of the training images, for alignments that look at activations
SLOW = 20.0  # seconds from which on one measurement is enough
OTHERS = ("rebasin", "sinkhorn-rebasin")


@dataclass(frozen=True)
class BenchmarkOptions:
    """Compare alignments on the same trained members."""

    quick: bool = False  # small networks, pairs and K=3 only, no curves
    task: str = "mnist"  # where images come from
    epochs: float = 2.0  # passes over its training images
    only: str = ""  # names of aligners, separated by commas; empty for all
    repeats: int = 5  # measurements of seconds; their median counts
    curves: bool = True  # seconds over width and over K as well
    cache: str = "~/.cache/metamerge/benchmarks"  # folder for the environment of sinkhorn-rebasin
    sinkhorn_python: str = ""  # an interpreter that has sinkhorn-rebasin; empty to make one


@dataclass(frozen=True)
class Setting:
    """One architecture, and the numbers of its members that are aligned."""

    name: str
    architecture: str
    widths: tuple[int, ...]
    counts: tuple[int, ...]


FULL = (
    Setting("MLP 784-256-10", "mlp", (256,), (2,)),
    Setting("MLP 784-400-200-100-10", "mlp", (400, 200, 100), (2, 8)),
    Setting("CNN 16-32-32", "cnn", (16, 32, 32), (2,)),
)
QUICK = (
    Setting("MLP 784-32-10", "mlp", (32,), (2, 3)),
    Setting("CNN 4-8-8", "cnn", (4, 8, 8), (2,)),
)
WIDTHS, NUMBERS, CURVE_WIDTH = (64, 128, 256, 512), (2, 4, 8, 16), 256


def measure(options: BenchmarkOptions) -> None:
    """Measure it, and end with a line of JSON.

    Args:
        options: What is measured.
    """
    torch.set_num_threads(1)
    console = Console(width=None if sys.stdout.isatty() else 130)
    task = load_task(options.task)
    aligners = _aligners(options)
    rows: list[dict[str, Any]] = []
    for setting in QUICK if options.quick else FULL:
        for case in _cases(setting, task, options.epochs):
            found = [_row(name, aligner, case, task, options) for name, aligner in aligners.items()]
            console.print(_table(case, [_unaligned(case, task), *found]))
            rows += found
    details: dict[str, Any] = {"rows": rows, "threads": torch.get_num_threads()}
    if options.curves and not options.quick:
        details["curves"] = _curves(aligners, task, options)
        for title, curve in details["curves"].items():
            console.print(_curve_table(title, curve))
    faster = _times_faster(rows)
    print(
        json.dumps(
            {
                "name": "alignment",
                "value": round(min(faster.values()), 2) if faster else None,
                "unit": "x",
                "against": "the faster of rebasin 0.0.47 and sinkhorn-rebasin 0.0.2, pairs",
                "details": {"times_faster": faster, **details},
            }
        )
    )


def _aligners(options: BenchmarkOptions) -> dict[str, Aligner | str]:
    """Name -> aligner, or the reason why there is none."""
    found: dict[str, Aligner | str] = {name: own(name) for name in list_alignments()}
    there = importlib.util.find_spec("rebasin") is not None
    found["rebasin"] = rebasin if there else "not installed"
    if not options.only or "sinkhorn-rebasin" in options.only:
        found["sinkhorn-rebasin"] = _sinkhorn(options)
    found["pot-fusion"] = pot_fusion
    chosen = [name for name in options.only.split(",") if name] or list(found)
    return {name: found[name] for name in chosen}


def _sinkhorn(options: BenchmarkOptions) -> Aligner | str:
    try:
        folder = Path(options.cache).expanduser() / "sinkhorn-rebasin"
        python = options.sinkhorn_python or sinkhorn_environment(folder)
    except (OSError, RuntimeError) as error:
        return f"not installed: {error}"[:60]
    return sinkhorn_rebasin(Path(python).absolute())


def _cases(setting: Setting, task: Task, epochs: float) -> Iterable[Case]:
    """Members with inits of their own, each trained on a third of the training images."""
    shape = tuple(task.inputs.shape[1:])

    def network() -> torch.nn.Module:
        return architectures.build(setting.architecture, shape, task.classes, widths=setting.widths)

    program = architectures.program_of(network(), shape)
    generator, count = torch.Generator().manual_seed(0), max(setting.counts)
    trained_on = task.test_rows.start  # test images are the last
    rows = [
        torch.randperm(trained_on, generator=generator)[: trained_on // 3] for _ in range(count)
    ]
    weights = train_networks(
        program,
        init_networks(network, range(count)),
        task.inputs,
        task.targets,
        rows,
        epochs=epochs,
        lr=2e-3,
    ).weights
    members = [{k: t.clone() for k, t in member.items()} for member in unstack(weights)]
    layout = Layout(program, discover_program(program))
    for k in setting.counts:
        name = f"{setting.name}, K={k}"
        yield Case(name, network(), layout, members[:k], task.inputs[:IMAGES])


def _row(
    name: str, aligner: Aligner | str, case: Case, task: Task, options: BenchmarkOptions
) -> dict[str, Any]:
    """What one aligner reaches, in how many seconds, or why it does not."""
    row = {"case": case.name, "aligner": name}
    if isinstance(aligner, str):
        return {**row, "why": aligner}
    if name == "sinkhorn-rebasin" and len(case.members) > 2:
        return {**row, "why": "pairs only"}
    try:
        members, seconds = _measured(aligner, case, options.repeats)
    except Exception as error:  # whatever a package raises means that it refuses
        return {**row, "why": f"refused: {error!r}"[:60]}
    return {**row, "seconds": round(seconds, 5), **_reached(members, case, task)}


def _measured(aligner: Aligner, case: Case, repeats: int) -> tuple[list[Weights], float]:
    members, first = aligner(case)
    if first > SLOW:
        return members, first
    return members, median([first, *(aligner(case)[1] for _ in range(repeats - 1))])


def _unaligned(case: Case, task: Task) -> dict[str, Any]:
    return {"aligner": "(as they are)", **_reached(case.members, case, task)}


def _reached(members: list[Weights], case: Case, task: Task) -> dict[str, float]:
    """Matching cost, distance of a pair, and accuracy of the average on test images."""
    spec, family = case.layout.spec, {k: t[None] for k, t in stack(members).items()}
    pair = [torch.cat([t.flatten() for t in weights.values()]) for weights in members[:2]]
    average = {key: tensor.mean(1) for key, tensor in family.items()}
    return {
        "cost": round(float(matching_cost(family, spec, spec.identity())), 6),
        "distance": round(float((pair[0] - pair[1]).norm()), 4),
        "accuracy": _accuracy(case, average, task),
    }


def _accuracy(case: Case, fused: Weights, task: Task) -> float:
    inputs, targets = (t[torch.tensor(task.test_rows)] for t in (task.inputs, task.targets))
    with torch.no_grad():
        right = [
            run(case.layout.program, fused, [images], stacked=True)[0].argmax(-1) == labels
            for images, labels in zip(inputs.split(1000), targets.split(1000), strict=True)
        ]
    return round(float(torch.cat(right).double().mean()), 4)


def _curves(
    aligners: dict[str, Aligner | str], task: Task, options: BenchmarkOptions
) -> dict[str, Any]:
    """Seconds of ``weight_matching`` and of other packages over width and over K."""
    chosen = {n: a for n, a in aligners.items() if n in ("weight_matching", *OTHERS)}
    wide = [Setting(str(width), "mlp", (width,), (2,)) for width in WIDTHS]
    many = Setting(f"784-{CURVE_WIDTH}-10", "mlp", (CURVE_WIDTH,), NUMBERS)
    points: dict[str, Callable[[], Iterable[Case]]] = {
        "pair 784-width-10": lambda: (c for s in wide for c in _cases(s, task, 1.0)),
        f"members of 784-{CURVE_WIDTH}-10": lambda: _cases(many, task, 1.0),
    }
    return {
        title: [_row(n, a, case, task, options) for case in cases() for n, a in chosen.items()]
        for title, cases in points.items()
    }


def _times_faster(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Pair -> seconds of the faster other package over those of ``weight_matching``."""
    faster = {}
    for row in rows:
        others = [
            r["seconds"]
            for r in rows
            if r["case"] == row["case"] and r["aligner"] in OTHERS and "seconds" in r
        ]
        if row["aligner"] == "weight_matching" and row["case"].endswith("K=2") and others:
            faster[row["case"]] = round(min(others) / row["seconds"], 2)
    return faster


def _table(case: Case, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=case.name)
    for column in ("aligner", "matching cost", "distance", "accuracy of the average", "seconds"):
        table.add_column(column, justify="left" if column == "aligner" else "right")
    for row in rows:
        if "why" in row:
            table.add_row(row["aligner"], row["why"])
            continue
        distance = f"{row['distance']:.3f}" if len(case.members) == 2 else ""
        seconds = f"{row['seconds']:.4f}" if "seconds" in row else ""
        cells = (f"{row['cost']:.5f}", distance, f"{row['accuracy']:.2%}", seconds)
        table.add_row(row["aligner"], *cells)
    return table


def _curve_table(title: str, rows: list[dict[str, Any]]) -> Table:
    names = list(dict.fromkeys(row["aligner"] for row in rows))
    table = Table(title=f"Seconds: {title}")
    for column in ("", *names):
        table.add_column(column, justify="right")
    for case in dict.fromkeys(row["case"] for row in rows):
        own_rows = {row["aligner"]: row for row in rows if row["case"] == case}
        cells = [own_rows[name] for name in names]
        table.add_row(case, *(f"{c['seconds']:.4f}" if "seconds" in c else c["why"] for c in cells))
    return table


def main() -> None:
    """Entry point of ``python -m evaluation.benchmarks.alignment``."""
    command(BenchmarkOptions, measure, prog="python -m evaluation.benchmarks.alignment")


if __name__ == "__main__":
    main()
