"""Compare a merger with everything else: ``python -m evaluation.compare``.

Test families and test images appear here and nowhere else. Every way of getting one network from a
family's members is scored beside its controls; the table goes to the terminal, to
``leaderboard.json`` and, row by row, to MLflow.
"""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from evaluation import controls
from evaluation.gates import collapse_gates, forgotten_class_recall
from evaluation.metrics import accuracy, common_task
from evaluation.plots import leaderboard_figure
from evaluation.report import MERGER, Scored, differences, print_leaderboard, write_leaderboard
from evaluation.tracking import track
from metamerge.api import merge
from metamerge.checkpoints import Checkpoint
from metamerge.errors import ConfigError
from metamerge.mergers import GNNMerger, load_merger, read_card
from metamerge.weights import Weights, stack, unstack
from zoo.architectures import frozen
from zoo.build import build_with_progress
from zoo.options import command
from zoo.parts import TaskSplit
from zoo.recipe import factory_for, options_from
from zoo.store import Zoo, load_zoo
from zoo.training import predict

SCRATCH_SEED = 2**62  # inits of controls: beyond those of any zoo
HELD_BACK = ("task", "seed", "objective")  # options that decide which images a merger never saw


@dataclass(frozen=True)
class CompareOptions:
    """Compare a trained merger with averages, ensembles, distillation and plain training."""

    merger: str = "runs/merger"  # folder of the trained merger
    zoo: str | None = None  # folder of the zoo; the merger's own if not given
    out: str = "runs/compare"  # folder of leaderboard.json and its picture
    members: tuple[int, ...] = ()  # numbers of members to compare at; all of the zoo if not given
    seed: int = 0  # seed of everything random in the methods
    tracking: bool = True  # log every row to MLflow
    experiment: str = "metamerge"  # name of the MLflow experiment


class Bench:
    """Everything that is needed to score one size of family."""

    def __init__(
        self, zoo: Zoo, split: TaskSplit, members: int, merger: GNNMerger, seed: int
    ) -> None:
        self.layout, self.options, self.members = zoo.layout, options_from(zoo.options), members
        self.zoo, self.split, self.merger, self.seed = zoo, split, merger, seed
        self.families = zoo.families("test", members)  # [f, m, ...]
        self.count = next(iter(self.families.values())).shape[0]
        still = tuple(frozen(self.network()))
        self.budget = controls.Budget(split.images("objective"), split.images("validation"), still)
        self.images = len(self.budget.everything[1])
        sizes = [t[0, 0].numel() for t in self.families.values() if t.is_floating_point()]
        self.parameters = sum(sizes)
        self.sources = [self._checkpoints(family) for family in range(self.count)]

    def network(self) -> nn.Module:
        """A fresh network of the families' architecture."""
        return factory_for(self.options, self.split.task)()

    def _checkpoints(self, family: int) -> list[Checkpoint]:
        address = self.zoo.address("test", self.members, family)
        members = unstack({key: t[family] for key, t in self.families.items()})
        return [
            Checkpoint(f"{address}/{m}", weights, self.zoo.manifest["program"])
            for m, weights in enumerate(members)
        ]

    def merge(self, **arguments: Any) -> Weights:
        """Merge every family through the public interface, ``[f, ...]``."""
        fused = [merge(own, seed=self.seed, device="cpu", **arguments) for own in self.sources]
        return stack([merged.weights for merged in fused])

    def timed(
        self, name: str, data: str, make: Callable[[], Weights], *, control: bool
    ) -> list[Scored]:
        """Make networks ``[f, ...]`` and score them on the test images."""
        clock = time.perf_counter()
        weights = make()
        seconds = (time.perf_counter() - clock) / self.count
        inputs, targets = self.split.images("test")
        found = accuracy(predict(self.layout.program, weights, inputs), targets)
        return [Scored(name, self.members, data, found, seconds, self.parameters, control)]

    def voted(self) -> list[Scored]:
        """The ensembles, which keep all members."""
        inputs, targets = self.split.images("test")
        clock = time.perf_counter()
        chosen = controls.votes(self.families, self.layout, inputs)
        seconds = (time.perf_counter() - clock) / self.count
        names = {"soft_vote": "soft-vote ensemble", "majority_vote": "majority-vote ensemble"}
        return [
            Scored(
                names[key],
                self.members,
                "none",
                (classes == targets).float().mean(1),
                seconds,
                self.members * self.parameters,
                True,
            )
            for key, classes in chosen.items()
        ]

    def judged(self) -> tuple[Any, ...]:
        """What gates want: merger, families, layout, and images that are not the test images."""

        def merged(members: Weights) -> Weights:
            return self.merger(members, self.layout)

        return merged, self.families, self.layout, *self.split.images("validation")

    def union_rows(self) -> list[Tensor]:
        """Rows of each family's segments, without repeats."""
        rows = self.zoo.rows("test", self.members)  # [f, m, longest]
        return [own[own >= 0].unique().long() for own in rows]


def methods(bench: Bench) -> Iterator[Callable[[], list[Scored]]]:
    """Every merge method of the comparison, each a call that scores it."""
    labelled = bench.budget.everything
    unlabelled = labelled[0]
    u, lab = f"unlabelled:{bench.images}", f"labelled:{bench.images}"
    plain = {"method": "average", "align": None}
    aligned = {"method": "average", "align": "weight_matching"}
    bare = _without_residual(bench.merger)
    table: list[tuple[str, str, dict[str, Any]]] = [
        (MERGER, "none", {"method": "gnn", "merger": bench.merger}),
        (f"{MERGER}, no residual, no prior", "none", {"method": "gnn", "merger": bare}),
        (
            f"{MERGER}, calibrated",
            u,
            {"method": "gnn", "merger": bench.merger, "batches": unlabelled},
        ),
        ("average", "none", plain),
        ("average, aligned", "none", aligned),
        ("average, aligned + repair", u, {**aligned, "correct": "repair", "batches": unlabelled}),
        ("average, aligned + refit", u, {**aligned, "correct": "refit", "batches": unlabelled}),
        ("rank average, aligned", lab, {"method": "rank_average", "batches": labelled}),
        ("cluster, all", "none", {"method": "cluster", "keep": "all"}),
        ("cluster, best", lab, {"method": "cluster", "keep": "best", "batches": labelled}),
    ]
    for name, data, arguments in table:
        if arguments["method"] == "cluster" and bench.members < 3:
            continue  # two members have no clusters to speak of
        yield partial(bench.timed, name, data, partial(bench.merge, **arguments), control=False)
    yield partial(
        bench.timed,
        f"{MERGER}, then fine-tuned",
        lab,
        lambda: controls.fine_tuned(
            bench.merge(method="gnn", merger=bench.merger), bench.layout, bench.budget
        )[0],
        control=False,
    )


def control_calls(bench: Bench) -> Iterator[Callable[[], list[Scored]]]:
    """Every control, each a call that scores it."""
    u, lab = f"unlabelled:{bench.images}", f"labelled:{bench.images}"
    families, layout, budget = bench.families, bench.layout, bench.budget
    seeds = [SCRATCH_SEED + f for f in range(bench.count)]
    best = controls.best_members(families, layout, budget)
    average = controls.aligned_average(families, layout)

    timed = partial(partial, bench.timed, control=True)

    yield bench.voted
    yield timed("best member", lab, lambda: controls.best_members(families, layout, budget))
    yield timed(
        "distilled from best member",
        u,
        lambda: controls.distilled(best, families, layout, budget)[0],
    )
    yield timed(
        "distilled from aligned average",
        u,
        lambda: controls.distilled(average, families, layout, budget)[0],
    )
    yield timed(
        "best member, fine-tuned", lab, lambda: controls.fine_tuned(best, layout, budget)[0]
    )
    yield timed(
        "trained from scratch",
        lab,
        lambda: controls.from_scratch(bench.network, seeds, layout, budget)[0],
    )
    yield timed(
        "trained on all segments (ceiling)",
        "segments",
        lambda: controls.on_union(
            bench.network,
            seeds,
            layout,
            (bench.split.task.inputs, bench.split.task.targets),
            bench.union_rows(),
            epochs=bench.options.epochs,
            batch_size=bench.options.batch_size,
            lr=bench.options.lr,
        ),
    )


def compare(options: CompareOptions, console: Console) -> list[dict[str, Any]]:
    """Score everything, print the table, write the files, log the rows.

    Args:
        options: What to compare.
        console: Where to print.

    Returns:
        The rows of ``leaderboard.json``.

    Raises:
        ConfigError: If merger and zoo do not belong together.
    """
    merger, card = load_merger(options.merger), read_card(options.merger)
    zoo = _zoo(options, card, console)
    sizes = tuple(dict.fromkeys(options.members)) or zoo.sizes
    unknown = sorted(set(sizes) - set(zoo.sizes))
    if unknown:
        raise ConfigError(
            f"members: the zoo {zoo.folder} has families of {zoo.sizes}, got {unknown}."
        )
    split = common_task(zoo)
    with track(
        f"compare {zoo.manifest['task']['name']}",
        options={**asdict(options), "zoo_digest": zoo.digest},
        experiment=options.experiment,
        enabled=options.tracking,
    ) as tracked:
        benches = [Bench(zoo, split, size, merger, options.seed) for size in sizes]
        calls = [call for b in benches for call in (*methods(b), *control_calls(b))]
        scored: list[Scored] = []
        with _progress(console, len(calls)) as advance:
            for call in calls:
                scored += call()
                advance()
        gates = {f"k{b.members}": _gates(b) for b in benches}
        recall = {
            f"k{b.members}": forgotten_class_recall(*b.judged(), seed=b.seed) for b in benches
        }
        scored.sort(key=lambda s: -float(s.accuracies.mean()))
        rows = [s.row() for s in scored]
        meta = _meta(options, zoo, split, card, scored, gates, recall)
        out = Path(options.out)
        write_leaderboard(out, rows, meta)
        figure = leaderboard_figure(
            rows, title=f"{zoo.manifest['task']['name']}: accuracy on test images"
        )
        figure.savefig(out / "leaderboard.png", dpi=150)
        for row in rows:
            named = {k: row[k] for k in ("method", "members", "data", "control")}
            numbers = {k: row[k] for k in row if k not in named}
            tracked.child(f"{row['method']} K={row['members']}", options=named, metrics=numbers)
        tracked.metrics(_summary(rows))
        for name in ("leaderboard.json", "leaderboard.meta.json", "leaderboard.png"):
            tracked.artifact(out / name)
    print_leaderboard(console, rows, meta, sizes)
    console.print(
        f"[bold]compare[/] {out}/leaderboard.json, leaderboard.meta.json, leaderboard.png"
    )
    return rows


def _zoo(options: CompareOptions, card: dict[str, Any], console: Console) -> Zoo:
    told = card["zoo"]["options"]
    if not options.zoo:
        return build_with_progress(options_from(told), console)
    zoo = load_zoo(options.zoo)
    differ = [name for name in HELD_BACK if zoo.options[name] != told[name]]
    if differ:
        raise ConfigError(
            f"zoo: {zoo.folder} differs from the merger's zoo in {', '.join(differ)}, so its test "
            "images may be among those that the merger was trained on. Build one with the same."
        )
    return zoo


def _without_residual(merger: GNNMerger) -> GNNMerger:
    """The same merger with its residual and its input prior at zero."""
    bare = copy.deepcopy(merger)
    with torch.no_grad():
        for name, parameter in bare.named_parameters():
            if name.startswith(("row_factor.", "prior")):
                parameter.zero_()
    return bare


def _gates(bench: Bench) -> list[dict[str, Any]]:
    gates = collapse_gates(*bench.judged(), seed=bench.seed)
    return [{**asdict(gate), "passed": gate.passed} for gate in gates]


def _meta(
    options: CompareOptions,
    zoo: Zoo,
    split: TaskSplit,
    card: dict[str, Any],
    scored: Sequence[Scored],
    gates: dict[str, list[dict[str, Any]]],
    recall: dict[str, float],
) -> dict[str, Any]:
    return {
        "task": zoo.manifest["task"],
        "zoo": {"folder": str(zoo.folder), "digest": zoo.digest, "options": zoo.options},
        "images": {
            part: len(split.rows(part)) for part in ("segments", "objective", "validation", "test")
        },
        "seeds": {
            "zoo": zoo.options["seed"],
            "merger": card["options"]["seed"],
            "compare": options.seed,
        },
        "merger": {"folder": options.merger, "card": card},
        "protocol": {
            "data": "what a method used at merge time; the merger was trained once, before, on the "
            "labelled objective images, and saw none of the test families",
            "controls": f"learning rate from {controls.RATES} chosen on validation images, then "
            "trained on objective and validation images together",
        },
        "differences": differences(scored),
        "gates": gates,
        "forgotten_class_recall": recall,
    }


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The merger's own figures, for the parent run."""
    return {
        f"{MERGER}_accuracy_k{row['members']}": row["accuracy_mean"]
        for row in rows
        if row["method"] == MERGER
    }


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[], None]]:
    columns = (TextColumn("compare"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=console.quiet) as bar:
        task = bar.add_task("compare", total=total)
        yield lambda: bar.advance(task)


def terminal() -> Console:
    """A console wide enough for the table where the output is a file or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 120))


def main() -> None:
    """Entry point of ``python -m evaluation.compare``."""
    prog = "python -m evaluation.compare"
    command(CompareOptions, lambda options: compare(options, terminal()), prog=prog)


if __name__ == "__main__":
    main()
