"""Train mutants: `accelerate launch trainers/mutants.py`, read from top to bottom.

All members of a family become one wide network, which starts as their ensemble, is trained on and
pruned back to the width of one member. Beside it, with the same labelled images: merging, votes,
distillation, the best member fine-tuned, networks from scratch. Every process takes families of its
own; rows are kept as they are finished, so the same command goes on where it was killed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs, PartialState
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from evaluation.bench import Bench
from evaluation.compare import terminal
from evaluation.competitors import drawn_images
from evaluation.contestants import Contestant, read_contestants
from evaluation.judged import Judged, open_zoo, zoo_families
from evaluation.leaderboard import write_leaderboard
from evaluation.methods.ledger import Ledger
from evaluation.metrics import common_task
from evaluation.mutant_rows import all_rows, joined, mutant_rows
from evaluation.mutants import Case, Schedule
from evaluation.pictures.mutants import mutants_figure
from evaluation.scored import Scored
from evaluation.tracking import track
from metamerge.errors import ConfigError
from trainers.launching import launched
from zoo.build import build_with_progress
from zoo.options import parse
from zoo.recipe import ZooOptions, factory_for, options_from
from zoo.store import Zoo

PLACES = ("zoo", "merger", "out", "families", "controls", "rows", "tracking", "experiment")
"""Options that do not shape the rows of a family."""
GAP = "largest difference between the mutant and its ensemble"


@dataclass(frozen=True)
class MutantOptions:
    """Fuse families into wide networks, train them on, prune them, compare."""

    zoo: str | None = None  # folder of a zoo; the default digits zoo is built if none is given
    merger: tuple[str, ...] = ()  # folders of trained mergers to compare with
    out: str = "runs/mutants"  # folder of tables and finished rows
    members: int = 0  # members per family; the zoo's largest number if 0
    families: int = 0  # test families; 0: all of the zoo
    images: int = 400  # labelled images, a quarter of them to choose learning rates by
    epochs: float = 30.0  # passes over them at the width of one member
    wide_epochs: float = 10.0  # passes of networks that hold all members
    scratch_epochs: float = 60.0  # passes of a fresh network of the mutant's width; 0: none
    rounds: int = 3  # steps in which a mutant that is pruned on the way gets narrow
    rates: tuple[float, ...] = (1e-3, 3e-3)  # learning rates to choose from
    controls: bool = True  # compare with merging and everything that is no mutant, too
    rows: tuple[str, ...] = ()  # parts of the names of rows that are made; all of them if not given
    seed: int = 0  # seed of images, orders and inits
    tracking: bool = True  # log to MLflow
    experiment: str = "metamerge"  # name of the MLflow experiment

    def __post_init__(self) -> None:
        """Refuse options that make no sense.

        Raises:
            ConfigError: Naming the option.
        """
        for name, least in (("images", 2), ("rounds", 1), ("members", 0), ("families", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: expected at least {least}, got {getattr(self, name)}.")
        for name in ("epochs", "wide_epochs"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}: expected more than 0, got {getattr(self, name)}.")
        if not self.rates or min(self.rates) <= 0 or self.scratch_epochs < 0:
            raise ConfigError(
                f"rates, scratch_epochs: expected learning rates above 0 and passes from 0 on, got "
                f"{self.rates} and {self.scratch_epochs}."
            )

    def schedule(self) -> Schedule:
        """How long everything is trained."""
        lengths = (self.epochs, self.wide_epochs, self.scratch_epochs)
        return Schedule(*lengths, self.rounds, self.rates)


# ----------------------------------------------------------------------------------------------
# data


def open_families(
    options: MutantOptions, contestants: Sequence[Contestant], console: Console
) -> tuple[Zoo, Judged]:
    """The zoo, whose test images no merger may know, and its test families."""
    folder = options.zoo
    if folder is None:
        folder = str(build_with_progress(ZooOptions(), console, PartialState()).folder)
    zoo = open_zoo(folder, contestants, console)
    members = options.members or max(zoo.sizes)
    if members not in zoo.sizes:
        raise ConfigError(f"members: {zoo.folder} has families of {zoo.sizes}, got {members}.")
    judged = zoo_families(zoo, common_task(zoo), members, most=options.families)
    return zoo, replace(judged, training=None)


def make_case(options: MutantOptions, zoo: Zoo, judged: Judged, family: int) -> Case:
    """One family with images of its own draw."""
    bench = Bench(judged.alone(family), options.seed + family, first=family)
    (images,) = drawn_images(bench, "labelled", [options.images], full=False)
    recipe, task = options_from(zoo.options), judged.split.task

    def network(times: float) -> torch.nn.Module:
        return factory_for(recipe, task, times=times)()

    return Case(bench, images.budget, images.data, options.schedule(), network, bench.seed)


# ----------------------------------------------------------------------------------------------
# rows


def family_rows(
    options: MutantOptions,
    case: Case,
    contestants: Sequence[Contestant],
    advance: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Every row of one family: those that are finished from its ledger, the others made now."""
    ledger = _ledger(options, case)
    rows = list(all_rows(case, contestants) if options.controls else mutant_rows(case))
    found, wanted = [], options.rows or ("",)
    if not any(part in row.method for part in wanted for row in rows):
        raise ConfigError(
            f"rows: none has {wanted} in its name; there are {[r.method for r in rows]}."
        )
    for row in (row for row in rows if any(part in row.method for part in wanted)):
        advance(f"family {case.bench.first}: {row.method}")
        key = f"{row.method}; {row.data}; {row.code}"
        if key not in ledger:
            ledger.add(key, row.score().record())
        found.append(ledger.rows[key])
    if GAP not in ledger:
        ledger.add(GAP, {"gap": case.gap})
    return [*found, ledger.rows[GAP]]


def _ledger(options: MutantOptions, case: Case) -> Ledger:
    shaping = {k: v for k, v in asdict(options).items() if k not in PLACES}
    path = Path(options.out) / "families" / f"{case.bench.first}.jsonl"
    return Ledger(path, {**shaping, "judged": case.bench.judged.identity})


def finish(
    options: MutantOptions, zoo: Zoo, families: Sequence[list[dict[str, Any]]], tracked: Any
) -> tuple[list[Scored], float]:
    """Join the families, write the table, log it; all rows, best first, and the largest gap."""
    gap = max(family[-1]["gap"] for family in families)
    columns = zip(*(family[:-1] for family in families), strict=True)
    scored = [joined([Scored.from_record(row) for row in column]) for column in columns]
    scored.sort(key=lambda row: -float(row.accuracies.mean()))
    out, rows = Path(options.out), [row.row() for row in scored]
    meta = {"options": asdict(options), "task": zoo.manifest["task"], "zoo": zoo.digest, "gap": gap}
    write_leaderboard(out, rows, meta)
    title = f"{zoo.manifest['task']['name']}: mutants, and what else the same images make"
    mutants_figure(rows, title=title).savefig(out / "leaderboard.png", dpi=150)
    for row in rows:
        named = {k: row[k] for k in ("method", "members", "data", "control")}
        numbers = {k: row[k] for k in row if k not in named}
        tracked.child(f"{row['method']}, {row['data']}", options=named, metrics=numbers)
    tracked.metrics({"gap": gap})
    for name in ("leaderboard.json", "leaderboard.meta.json", "leaderboard.png"):
        tracked.artifact(out / name)
    return scored, gap


def print_table(console: Console, scored: Sequence[Scored], gap: float) -> None:
    """Accuracy, size and time of every row."""
    count = len(scored[0].accuracies)
    table = Table(
        title=f"test accuracy in %, mean ± std over {count} families of {scored[0].members}",
        caption=f"Controls in italics. {GAP.capitalize()}: {gap:.1e}.",
    )
    for name in ("method", "images"):
        table.add_column(name, no_wrap=True)
    for name in ("%", "parameters", "s"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in scored:
        row = one.row()
        mean, spread = (100 * row[f"accuracy_{k}"] for k in ("mean", "std"))
        numbers = (f"{mean:.1f} ± {spread:.1f}", f"{one.parameters:,}")
        style = "italic" if one.control else None
        table.add_row(one.method, one.data, *numbers, f"{one.seconds:.1f}", style=style)
    console.print(table)


# ----------------------------------------------------------------------------------------------
# the whole


def main() -> None:
    """Entry point of ``accelerate launch trainers/mutants.py``."""
    options = parse(MutantOptions, prog="accelerate launch trainers/mutants.py")
    patience = InitProcessGroupKwargs(timeout=timedelta(days=7))  # families differ in their work
    with launched("mutants", cpu=True, kwargs_handlers=[patience]) as accelerator:
        train(options, accelerator)


def train(options: MutantOptions, accelerator: Accelerator) -> None:
    """All families of all processes, then the table."""
    console = terminal() if accelerator.is_main_process else Console(quiet=True)
    contestants = read_contestants(options.merger) if options.merger else []
    zoo, judged = open_families(options, contestants, console)
    tracking = track(
        f"mutants {options.out}",
        options={**asdict(options), "zoo_digest": zoo.digest},
        experiment=options.experiment,
        enabled=options.tracking and accelerator.is_main_process,
    )
    made = partial(make_case, options, zoo, judged)
    with tracking as tracked:
        with progress_bar(console, len(judged)) as advance:
            for family in range(accelerator.process_index, len(judged), accelerator.num_processes):
                family_rows(options, made(family), contestants, advance)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:  # every row is in a ledger by now
            families = [
                family_rows(options, made(family), contestants, lambda _: None)
                for family in range(len(judged))
            ]
            print_table(console, *finish(options, zoo, families, tracked))
            console.print(f"[bold]mutants[/] {options.out}/leaderboard.json")


@contextmanager
def progress_bar(console: Console, families: int) -> Iterator[Callable[[str], None]]:
    """What is made at the moment; the call that is yielded says what comes next."""
    columns = (SpinnerColumn(), TextColumn("{task.completed} rows,"), TimeElapsedColumn())
    with Progress(
        *columns, TextColumn("{task.description}"), console=console, disable=console.quiet
    ) as bar:
        task = bar.add_task("mutants", total=None, completed=-1)
        yield lambda what: bar.update(
            task, advance=1, description=what.replace("family", f"of {families} families, number")
        )


if __name__ == "__main__":
    main()
