"""Train a merger: `accelerate launch trainers/merger.py`, read from top to bottom.

Zoos of checkpoint families are opened (or one is built), their members are aligned once, and a
merger learns to emit fused weights that score above each family's threshold on objective images.
No member has seen those images, no training sees a test image, and validation families share
neither segments nor inits with training families.
"""

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from rich.console import Console
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from evaluation.metrics import common_task
from evaluation.tracking import Run, track, zoo_datasets
from metamerge.errors import ConfigError
from metamerge.mergers import (
    AutoencoderConfig,
    AutoencoderMerger,
    GNNConfig,
    GNNMerger,
    Merger,
    ThresholdObjective,
    probe_start,
)
from trainers.drawing import Drawing, draw_step, in_parts
from trainers.families import Data, Families, read_data
from trainers.finishing import finish
from trainers.launching import launched, progress_bar
from trainers.outcome import Outcome, restore, snapshot
from trainers.pretraining import pretrain
from trainers.resume import load_state, save_state
from trainers.stepping import Step, take_gradients
from trainers.validating import Goal, validate
from zoo.build import build_with_progress
from zoo.options import parse
from zoo.parts import TaskSplit
from zoo.recipe import PRECISIONS, ZooOptions
from zoo.store import Zoo, load_zoo

KINDS = ("gnn", "autoencoder")
# options that do not shape the result
PLACES = ("out", "tracking", "experiment", "registered", "save_every")


@dataclass(frozen=True)
class MergerOptions:
    """Train a merger on zoos."""

    zoo: tuple[str, ...] = ()  # folders of zoos; the default digits zoo is built if none is given
    out: str = "runs/merger"  # folder of the trained merger; its training state lies beside it
    kind: str = "gnn"  # gnn or autoencoder
    pretrain: int = 0  # autoencoder: steps of reconstructing single members beforehand
    skip: bool = True  # autoencoder: decode relative to the mixture; without, the bottleneck alone
    probes: int = 256  # learned probe inputs of each shape that members are watched on
    spare: int = 0  # objective images beside these that nothing but refining takes its steps on
    width: int = 32  # size of the states of the weight graph's nodes
    rounds: int = 2  # rounds of messages
    prior: int = 5  # side of the smoothing prior on first-layer rows; 0 switches it off
    gate: bool = True  # competence gate: which member knows which class
    labels: bool = True  # whether the objective knows classes; if not, it imitates the soft vote
    consensus: float = 1.0  # weight of the loss of what the gate makes of the members' answers
    reference: str = "ensemble"  # the threshold is relative to: ensemble, best_member or absolute
    margin: float = 0.0  # accuracy above the reference (or the absolute threshold itself)
    headroom: float = 0.05  # accuracy beyond its threshold at which a family has faded half
    softness: float = 0.02  # accuracy over which a family fades out
    target: float = 0.9  # stop when the lower Wilson bound of families above threshold reaches this
    steps: int = 300  # steps at most
    families: int = 16  # families per step, over all processes
    groups: int = 1  # zoos and sizes that share a step and its families, the others wait their turn
    images: int = 512  # objective images per step, at most
    noise: float = 0.5  # noise on objective images, in standard deviations of the inputs
    drop: float = 0.2  # share of steps in which some members are left out
    garbage: float = 0.25  # share of steps in which one member is noise
    calibrated: float = 0.2  # share of steps on objective images in place of probes
    lr: float = 3e-3  # learning rate of AdamW at the start; falls to zero over the steps
    probe_rate: float = 3.0  # of pixels of probes, times lr; 0 leaves them the images they start as
    precision: str = "float32"  # of the fused networks' products in the loss, or bfloat16
    average: float = 0.95  # decay of the running average of parameters; 0 switches it off
    seed: int = 0  # seed of init and batches
    eval_every: int = 25  # steps between two looks at the validation families
    save_every: int = 50  # steps between two saved training states
    tracking: bool = True  # log to MLflow
    experiment: str = "metamerge"  # name of the MLflow experiment
    registered: str | None = None  # name in MLflow's registry that the merger is a new version of

    def __post_init__(self) -> None:
        """Refuse options that make no sense.

        Raises:
            ConfigError: Naming the option.
        """
        self.objective()
        if self.kind not in KINDS:
            raise ConfigError(f"kind: expected one of {KINDS}, got {self.kind!r}.")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision: expected one of {PRECISIONS}, got {self.precision!r}.")
        if self.pretrain and self.kind != "autoencoder":
            raise ConfigError("pretrain: only --kind autoencoder reconstructs its members.")
        for name in ("probes", "width", "steps", "families", "groups", "images", "lr"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}: expected more than 0, got {getattr(self, name)}.")
        if self.prior and self.prior % 2 == 0:
            raise ConfigError(f"prior: expected 0 or an odd number, got {self.prior}.")
        for name in ("probe_rate", "spare"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}: expected 0 or more, got {getattr(self, name)}.")
        for name in ("drop", "garbage", "calibrated", "average"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}: expected 0 to 1, got {getattr(self, name)}.")
        for name in ("eval_every", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}.")

    def objective(self) -> ThresholdObjective:
        """The objective that these options name."""
        return ThresholdObjective(self.reference, self.margin, self.softness, self.headroom)

    def goal(self) -> Goal:
        """What validation families are judged by."""
        return Goal(self.objective(), self.labels, self.families)

    def drawing(self) -> Drawing:
        """How steps are drawn."""
        shares = (self.drop, self.garbage, self.calibrated)
        return Drawing(self.families, self.groups, self.images, self.noise, *shares, self.labels)


# ----------------------------------------------------------------------------------------------
# data


def open_zoos(options: MergerOptions, console: Console) -> list[tuple[Zoo, TaskSplit]]:
    """Zoos and the splits of their tasks."""
    if options.zoo:
        zoos = [load_zoo(folder) for folder in options.zoo]
    else:
        zoos = [build_with_progress(ZooOptions(), console, PartialState())]
    return [(zoo, common_task(zoo)) for zoo in zoos]


def make_merger(options: MergerOptions, groups: Sequence[Families]) -> Merger:
    """A fresh merger whose probes start at objective images, a bank for each shape of input."""
    starts = _starts(options, groups)
    torch.manual_seed(options.seed)
    shared = {
        "probes": options.probes,
        "spare": options.spare,
        "shapes": tuple(starts),
        "width": options.width,
        "rounds": options.rounds,
        "gate": options.gate,
    }
    if options.kind == "autoencoder":
        return AutoencoderMerger(AutoencoderConfig(**shared, skip=options.skip), starts)
    flat = any(x.reads_inputs and x.linear for group in groups for x in group.layout.layers)
    prior = options.prior if flat else 0
    return GNNMerger(GNNConfig(**shared, prior=prior), starts)


def _starts(options: MergerOptions, groups: Sequence[Families]) -> dict[tuple[int, ...], Tensor]:
    """Objective images for the probes and spare probes of each bank."""
    generator, count = torch.Generator().manual_seed(options.seed), options.probes + options.spare
    images: dict[tuple[int, ...], list[Tensor]] = {}
    for group in groups:
        own, new = images.setdefault(tuple(group.images[0].shape[1:]), []), group.images[0].cpu()
        if not any(torch.equal(new, known) for known in own):  # groups of one task share theirs
            own.append(new)
    for shape, own in images.items():
        there = sum(map(len, own))
        if options.spare and count > there:
            raise ConfigError(
                f"spare: {options.probes} probes and {options.spare} spare ones are wanted of "
                f"{there} objective images {shape}. Use up to {max(0, there - options.probes)}."
            )
    return {shape: probe_start(torch.cat(own), count, generator) for shape, own in images.items()}


# ----------------------------------------------------------------------------------------------
# training


def main() -> None:
    """Entry point of ``accelerate launch trainers/merger.py``."""
    options = parse(MergerOptions, prog="accelerate launch trainers/merger.py")
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)  # banks of other shapes
    with launched("merger", kwargs_handlers=[unused]) as accelerator:
        train(options, accelerator)


def train(options: MergerOptions, accelerator: Accelerator) -> None:
    """The whole training: data, merger, loop, gates, files."""
    console = Console(quiet=not accelerator.is_main_process)
    zoos = open_zoos(options, console)
    with ExitStack() as guards:
        for _, split in zoos:
            guards.enter_context(split.training())
        data = read_data(zoos, accelerator.device)
        merger = make_merger(options, data.training)
        outcome, tracked = fit(options, accelerator, console, data, merger, guards)
        if accelerator.is_main_process:
            finish(asdict(options), options.goal(), console, data, outcome, tracked)


def fit(
    options: MergerOptions,
    accelerator: Accelerator,
    console: Console,
    data: Data,
    merger: Merger,
    guards: ExitStack,
) -> tuple[Outcome, Run]:
    """The loop, until the Wilson bound reaches the target or the steps are used up; its run."""
    world, objective, drawing = (
        accelerator.num_processes,
        options.objective(),
        options.drawing(),
    )
    each = drawing.families_of(len(data.training))
    fewest = min(each, *(len(group) for group in data.training))
    if fewest < world:
        raise ConfigError(
            f"families: a step has {fewest} of a kind, one for each of {world} processes is needed."
        )
    states, mark = Path(f"{options.out}.state"), fingerprint(options, data.digests)
    optimizer = torch.optim.AdamW(
        parameter_groups(merger, options.lr, options.probe_rate), weight_decay=0.0
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    if options.pretrain:
        pretrain(merger, data.training, options.pretrain, options.families, options.seed)
    averaged = AveragedModel(merger, multi_avg_fn=get_ema_multi_avg_fn(options.average))
    start, best = restore(merger, averaged, optimizer, load_state(states, mark))
    if start:
        console.print(f"[bold]merger[/] resumed at step {start} of {options.steps}")
    merger, averaged = merger.to(accelerator.device), averaged.to(accelerator.device)
    model = Step(merger, objective, options.consensus, options.precision)
    model, optimizer = accelerator.prepare(model, optimizer)
    clock = time.perf_counter() - best.seconds
    tracking = track(
        f"train {options.out}",
        options={**asdict(options), "processes": world},
        experiment=options.experiment,
        inputs=zoo_datasets(data.zoos, "training"),
        resume=best.run,
        record=f"{options.out}.offline",
        system=True,
        enabled=options.tracking and accelerator.is_main_process,
    )
    tracked = guards.enter_context(tracking)  # open until the merger is judged and written
    with progress_bar(console, "merger", options.steps, start) as advance:
        best.run, text = tracked.id, ""
        for step in range(start, options.steps):
            if best.stopped:
                break
            share = (accelerator.process_index, world)
            batches = draw_step(step, options.seed, data.training, drawing, objective, share)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 - step / options.steps)
            optimizer.zero_grad()
            loss = take_gradients(model, in_parts(batches, options.probes), accelerator)
            accelerator.clip_grad_norm_(merger.parameters(), 1.0)
            optimizer.step()
            averaged.update_parameters(merger)
            done = step + 1
            if done % options.eval_every == 0 or done == options.steps:
                scores = validate(averaged.module, data.validation, options.goal(), accelerator)
                best.consider(averaged.module, scores, done, options.target)
                told = {"loss": float(loss), **scores}
                best.history.append({"step": done, **told})
                tracked.metrics(told, step=done)
                reached = scores["share_above_threshold"]
                text = f"accuracy {scores['validation_accuracy']:.3f}, above {reached:.0%}"
            advance(1, text)
            best.seconds = time.perf_counter() - clock
            due = done % options.save_every == 0 or done == options.steps or best.stopped
            if due and accelerator.is_main_process:
                save_state(states, done, *snapshot(merger, averaged, optimizer, best, mark))
    return best, tracked


# ----------------------------------------------------------------------------------------------
# small parts


def parameter_groups(merger: Merger, lr: float, probe_rate: float) -> list[dict[str, Any]]:
    """Single numbers (refit strength, ridge) learn fastest, pixels of probes at their own rate."""
    fast = [p for name, p in merger.named_parameters() if name in ("strength", "log_ridge")]
    probes = list(merger.probes.parameters())
    named = {id(p) for p in (*fast, *probes)}
    return [
        *([{"params": fast, "lr": 10 * lr}] if fast else []),
        {"params": probes, "lr": probe_rate * lr},
        {"params": [p for p in merger.parameters() if id(p) not in named], "lr": lr},
    ]


def fingerprint(options: MergerOptions, digests: Sequence[str]) -> str:
    """Hash of what shapes the result."""
    shaping = {k: v for k, v in asdict(options).items() if k not in (*PLACES, "zoo")}
    return sha256(json.dumps([shaping, list(digests)], sort_keys=True).encode()).hexdigest()[:16]


if __name__ == "__main__":
    main()
