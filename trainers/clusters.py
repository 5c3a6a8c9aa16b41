"""Train on clusters: `accelerate launch trainers/clusters.py`, read from top to bottom.

The rows of a table are clustered; every step takes one gradient per cluster, and a rule makes one
step of them: their mean, or their sum after Gram-Schmidt. A grid of networks, clusterings, rules
and learning rates is gone through, each cell of it with many independent runs at once. Beside it,
one network per cluster is trained and the networks of a run are merged.

Every run has a split, an init and an order of rows of its own. The epoch of a run and the learning
rate of a rule are chosen on validation rows; test rows are looked at once, at the end of a cell.
Processes share the cells among them. Finished cells are kept: the same command goes on where it
was.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import nn

from evaluation.methods.ledger import Ledger
from evaluation.tracking import Run, track
from metamerge.errors import ConfigError, ZooError
from trainers.cluster_members import members_row
from trainers.cluster_pictures import clusters_figures
from trainers.cluster_runs import CLUSTERINGS, Prepared, prepare, subsample
from trainers.cluster_scores import cluster_scores, row_scores, run_scores, test_outputs
from trainers.cluster_tables import CELL, summary, write_tables
from trainers.launching import launched, progress_bar
from zoo import architectures
from zoo.clustered import row_cross_entropy, row_squared_error, train_clustered
from zoo.combination import RULES, rule_named
from zoo.options import parse
from zoo.splits.clusters import ALGORITHMS
from zoo.splits.coefficients import COEFFICIENTS
from zoo.tasks import Task, load_task
from zoo.tasks.housing import CALIFORNIA, GENERATED_HOUSING
from zoo.training import init_networks

BASELINES = ("plain", "adam")
PLACES = ("out", "tracking", "experiment")  # options that do not shape the result
AXES = (
    "tasks",
    "hidden",
    "clusterings",
    "rules",
    "lr",
)  # those that only say which cells there are


@dataclass(frozen=True)
class ClusterOptions:
    """Train on clusters of a table's rows, with orthogonalised gradients and without."""

    tasks: tuple[str, ...] = ("diabetes", CALIFORNIA)  # names of tasks, or one file of your own
    target: str | None = None  # column to predict, of your own file
    kind: str = "auto"  # auto, classification or regression, for your own file
    drop: tuple[str, ...] = ()  # columns of your own file to leave out
    rows: int = 1000  # rows of a task that are drawn at most; 0 takes all
    hidden: tuple[int, ...] = (1, 3)  # hidden layers
    width: int = 32  # units of a hidden layer
    clusterings: tuple[str, ...] = ("labels", "features", "random")  # what clusters are made of
    clusters: tuple[int, ...] = (2, 3, 4, 5, 6)  # numbers of clusters to choose from
    coefficient: str = "all"  # what chooses: all, silhouette, calinski_harabasz, davies_bouldin
    algorithm: str = "kmeans"  # kmeans, agglomerative, spectral, hdbscan or gmm
    rules: tuple[str, ...] = (  # how gradients become a step; see zoo/combination.py
        *("plain", "increasing", "decreasing", "stretched"),
        *("adam", "adam-increasing"),
    )
    lr: tuple[float, ...] = (0.1, 0.01, 0.001)  # learning rates, constant
    runs: int = 100  # independent runs of every cell
    epochs: int = 40  # passes over the training rows
    steps: int = 10  # steps of an epoch, each on the same share of every cluster
    curriculum: float = 0.0  # share of the epochs over which clusters are admitted one by one
    merged: int = 20  # runs for which one network per cluster is trained and merged; 0 for none
    member_lr: float = 0.01  # AdamW's rate at the start of those networks; falls to 0
    seed: int = 0  # seed of the first run
    out: str = "runs/clusters"  # folder of tables and pictures
    tracking: bool = True  # log to MLflow
    experiment: str = "metamerge"  # name of the MLflow experiment

    def __post_init__(self) -> None:
        """Refuse options that make no sense.

        Raises:
            ConfigError: Naming the option.
        """
        for name in self.rules:
            rule_named(name)
        for name, allowed in (
            ("clusterings", tuple(CLUSTERINGS)),
            ("coefficient", ("all", *COEFFICIENTS)),
            ("algorithm", ALGORITHMS),
        ):
            value = getattr(self, name)
            for own in value if isinstance(value, tuple) else (value,):
                if own not in allowed:
                    raise ConfigError(f"{name}: got {own!r}, expected one of {allowed}.")
        for name in ("hidden", "width", "clusters", "lr", "runs", "epochs", "steps"):
            value = getattr(self, name)
            if min(value if isinstance(value, tuple) else (value,), default=0) <= 0:
                raise ConfigError(f"{name}: expected more than 0, got {value}.")
        if min(self.clusters) < 2:
            raise ConfigError(f"clusters: expected 2 or more, got {self.clusters}.")
        if not 0 <= self.curriculum <= 1:
            raise ConfigError(f"curriculum: expected a share, got {self.curriculum}.")

    @property
    def shaping(self) -> dict[str, Any]:
        """The options that a cell follows from, besides its own place in the grid."""
        return {k: v for k, v in asdict(self).items() if k not in (*PLACES, *AXES, "merged")}


@dataclass(frozen=True)
class Cell:
    """One place of the grid; without a rule, one network per cluster."""

    task: Task
    clustering: str
    hidden: int
    rule: str = ""
    lr: float = 0.0
    merged: int = 0  # one network per cluster: of how many runs
    shared: bool = False  # and whether those of a run start from one init

    @property
    def key(self) -> str:
        """Name in the ledger."""
        place = f"{self.task.name}#{self.task.digest[:8]}/{self.clustering}/{self.hidden}"
        if self.rule:
            return f"{place}/{self.rule}/{self.lr:g}"
        return f"{place}/members/{'shared' if self.shared else 'own'} init/{self.merged}"

    @property
    def about(self) -> dict[str, Any]:
        """Its columns in a table."""
        where = {"task": self.task.name, "hidden": self.hidden, "clustering": self.clustering}
        if self.rule:
            return {**where, "rule": self.rule, "lr": self.lr}
        return {**where, "init": "shared" if self.shared else "own"}


# ----------------------------------------------------------------------------------------------
# data


def read_task(options: ClusterOptions, name: str, console: Console) -> Task:
    """Read and check a table; where California housing cannot be had, the generated one."""
    own = {"target": options.target, "kind": options.kind, "drop": options.drop}
    try:
        task = load_task(name, **own)
    except ZooError as error:
        if name != CALIFORNIA:
            raise
        console.print(f"[bold]clusters[/] {error}\n{GENERATED_HOUSING} is taken instead.")
        task = load_task(GENERATED_HOUSING)
    task = subsample(task, options.rows, options.seed)
    for note in task.notes:
        console.print(f"[bold]clusters[/] {task.name}: {note}")
    return task


def cells_of(options: ClusterOptions, tasks: Sequence[Task]) -> list[Cell]:
    """The grid, such that cells which share their runs lie together."""
    cells = []
    for task in tasks:
        for clustering in options.clusterings:
            for hidden in options.hidden:
                place = (task, clustering, hidden)
                cells += [Cell(*place, rule, lr) for rule in options.rules for lr in options.lr]
                count = min(options.merged, options.runs)
                cells += [Cell(*place, "", 0.0, count, s) for s in (False, True) if count]
    return cells


def networks(options: ClusterOptions, task: Task, hidden: int) -> Callable[[], nn.Module]:
    """What is trained."""
    shape, widths = tuple(task.inputs.shape[1:]), (options.width,) * hidden
    return partial(architectures.build, "mlp", shape, task.outputs, widths=widths)


# ----------------------------------------------------------------------------------------------
# training


def cell_row(options: ClusterOptions, cell: Cell, prepared: Prepared) -> dict[str, Any]:
    """All runs of a cell: train, keep the best epoch of each, score on test rows."""
    clock, work = time.perf_counter(), time.process_time()
    factory = networks(options, cell.task, cell.hidden)
    program = architectures.program_of(factory(), tuple(cell.task.inputs.shape[1:]))
    training = sum(len(own) for own in prepared.runs.clusters[0])
    batch_size = -(-training // options.steps)
    if not cell.rule:
        row = members_row(
            factory,
            program,
            prepared,
            count=cell.merged,
            shared=cell.shared,
            epochs=options.epochs,
            lr=options.member_lr,
            batch_size=max(1, batch_size // prepared.members),
        )
        return {**cell.about, **row, "seconds": time.perf_counter() - clock}
    done = train_clustered(
        program,
        init_networks(factory, prepared.runs.seeds),
        prepared.runs,
        rule=RULES[cell.rule],
        lr=cell.lr,
        epochs=options.epochs,
        batch_size=batch_size,
        loss=row_squared_error if cell.task.regression else row_cross_entropy,
        curriculum=options.curriculum,
    )
    scores = row_scores(test_outputs(program, done.weights, prepared), prepared)
    levels = torch.tensor([0.1, 0.5, 0.9])
    curve = done.validation.nan_to_num(torch.inf).quantile(levels, 0, interpolation="nearest")
    return {
        **cell.about,
        "members": prepared.members,
        "scores": run_scores(scores),
        "per_cluster": cluster_scores(scores, prepared),
        "best_validation": done.validation.nan_to_num(torch.inf).amin(1).tolist(),
        "best_epoch": done.epoch.tolist(),
        "diverged": int((~(done.validation[:, -1] < 10 * done.validation[:, 0])).sum()),
        "agreement": done.agreement.nanmean(1).nan_to_num(0.0).tolist(),
        "curve": curve.nan_to_num(posinf=1e30).tolist(),  # 10 %, median and 90 % of runs
        "training_rows": training,
        "test_rows": prepared.test.shape[1],
        "seconds": time.perf_counter() - clock,
        "cpu_seconds": time.process_time() - work,
    }


def main() -> None:
    """Entry point of ``accelerate launch trainers/clusters.py``."""
    options = parse(ClusterOptions, prog="accelerate launch trainers/clusters.py")
    with launched("clusters") as accelerator:
        train(options, accelerator)


def train(options: ClusterOptions, accelerator: Accelerator) -> None:
    """The whole grid: what is left of it is shared among processes; then tables and pictures."""
    console = Console(quiet=not accelerator.is_main_process)
    out, rank = Path(options.out), accelerator.process_index
    cells = cells_of(options, [read_task(options, name, console) for name in options.tasks])
    ledger = Ledger(out / f"rows-{rank}.jsonl", options.shaping)
    known = finished(out, options)
    left = [cell for cell in cells if cell.key not in known]
    accelerator.wait_for_everyone()  # nobody adds rows before everybody has read them
    if len(left) < len(cells):
        console.print(f"[bold]clusters[/] {len(cells) - len(left)} cells are there already")
    runs = lru_cache(maxsize=1)(partial(prepared_runs, options))
    with (
        track(
            f"clusters {options.out}",
            options={**asdict(options), "processes": accelerator.num_processes},
            experiment=options.experiment,
            resume=known.get("run", {}).get("id"),
            enabled=options.tracking and accelerator.is_main_process,
        ) as tracked,
        progress_bar(console, "clusters", len(cells), len(cells) - len(left)) as advance,
    ):
        if tracked.id:
            ledger.add("run", {"id": tracked.id})
        for place, cell in enumerate(left):
            if place % accelerator.num_processes == rank:
                ledger.add(cell.key, cell_row(options, cell, runs(cell.task, cell.clustering)))
            advance(1, " ".join(map(str, cell.about.values())))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            known = finished(out, options)
            rows = [known[cell.key] for cell in cells]
            finish(options, console, tracked, ledger, rows)


def prepared_runs(options: ClusterOptions, task: Task, clustering: str) -> Prepared:
    """Runs of one task and one clustering, which many cells share."""
    return prepare(
        task,
        clustering,
        runs=options.runs,
        seed=options.seed,
        members=options.clusters,
        coefficient=options.coefficient,
        algorithm=options.algorithm,
    )


def finished(out: Path, options: ClusterOptions) -> dict[str, Any]:
    """Rows of these options that any process of any earlier command has finished."""
    rows: dict[str, Any] = {}
    for path in sorted(out.glob("rows-*.jsonl")):
        rows |= Ledger(path, options.shaping).rows
    return rows


# ----------------------------------------------------------------------------------------------
# small parts


def finish(
    options: ClusterOptions,
    console: Console,
    tracked: Run,
    ledger: Ledger,
    rows: Sequence[dict[str, Any]],
) -> None:
    """Write tables and pictures, print what the rules do at their best learning rates."""
    out = Path(options.out)
    grid = [row for row in rows if "rule" in row]
    members = [row for row in rows if "rule" not in row]
    write_tables(out, grid, members, BASELINES)
    for name, figure in clusters_figures(grid).items():
        figure.savefig(out / f"{name}.png", dpi=150)
        tracked.figure(figure, f"{name}.png")
    for name in ("cells.csv", "chosen.csv", "chosen.md", "members.md"):
        tracked.artifact(out / name)
    text = f"{(out / 'chosen.md').read_text()}\n{(out / 'members.md').read_text()}"
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    spent = [sum(row[name] for row in grid) for name in ("seconds", "cpu_seconds")]
    console.print(
        f"[bold]clusters[/] {len(grid)} cells of {options.runs} runs: {spent[0]:.0f} s, "
        f"{spent[1]:.0f} s of them on a CPU. Tables and pictures: {out}"
    )
    told = ledger.rows.get("tracked", {}).get("cells", [])
    names = ["/".join(f"{row[name]}" for name in CELL) for row in grid]
    for name, row in zip(names, grid, strict=True):
        if tracked.id and name not in told:
            flat = summary(row)
            about = {name: flat.pop(name) for name in (*CELL, "members")}
            tracked.child(name, options=about, metrics=flat)
    if tracked.id:
        ledger.add("tracked", {"cells": names})


if __name__ == "__main__":
    main()
