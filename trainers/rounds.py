"""Train in rounds: `accelerate launch trainers/rounds.py`, read from top to bottom.

Every round each member trains on its own segment, all members are merged by any method of
``merge()``, an outer optimiser decides where they go on from, and that is sent back to them. Beside
it one network is trained on the union of the segments, with as many passes over the images.
"""

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console

from evaluation.methods.ledger import Ledger
from evaluation.rounds import by_members, print_rounds, summary, write_rounds
from evaluation.tracking import Run, track
from metamerge.api import merge
from metamerge.checkpoints import Checkpoint, save_checkpoint
from metamerge.errors import ConfigError
from metamerge.outer import OUTER, Position, averaging
from metamerge.registry import get_method
from metamerge.weights import Weights, unstack
from trainers.ground import Course, Ground
from trainers.launching import launched, progress_bar
from trainers.learners import Learners, Stint, distances, work
from trainers.resume import load_state, save_state
from trainers.sharing import agreed, everyone, own_members
from trainers.standing import Standing
from zoo.adam import Moments
from zoo.options import parse
from zoo.recipe import ZooOptions

PLACES = ("out", "tracking", "experiment", "save_every")  # options that do not shape the result
JUDGED = ("validation", "test")  # numbers of every round that go to MLflow
SCHEDULES = ("linear", "constant", "round")


@dataclass(frozen=True)
class RoundsOptions:
    """Train segments in rounds: apart, merged, and on from there, beside training on the union."""

    task: str = "digits"  # a data set by name, or your own file; see docs/zoo.md
    data: str | None = None  # folder with the task's files, where it needs some
    out: str = "runs/rounds"  # folder of networks, table and picture; the state lies beside it
    objective: int = 400  # labelled images kept back for merging, a quarter of them for validation
    architecture: str = "mlp"  # mlp, cnn, convnet, resnet8, resnet20, or package.module:factory
    widths: tuple[int, ...] | None = None  # units or channels per hidden layer
    split: str = "disjoint"  # how segments are cut: see docs/zoo.md
    alpha: float = 0.3  # skew of dirichlet and quantity, the smaller the stronger
    segment_size: int = 0  # images per segment; 0 deals every image to exactly one member
    members: tuple[int, ...] = (10,)  # segments; a training of its own for every number
    init: str = "shared"  # shared: all members start from one network; own: each from its own
    augment: tuple[str, ...] = ()  # flip, shift=2, noise=0.1: images are changed anew every time
    rounds: int = 20  # rounds at most
    epochs: float = 1.0  # passes of a member over its segment in the first round
    growth: float = 0.0  # passes that every round has more than the one before
    divergence: float = 0.0  # a member stops so many norms of its start away from it; 0: never
    batch_size: int = 32  # images per step
    lr: tuple[float, ...] = (1e-3,)  # AdamW's rate; of several the best on validation images counts
    schedule: str = "linear"  # of the rate: linear or constant over all rounds, or down every round
    weight_decay: float = 0.0  # decoupled weight decay
    moments: str = "reset"  # what AdamW remembers from round to round: reset or kept
    method: str = "average"  # how members are merged: any name of metamerge.list_methods()
    align: tuple[str, ...] = ("default",)  # alignments, one after the other; none for no alignment
    correct: tuple[str, ...] = ()  # corrections of the merged network, such as refit
    merger: str | None = None  # folder of a trained merger, for learned methods
    images: int = 0  # objective images that every merge may use
    labels: bool = False  # whether it may use their labels, too
    outer: str = "averaging"  # averaging, nesterov, elastic_averaging or soft_weight_sharing
    outer_lr: float = 0.7  # nesterov: learning rate of the centre
    momentum: float = 0.9  # nesterov: of the centre
    pull: float = 0.9  # elastic_averaging and soft_weight_sharing: towards the centre
    threshold: float = 0.0  # stop at this accuracy on validation images; 0 makes all rounds
    union: bool = True  # whether to train on the union of the segments as well
    seeds: int = 3  # trainings of every kind: segments, inits and orders of their own
    seed: int = 0  # seed of everything, the parts of the task included
    save_every: int = 5  # rounds between two saved states
    tracking: bool = True  # log to MLflow
    experiment: str = "metamerge"  # name of the MLflow experiment

    def __post_init__(self) -> None:
        """Refuse options that make no sense.

        Raises:
            ConfigError: Naming the option.
        """
        choices = {
            "schedule": SCHEDULES,
            "moments": ("reset", "kept"),
            "outer": tuple(OUTER),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}: expected one of {known}, got {getattr(self, name)!r}.")
        for name in ("rounds", "seeds", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}.")
        for name in ("growth", "divergence", "images"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}: expected 0 or more, got {getattr(self, name)}.")
        if not 0 <= self.threshold < 1:
            raise ConfigError(f"threshold: expected 0 to 1, got {self.threshold}.")
        if not self.lr or not min(self.lr) > 0:
            raise ConfigError(f"lr: expected rates above 0, got {self.lr}.")
        if self.correct and not self.images:
            raise ConfigError(f"correct: {' '.join(self.correct)} needs inputs: give --images.")
        get_method(self.method)
        _ = self.zoo  # refuses what makes no sense to it

    @property
    def zoo(self) -> ZooOptions:
        """What a zoo of such segments and networks would be built by; it checks what is shared."""
        names = ("task", "data", "objective", "architecture", "widths", "split", "segment_size")
        names = (*names, "init", "augment", "batch_size", "weight_decay", "seed")
        same = {name: getattr(self, name) for name in names}
        return ZooOptions(**same, alpha=self.alpha, epochs=self.epochs, members=self.members)

    @property
    def alignment(self) -> str | list[str] | None:
        """What ``merge()`` takes as ``align``."""
        if self.align in (("default",), ("none",), ()):
            return "default" if self.align == ("default",) else None
        return list(self.align)

    @property
    def aligned(self) -> bool:
        """Whether units change their order in a merge."""
        wanted = get_method(self.method).align if self.alignment == "default" else self.alignment
        return wanted is not None

    @property
    def outer_optimiser(self) -> Callable[[Position, Weights], Position]:
        """The outer optimiser with its options."""
        told = {
            "averaging": {},
            "nesterov": {"lr": self.outer_lr, "momentum": self.momentum},
            "elastic_averaging": {"pull": self.pull},
            "soft_weight_sharing": {"pull": self.pull},
        }
        return partial(OUTER[self.outer], **told[self.outer])

    @property
    def states(self) -> Path:
        """Folder of what a command that is started again goes on from."""
        return Path(f"{self.out}.state")

    def passes(self, number: int) -> float:
        """Passes over its segment that a member may make in a round."""
        return self.epochs + self.growth * number

    def stint(self, number: int, lr: float) -> Stint:
        """What members do in a round; a linear rate falls with the passes, not the rounds."""
        before = [self.passes(i) for i in range(self.rounds)]
        ends = [1 - sum(before[:i]) / sum(before) for i in (number, number + 1)]
        ends = {"linear": ends, "constant": [1.0, 1.0], "round": [1.0, 0.0]}[self.schedule]
        return Stint(number, self.passes(number), lr * ends[0], lr * ends[1], self.divergence)


# ----------------------------------------------------------------------------------------------
# training


def main() -> None:
    """Entry point of ``accelerate launch trainers/rounds.py``."""
    options = parse(RoundsOptions, prog="accelerate launch trainers/rounds.py")
    with launched("rounds") as accelerator:
        train(options, accelerator)


@dataclass(frozen=True, eq=False)
class Common:
    """What all courses of one command share."""

    options: RoundsOptions
    ground: Ground
    batches: Any  # objective images that merges may use
    digest: str  # of everything that shapes the results
    accelerator: Accelerator
    tracked: Run
    advance: Callable[..., None]  # the bar


def train(options: RoundsOptions, accelerator: Accelerator) -> None:
    """All courses, finished ones from the ledger; then table, picture and files."""
    console = Console(quiet=not accelerator.is_main_process)
    ground = Ground(options.zoo, accelerator.device)
    shaping = {k: v for k, v in asdict(options).items() if k not in PLACES}
    shaping |= {"digest": ground.split.task.digest}
    ledger = Ledger(options.states / "rows.jsonl", shaping)
    accelerator.wait_for_everyone()  # nobody adds rows before everybody has read them
    courses = [
        Course(members, seed, lr)
        for members in options.members
        for seed in range(options.seeds)
        for lr in options.lr
    ]
    tracking = track(
        f"rounds {options.out}",
        options={**shaping, "out": options.out, "processes": accelerator.num_processes},
        experiment=options.experiment,
        resume=ledger.rows.get("run", {}).get("id"),
        enabled=options.tracking and accelerator.is_main_process,
    )
    total = len(courses) * options.rounds * (1 + options.union)
    with tracking as tracked, progress_bar(console, "rounds", total) as advance:
        if tracked.id:
            ledger.add("run", {"id": tracked.id})
        batches = ground.calibration(options.images, labels=options.labels)
        common = Common(options, ground, batches, ledger.digest, accelerator, tracked, advance)

        def row_of(course: Course) -> dict[str, Any]:
            known = ledger.rows.get(course.name)
            row = known or run_course(common, course)
            if known:
                advance(options.rounds)
            elif accelerator.is_main_process:
                ledger.add(course.name, row)
                shutil.rmtree(options.states / course.name, ignore_errors=True)
            return dict(row)

        unions: dict[tuple[Any, ...], dict[str, Any]] = {}

        def union_of(course: Course) -> dict[str, Any]:
            images = ground.segments(course)[0].rows[0]
            key = (course.seed, course.lr, course.passes, images.numpy().tobytes())
            if key in unions:  # however many members share these images
                advance(options.rounds)
            else:
                unions[key] = row_of(course)
            return unions[key]

        rows = []
        for course in courses:
            row = row_of(course)
            if options.union:
                row["union"] = union_of(replace(course, passes=passes_over_union(options, row)))
            rows.append(row)
        if accelerator.is_main_process:
            told = {"options": asdict(options), "task": ground.split.task.name, "run": tracked.id}
            written = write_rounds(Path(options.out), rows, told)
            series = {f"K = {members}": own for members, own in by_members(rows).items()}
            print_rounds(console, series, told["task"])
            console.print(f"[bold]rounds[/] {', '.join(map(str, written))}")
            for file in written:
                tracked.artifact(file)
            for entry in summary(rows):
                known = {name: value for name, value in entry.items() if value is not None}
                tracked.child(f"K = {entry['members']}", metrics=known)
    accelerator.wait_for_everyone()


def run_course(common: Common, course: Course) -> dict[str, Any]:
    """The loop: rounds until the threshold is reached, or all of them are made."""
    options, ground, accelerator = common.options, common.ground, common.accelerator
    learners, start = ground.segments(course)
    states, mark = options.states / course.name, f"{common.digest}/{course.name}"
    standing = Standing(start, shared=options.init == "shared" or bool(course.passes))
    standing.restore(load_state(states, mark))
    accelerator.wait_for_everyone()  # nobody saves a state before everybody has read the last
    common.advance(standing.rounds)
    rounds = len(course.passes) or options.rounds
    clock = time.perf_counter() - standing.seconds
    while standing.rounds < rounds and not standing.stopped:
        with ground.split.training():
            told = play_round(common, course, learners, standing)
        if accelerator.is_main_process:  # a report: nothing depends on it
            told["test"] = float(ground.accuracy(one_network(standing.position.centre), "test"))
        standing.note(told, 0.0 if course.passes else options.threshold)
        standing.seconds = time.perf_counter() - clock
        over = standing.stopped or standing.rounds == rounds
        if accelerator.is_main_process and (over or standing.rounds % options.save_every == 0):
            save_state(states, standing.rounds, *standing.snapshot(mark))
        told = {f"{course.name}/{part}": told[part] for part in JUDGED if part in told}
        common.tracked.metrics(told, step=standing.rounds)
        common.advance(1, f"{course.name}/validation {told[f'{course.name}/validation']:.3f}")
    common.advance(options.rounds - standing.rounds)
    if accelerator.is_main_process:
        save_checkpoint(
            standing.position.centre,
            Path(options.out) / course.name,
            program=ground.program.to_json(),
            metadata={"options": asdict(options), "course": asdict(course)},
            overwrite=True,
        )
    size = sum(t.numel() * t.element_size() for t in standing.position.centre.values())
    return {
        **asdict(course),
        "images": sum(map(len, learners.rows)),
        "bytes_per_round": 2 * course.members * size,  # everybody sends a network and gets one
        "curve": standing.curve,
        "stopped": standing.stopped,
        "seconds": round(standing.seconds, 2),
    }


def play_round(
    common: Common, course: Course, learners: Learners, standing: Standing
) -> dict[str, float]:
    """One round: train apart, collect, merge, let the outer optimiser decide, judge."""
    options, ground, accelerator = common.options, common.ground, common.accelerator
    count = len(learners.rows)
    own, start = list(own_members(count, accelerator)), standing.start
    stint, outer = options.stint(standing.rounds, course.lr), options.outer_optimiser
    kept = options.moments == "kept"
    if course.passes:  # one network on the union goes on as if there were no rounds
        stint = replace(stint, epochs=course.passes[standing.rounds], divergence=0.0)
        outer, kept = averaging, True
    moments = standing.moments.only(own) if standing.moments else None
    worked = work(learners.only(own), {k: t[own] for k, t in start.items()}, moments, stint)

    trained = everyone(worked.weights, count, accelerator)
    numbers = {"images": worked.images, "steps": worked.moments.steps}
    numbers = everyone(numbers, count, accelerator)
    moments = None
    if kept:
        first, second = (everyone(m, count, accelerator) for m in worked.moments[:2])
        moments = Moments(first, second, numbers["steps"])

    merged = agreed(merged_members(common, learners, trained, standing.rounds), accelerator)
    ordered = options.aligned and count > 1 and (kept or options.outer != "averaging")
    standing.go_on(trained, merged, moments, outer, ground.layout.spec if ordered else None)

    networks = {k: torch.cat([standing.position.centre[k][None], t]) for k, t in trained.items()}
    scores = {"scores": ground.accuracy(networks, "validation")}  # of the centre, of the members
    scores = agreed(scores, accelerator)["scores"].tolist()
    return {
        "images": int(numbers["images"].sum()),
        "validation": scores[0],
        "members": sum(scores[1:]) / count,
        "distance": float(distances(trained, start).mean()),
    }


def merged_members(common: Common, learners: Learners, trained: Weights, number: int) -> Weights:
    """What ``merge()`` makes of all members."""
    options, program = common.options, common.ground.program.to_json()
    sources = [Checkpoint(f"segment {k}", w, program) for k, w in enumerate(unstack(trained))]
    sizes = [len(own) for own in learners.rows]
    known = get_method(options.method).options
    return merge(
        sources,
        method=options.method,
        align=options.alignment,
        correct=list(options.correct) or None,
        merger=options.merger,
        batches=common.batches,
        seed=options.seed + number,
        **({"coefficients": sizes} if "coefficients" in known else {}),
    ).weights


# ----------------------------------------------------------------------------------------------
# small parts


def passes_over_union(options: RoundsOptions, row: Mapping[str, Any]) -> tuple[float, ...]:
    """Passes over the union in every round: as many images as all members together have seen."""
    images = row["curve"]["images"]
    if options.divergence:
        return tuple(seen / row["images"] for seen in images)
    return tuple(options.passes(number) for number in range(len(images)))


def one_network(weights: Weights) -> Weights:
    """A stack of one, ``[1, ...]``."""
    return {key: tensor[None] for key, tensor in weights.items()}


if __name__ == "__main__":
    main()
