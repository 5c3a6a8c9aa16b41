"""Train subsets of weights: `accelerate launch trainers/subsets.py`, read from top to bottom.

Does fixing all but a part of the weights make that part move faster, per step and per second, and
where does it get to? The same network is trained whole and with one mask after another, from its
init and once more from where the whole training has ended; beside it, two networks of half its
channels are trained apart. Processes share the pieces of work; finished ones are kept, so the same
command goes on where it was killed.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import Accelerator, InitProcessGroupKwargs
from rich.console import Console

from evaluation.compare import terminal
from evaluation.methods.ledger import Ledger, gathered
from evaluation.pictures.subsets import subsets_figures
from evaluation.processes import share
from evaluation.side_by_side import fastest
from evaluation.subsets import joined, print_subsets, summary, write_subsets
from evaluation.tracking import track
from metamerge.errors import ConfigError
from trainers.ground import Ground
from trainers.launching import launched, progress_bar
from trainers.subset_runs import (
    CONVERGED,
    HALVES,
    INIT,
    STARTS,
    TIMED,
    Piece,
    Setting,
    Workshop,
)
from zoo.architectures import frozen
from zoo.masks import FULL, INTERACTIONS, Recipe
from zoo.options import parse
from zoo.partial import OPTIMIZERS, Descent
from zoo.recipe import ZooOptions
from zoo.training import chunk_size, init_networks

PLACES = (  # options that decide which rows there are, and not what one holds
    *("out", "tracking", "experiment", "masks", "starts", "halves", "seeds", "together"),
    *("repeats", "timed_steps"),
)
MASKS = (
    *("first", "first-conv", "first-conv+dense", "random", "random@0.25", "random@0.125"),
    *("weak", "strong", "salient", "unsalient", "upper", "lower"),
    *("random-weights", "random-weights@0.125", "salient-weights", "unsalient-weights"),
    *("first~20", "random~20", "weak~20", "random-weights~20"),
)


@dataclass(frozen=True)
class SubsetOptions:
    """Train subsets of the weights of a network, beside all of them."""

    task: str = "digits"  # a data set by name, or your own file; see docs/zoo.md
    data: str | None = None  # folder with the task's files, where it needs some
    out: str = "runs/subsets"  # folder of table and pictures; finished rows lie beside it
    objective: int = 400  # labelled images kept back; a quarter of them are validation images
    architecture: str = "convnet"  # mlp, cnn, convnet, or a factory: package.module:factory
    widths: tuple[int, ...] | None = None  # units or channels per hidden layer
    images: int = 0  # training images of a seed, drawn for each; 0: all that are not kept back
    masks: tuple[str, ...] = MASKS  # family[@share][~period]; see docs/subsets.md
    starts: tuple[str, ...] = STARTS  # init, and converged: from the end of the whole training
    halves: bool = True  # train two networks of half the channels as well
    steps: int = 400  # steps of every training
    batch_size: int = 64  # images per step
    optimizer: str = "adamw"  # adamw, or sgd without momentum
    lr: float = 3e-3  # learning rate at the start, falls to 0
    restart_lr: float = 0.0  # that of trainings from the converged network; 0: the same
    weight_decay: float = 0.0  # decoupled weight decay, of live weights
    interactions: str = "sums"  # of kernels: sums of the Hessian, or norms of its blocks
    curved: int = 128  # training images that the Hessian is taken on
    probes: int = 16  # vectors of random signs for its diagonal
    every: int = 20  # steps between two looks at a network
    timed_steps: int = 0  # steps of two halves in the full network's seconds; 0: as measured
    together: int = 0  # seeds that are trained side by side; 0: as many as fit a core's cache
    repeats: int = 20  # steps of each mask that are timed, the fastest counts
    seeds: int = 5  # trainings of every kind: images, inits and orders of their own
    seed: int = 0  # seed of everything, the parts of the task included
    tracking: bool = True  # log to MLflow
    experiment: str = "metamerge"  # name of the MLflow experiment

    def __post_init__(self) -> None:
        """Refuse options that make no sense.

        Raises:
            ConfigError: Naming the option.
        """
        for name, known in (("optimizer", OPTIMIZERS), ("interactions", INTERACTIONS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}: expected one of {known}, got {getattr(self, name)!r}.")
        for name in ("steps", "batch_size", "every", "probes", "curved", "repeats", "seeds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}.")
        for name in ("images", "restart_lr", "weight_decay", "timed_steps", "together"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}: expected 0 or more, got {getattr(self, name)}.")
        if not self.lr > 0:
            raise ConfigError(f"lr: expected a rate above 0, got {self.lr}.")
        if not self.starts or not set(self.starts) <= set(STARTS):
            raise ConfigError(f"starts: expected some of {STARTS}, got {self.starts}.")
        for name in self.masks:
            Recipe.parse(name)
        _ = self.zoo  # refuses what makes no sense to it

    @property
    def zoo(self) -> ZooOptions:
        """What names the task, its parts and the architecture; it checks what is shared."""
        names = ("task", "data", "objective", "architecture", "widths", "seed")
        return ZooOptions(**{name: getattr(self, name) for name in names})

    @property
    def setting(self) -> Setting:
        """What all runs share."""
        names = ("steps", "batch_size", "lr", "weight_decay", "optimizer")
        descent = Descent(**{name: getattr(self, name) for name in names})
        shared = ("every", "images", "seed", "interactions", "probes", "curved")
        told = {name: getattr(self, name) for name in shared}
        return Setting(descent=descent, restart_lr=self.restart_lr or self.lr, **told)

    @property
    def states(self) -> Path:
        """Folder of what a command that is started again goes on from."""
        return Path(f"{self.out}.state")


def main() -> None:
    """Entry point of ``accelerate launch trainers/subsets.py``."""
    options = parse(SubsetOptions, prog="accelerate launch trainers/subsets.py")
    patience = InitProcessGroupKwargs(timeout=timedelta(days=7))  # pieces differ in their work
    with launched("subsets", kwargs_handlers=[patience]) as accelerator:
        train(options, accelerator)


def train(options: SubsetOptions, accelerator: Accelerator) -> None:
    """All pieces of all processes; then table, pictures and files."""
    console = terminal() if accelerator.is_main_process else Console(quiet=True)
    ground = Ground(options.zoo, accelerator.device)
    if any("running" in key for key in frozen(ground.factory())):
        raise ConfigError("architecture: running statistics would move whatever is fixed.")
    shaping = {k: v for k, v in asdict(options).items() if k not in PLACES}
    shaping |= {"digest": ground.split.task.digest}
    rows = Rows(options.states, shaping, accelerator)
    workshop = Workshop(options.setting, ground, options.states / rows.digest)
    tracking = track(
        f"subsets {options.out}",
        options={**shaping, "out": options.out, "processes": accelerator.num_processes},
        experiment=options.experiment,
        resume=rows.known.get("run", {}).get("id"),
        enabled=options.tracking and accelerator.is_main_process,
    )
    with tracking as tracked:
        if tracked.id:
            rows.add("run", {"id": tracked.id})
        key = f"seconds; {' '.join(options.masks)}"
        if accelerator.is_main_process and key not in rows.known:
            rows.add(key, step_seconds(options, workshop))
        rows.gather()
        seconds = rows.known[key]
        timed = options.timed_steps
        if options.halves and not timed:
            timed = round(options.steps * seconds[FULL] / seconds[HALVES])
        planned = stages(options, seed_groups(options, ground), timed)
        for stage in planned:
            missing = share([piece for piece in stage if piece.name not in rows.known], accelerator)
            with progress_bar(console, "subsets", len(missing), -1) as advance:
                for piece in missing:
                    advance(1, piece.name)
                    rows.add(piece.name, workshop.make(piece))
            rows.gather()
        if accelerator.is_main_process:
            told = (piece for stage in planned for piece in stage if piece.start in options.starts)
            found = [rows.known[piece.name] for piece in told]
            finish(options, found, seconds, ground.split.task.name, tracked, console)
    accelerator.wait_for_everyone()


# ----------------------------------------------------------------------------------------------
# pieces of work


def seed_groups(options: SubsetOptions, ground: Ground) -> list[tuple[int, ...]]:
    """Seeds that are trained side by side."""
    one = init_networks(ground.factory, [0])
    fitting = chunk_size(ground.program, one, ground.inputs, options.batch_size)
    size, seeds = options.together or fitting, range(options.seeds)
    return [tuple(seeds[i : i + size]) for i in range(0, options.seeds, size)]


def stages(
    options: SubsetOptions, groups: Sequence[tuple[int, ...]], timed: int
) -> list[list[Piece]]:
    """Pieces in the order of what they need: whole trainings come before the masks beside them."""
    found = [[Piece(INIT, FULL, group) for group in groups]]
    for start in (start for start in STARTS if start in options.starts):
        if start == CONVERGED:
            found.append([Piece(start, FULL, group) for group in groups])
        masks = [mask for mask in dict.fromkeys(options.masks) if mask != FULL]
        pieces = [Piece(start, mask, group) for group in groups for mask in masks]
        if options.halves and start == INIT:
            pieces += [Piece(start, HALVES, group) for group in groups]
            pieces += [Piece(start, TIMED, group, timed) for group in groups]
        found.append(pieces)
    return found


def step_seconds(options: SubsetOptions, workshop: Workshop) -> dict[str, float]:
    """Seconds of a step of one network with every mask, measured by turns; the draws not counted.

    Masks by the Hessian are timed as random ones, whose tensors have the same shapes.

    Args:
        options: Which masks.
        workshop: What trains them.

    Returns:
        Mask -> seconds.
    """
    masks, works = workshop.masks(INIT, (0,)), {}
    for name in dict.fromkeys((FULL, *options.masks)):
        recipe = Recipe.parse(name)
        if recipe.curved:
            family = "random-weights" if recipe.single else "random"
            recipe = Recipe(name, family, recipe.share)
        still = Recipe(name, recipe.family, recipe.share)
        works[name] = workshop.training(masks, still, INIT, (0,), options.repeats + 1).step
    if options.halves:
        works[HALVES] = workshop.halves((0,), options.repeats + 1).step
    return fastest(works, options.repeats)


class Rows:
    """Finished rows of all processes.

    Args:
        folder: Where they are kept.
        shaping: Options that decide what they hold.
        accelerator: The processes.
    """

    def __init__(self, folder: Path, shaping: dict[str, Any], accelerator: Accelerator) -> None:
        self.folder, self.shaping, self.accelerator = folder, shaping, accelerator
        self.gather()

    @property
    def known(self) -> dict[str, Any]:
        """Key -> row."""
        return self._ledger.rows

    @property
    def digest(self) -> str:
        """Hash of the options."""
        return self._ledger.digest

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Keep a row of this process; others see it once rows are gathered."""
        self._ledger.add(key, row)

    def gather(self) -> None:
        """Wait for all processes, join what they have, read it."""
        path, rank = self.folder / "rows.jsonl", self.accelerator.process_index
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            gathered(path, sorted(self.folder.glob("rows.*.jsonl")))  # of a killed command, too
        self.accelerator.wait_for_everyone()
        own = None if self.accelerator.num_processes == 1 else self.folder / f"rows.{rank}.jsonl"
        self._ledger = Ledger(path, self.shaping, into=own)


# ----------------------------------------------------------------------------------------------
# what is told


def finish(
    options: SubsetOptions,
    rows: Sequence[dict[str, Any]],
    seconds: dict[str, float],
    task: str,
    tracked: Any,
    console: Console,
) -> None:
    """Table, pictures, files, runs in MLflow."""
    if options.halves:
        seconds = {**seconds, TIMED: seconds[HALVES]}
    order = dict.fromkeys((FULL, *options.masks, HALVES, TIMED))
    found = joined(rows, list(order))
    told = {"options": asdict(options), "task": task, "seconds": seconds, "run": tracked.id}
    out, entries = Path(options.out), summary(found, seconds)
    files = write_subsets(out, found, entries, told)
    for name, figure in subsets_figures(found, seconds, title=f"{task}, {options.optimizer}"):
        files.append(out / f"{name}.png")
        figure.savefig(files[-1], dpi=150)
    print_subsets(console, entries, title=f"{task}: subsets of weights, {options.optimizer}")
    console.print(f"[bold]subsets[/] {', '.join(map(str, files))}")
    for file in files:
        tracked.artifact(file)
    for entry in entries:
        named = {key: entry[key] for key in ("start", "mask")}
        numbers = {k: v for k, v in entry.items() if k not in named and v is not None}
        tracked.child(f"{entry['start']}, {entry['mask']}", options=named, metrics=numbers)


if __name__ == "__main__":
    main()
