"""Train a merger: `accelerate launch trainers/merger.py`, read from top to bottom.

A zoo of checkpoint families is opened (or built), its members are aligned once, and a graph-network
merger learns to emit fused weights that score above each family's threshold on objective images. No
member has seen those images, no training sees a test image, and validation families share neither
segments nor inits with training families.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from evaluation.gates import collapse_gates
from evaluation.metrics import accuracy, common_task
from evaluation.tracking import track
from metamerge.errors import ConfigError, MetaMergeError
from metamerge.mergers import (
    GNNConfig,
    GNNMerger,
    ThresholdObjective,
    probe_start,
    save_merger,
    wilson_lower_bound,
)
from metamerge.structure import Layout, run
from trainers.families import Families, load_families
from trainers.resume import load_state, optimizer_tensors, restore_optimizer, save_state
from zoo.build import build_with_progress
from zoo.options import parse
from zoo.parts import TaskSplit
from zoo.recipe import ZooOptions
from zoo.store import Zoo, load_zoo

PLACES = ("out", "tracking", "experiment", "save_every")  # options that do not shape the result


@dataclass(frozen=True)
class MergerOptions:
    """Train a graph-network merger on a zoo."""

    zoo: str | None = None  # folder of a zoo; the default digits zoo is built if not given
    out: str = "runs/merger"  # folder of the trained merger; its training state lies beside it
    probes: int = 256  # learned probe inputs that layers are refitted on
    width: int = 32  # size of the states of the weight graph's nodes
    rounds: int = 2  # rounds of messages
    rank: int = 4  # rank of the residual; 0 switches it off
    prior: int = 5  # side of the smoothing prior on first-layer rows; 0 switches it off
    gate: bool = True  # competence gate: which member knows which class
    reference: str = "ensemble"  # the threshold is relative to: ensemble, best_member or absolute
    margin: float = 0.0  # accuracy above the reference (or the absolute threshold itself)
    headroom: float = 0.05  # accuracy beyond its threshold at which a family has faded half
    softness: float = 0.02  # accuracy over which a family fades out
    target: float = 0.9  # stop when the lower Wilson bound of families above threshold reaches this
    steps: int = 300  # steps at most
    families: int = 16  # families per step, over all processes
    images: int = 512  # objective images per step, at most
    noise: float = 0.2  # standard deviation of noise on objective images
    lr: float = 3e-3  # learning rate of AdamW at the start; falls to zero over the steps
    seed: int = 0  # seed of init and batches
    eval_every: int = 25  # steps between two looks at the validation families
    save_every: int = 50  # steps between two saved training states
    tracking: bool = True  # log to MLflow
    experiment: str = "metamerge"  # name of the MLflow experiment

    def __post_init__(self) -> None:
        """Refuse options that make no sense.

        Raises:
            ConfigError: Naming the option.
        """
        self.objective()
        for name in ("probes", "width", "steps", "families", "images", "lr"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}: expected more than 0, got {getattr(self, name)}.")
        if self.prior and self.prior % 2 == 0:
            raise ConfigError(f"prior: expected 0 or an odd number, got {self.prior}.")
        for name in ("eval_every", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}.")

    def objective(self) -> ThresholdObjective:
        """The objective that these options name."""
        return ThresholdObjective(self.reference, self.margin, self.softness, self.headroom)


# ----------------------------------------------------------------------------------------------
# data


def make_merger(options: MergerOptions, layout: Layout, images: Tensor) -> GNNMerger:
    """A fresh merger whose probes start at objective images."""
    shape = tuple(s for s in layout.program.input_shape() if s is not None)
    prior = options.prior if any(x.reads_inputs and x.linear for x in layout.layers) else 0
    config = GNNConfig(
        input_shape=shape,
        probes=options.probes,
        width=options.width,
        rounds=options.rounds,
        rank=options.rank,
        prior=prior,
        gate=options.gate,
    )
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    return GNNMerger(config, probe_start(images.cpu(), options.probes, generator))


# ----------------------------------------------------------------------------------------------
# training


def train_step(
    merger: nn.Module,
    layout: Layout,
    families: Families,
    images: tuple[Tensor, Tensor],
    objective: ThresholdObjective,
) -> tuple[Tensor, Tensor]:
    """Merge, run the fused networks on objective images, compare with the thresholds."""
    fused = merger(families.weights, layout)  # [f, ...]
    logits = run(layout.program, fused, [images[0]], stacked=True)  # [f, b, c]
    return objective.loss(logits, images[1], families.thresholds)


def draw(
    step: int, options: MergerOptions, count: int, images: tuple[Tensor, Tensor]
) -> tuple[Tensor, Any]:
    """Families and images of a step, by seed and step alone: a resumed run repeats them."""
    generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
    rows = torch.randperm(count, generator=generator)[: options.families]
    inputs, targets = images
    chosen = torch.randperm(len(targets), generator=generator)[: options.images].to(targets.device)
    noise = torch.randn(len(chosen), *inputs.shape[1:], generator=generator).to(inputs.device)
    return rows, ((inputs[chosen] + options.noise * noise).clamp(0, 1), targets[chosen])


@torch.no_grad()
def validate(
    merger: nn.Module,
    layout: Layout,
    families: dict[int, Families],
    images: tuple[Tensor, Tensor],
    accelerator: Accelerator,
) -> dict[str, float]:
    """Accuracy of merged validation families, which the processes share out among them."""
    inputs, targets = images
    scores, above, worst = {}, [], []
    for members, group in families.items():
        own = torch.arange(accelerator.process_index, len(group), accelerator.num_processes)
        found = torch.zeros(len(group), device=inputs.device)
        if len(own):
            fused = merger(group.pick(own.to(inputs.device)).weights, layout)
            found[own] = accuracy(run(layout.program, fused, [inputs], stacked=True), targets)
        found = accelerator.reduce(found, "sum")
        scores[f"validation_accuracy_k{members}"] = float(found.mean())
        above.append(found >= group.thresholds)
        worst.append(found)
    passed = torch.cat(above)
    everyone = torch.cat(worst)
    scores["validation_accuracy"] = float(everyone.mean())
    scores["validation_worst_decile"] = float(everyone.quantile(0.1))
    scores["share_above_threshold"] = float(passed.float().mean())
    scores["wilson_lower_bound"] = wilson_lower_bound(int(passed.sum()), len(passed))
    return scores


def main() -> None:
    """Entry point of ``accelerate launch trainers/merger.py``."""
    options = parse(MergerOptions, prog="accelerate launch trainers/merger.py")
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise SystemExit(
            f"merger: {launched} processes were launched but accelerate sees "
            f"{accelerator.num_processes}; every one would train alone. On CPUs launch with "
            "ACCELERATE_USE_CPU=true, --multi_gpu and --num_processes."
        )
    try:
        train(options, accelerator)
    except MetaMergeError as error:
        print(f"merger: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error
    finally:
        accelerator.end_training()


def train(options: MergerOptions, accelerator: Accelerator) -> None:
    """The whole training: data, merger, loop, gates, files."""
    console = Console(quiet=not accelerator.is_main_process)
    if options.zoo:
        zoo = load_zoo(options.zoo)
    else:
        zoo = build_with_progress(ZooOptions(), console, PartialState())  # all processes take part
    split, layout = common_task(zoo), zoo.layout
    objective = options.objective()
    with split.training():
        images = on(accelerator, split.images("objective"))
        held_back = on(accelerator, split.images("validation"))
        training = load_families(zoo, "train", images, objective)
        validation = load_families(zoo, "validation", held_back, objective)
        merger = make_merger(options, layout, images[0])
        outcome = fit(
            options, accelerator, console, zoo, merger, (training, validation), (images, held_back)
        )
        if accelerator.is_main_process:
            finish(options, console, zoo, outcome, split)


def fit(
    options: MergerOptions,
    accelerator: Accelerator,
    console: Console,
    zoo: Zoo,
    merger: GNNMerger,
    families: tuple[dict[int, Families], dict[int, Families]],
    images: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> "Outcome":
    """The loop: until the Wilson bound reaches the target, or the steps are used up."""
    (training, validation), layout = families, zoo.layout
    world, objective = accelerator.num_processes, options.objective()
    fewest = min(options.families, *(len(group) for group in training.values()))
    if fewest < world:
        raise ConfigError(
            f"families: a step has {fewest}, one for each of {world} processes is needed."
        )
    states, mark = Path(f"{options.out}.state"), fingerprint(options, zoo)
    optimizer = torch.optim.AdamW(parameter_groups(merger, options.lr), weight_decay=0.0)
    rates = [group["lr"] for group in optimizer.param_groups]
    start, best = restore(merger, optimizer, load_state(states, mark))
    if start:
        console.print(f"[bold]merger[/] resumed at step {start} of {options.steps}")
    model, optimizer = accelerator.prepare(merger, optimizer)
    clock = time.perf_counter() - best.seconds
    tracking = track(
        f"train {options.out}",
        options={**asdict(options), "zoo_digest": zoo.digest, "processes": world},
        experiment=options.experiment,
        resume=best.run,
        enabled=options.tracking and accelerator.is_main_process,
    )
    with tracking as tracked, progress_bar(console, options.steps, start) as advance:
        best.run = tracked.id
        for step in range(start, options.steps):
            if best.stopped:
                break
            size = zoo.sizes[step % len(zoo.sizes)]
            rows, batch = draw(step, options, len(training[size]), images[0])
            own = rows[accelerator.process_index :: world]
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 - step / options.steps)
            loss, _ = train_step(model, layout, training[size].pick(own), batch, objective)
            optimizer.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(merger.parameters(), 1.0)
            optimizer.step()
            done = step + 1
            if done % options.eval_every == 0 or done == options.steps:
                scores = validate(merger, layout, validation, images[1], accelerator)
                best.consider(merger, scores, done, options.target)
                tracked.metrics({"loss": float(loss.detach()), **scores}, step=done)
                advance(done, scores)
            best.seconds = time.perf_counter() - clock
            due = done % options.save_every == 0 or done == options.steps or best.stopped
            if due and accelerator.is_main_process:
                save_state(states, done, *snapshot(merger, optimizer, best, mark))
    return best


class Outcome:
    """The best merger so far by validation accuracy, and whether the target was reached."""

    def __init__(
        self, merger: GNNMerger, scores: dict[str, float], step: int, stopped: bool
    ) -> None:
        self.merger, self.scores, self.step, self.stopped = merger, scores, step, stopped
        self.weights = {k: v.detach().cpu().clone() for k, v in merger.state_dict().items()}
        self.seconds: float = 0.0
        self.run: str | None = None

    def consider(
        self, merger: GNNMerger, scores: dict[str, float], step: int, target: float
    ) -> None:
        """Keep the merger if it is the best yet; note when the target is reached."""
        if scores["validation_accuracy"] > self.scores.get("validation_accuracy", -1.0):
            self.scores, self.step = scores, step
            self.weights = {k: v.detach().cpu().clone() for k, v in merger.state_dict().items()}
        if scores["wilson_lower_bound"] >= target:
            self.stopped = True


def snapshot(
    merger: GNNMerger, optimizer: Any, best: Outcome, mark: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything that a resumed run needs."""
    tensors = {
        **{f"merger.{k}": v for k, v in merger.state_dict().items()},
        **{f"best.{k}": v for k, v in best.weights.items()},
        **optimizer_tensors(getattr(optimizer, "optimizer", optimizer), merger),
    }
    record = {
        "fingerprint": mark,
        "best_scores": best.scores,
        "best_step": best.step,
        "stopped": best.stopped,
        "seconds": best.seconds,
        "run": best.run,
    }
    return tensors, record


def restore(merger: GNNMerger, optimizer: torch.optim.Optimizer, state: Any) -> tuple[int, Outcome]:
    """Put back what ``snapshot`` took, if there is anything; the step to go on from."""
    if state is None:
        return 0, Outcome(merger, {}, 0, False)
    tensors, record = state
    merger.load_state_dict(part_of(tensors, "merger."))
    restore_optimizer(optimizer, merger, tensors)
    best = Outcome(merger, record["best_scores"], record["best_step"], record["stopped"])
    best.weights = part_of(tensors, "best.")
    best.seconds, best.run = record["seconds"], record["run"]
    return record["step"], best


def finish(
    options: MergerOptions, console: Console, zoo: Zoo, best: Outcome, split: TaskSplit
) -> None:
    """Gates, card and files of the best merger."""
    merger = best.merger.cpu()
    merger.load_state_dict(best.weights)
    merger.eval()
    gates = {
        f"k{size}": collapse_gates(
            lambda members: merger(members, zoo.layout),
            zoo.families("validation", size),
            zoo.layout,
            *split.images("validation"),
        )
        for size in zoo.sizes
    }
    card = {
        "options": asdict(options),
        "zoo": {"digest": zoo.digest, "options": zoo.options, "task": zoo.manifest["task"]},
        "validation": best.scores,
        "step": best.step,
        "stopped_at_target": best.stopped,
        "seconds": round(best.seconds, 1),
        "run": best.run,
        "gates": {
            k: [{**asdict(g), "passed": g.passed} for g in found] for k, found in gates.items()
        },
    }
    folder = save_merger(merger, options.out, card)
    failed = [
        f"{k} {g.name} = {g.value:.3g} > {g.limit:.3g}"
        for k, f in gates.items()
        for g in f
        if not g.passed
    ]
    share = best.scores["share_above_threshold"]
    console.print(
        f"[bold]merger[/] {folder}: validation accuracy {best.scores['validation_accuracy']:.3f}, "
        f"{share:.0%} of families above threshold, {best.seconds:.0f} s"
    )
    if failed:
        raise MetaMergeError(f"{folder} fails the collapse gates: {'; '.join(failed)}.")
    console.print(f"[bold]gates[/] all {sum(map(len, gates.values()))} passed")


# ----------------------------------------------------------------------------------------------
# small parts


def on(accelerator: Accelerator, images: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Inputs and targets on this process's device."""
    return images[0].to(accelerator.device), images[1].to(accelerator.device)


def part_of(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Tensors under a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def parameter_groups(merger: GNNMerger, lr: float) -> list[dict[str, Any]]:
    """Single numbers (refit strength, ridge) learn fastest, then pixels of probes, then heads."""
    fast = [merger.strength, merger.log_ridge]
    named = {id(p) for p in (*fast, merger.probes)}
    return [
        {"params": fast, "lr": 10 * lr},
        {"params": [merger.probes], "lr": 3 * lr},
        {"params": [p for p in merger.parameters() if id(p) not in named], "lr": lr},
    ]


def fingerprint(options: MergerOptions, zoo: Zoo) -> str:
    """Hash of what shapes the result."""
    shaping = {k: v for k, v in asdict(options).items() if k not in (*PLACES, "zoo")}
    return sha256(json.dumps([shaping, zoo.digest], sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def progress_bar(console: Console, total: int, start: int) -> Iterator[Any]:
    """A bar with the validation scores behind it."""
    columns = (
        TextColumn("merger"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[scores]}"),
    )
    with Progress(*columns, console=console, disable=console.quiet) as bar:
        task = bar.add_task("merger", total=total, completed=start, scores="")

        def advance(done: int, scores: dict[str, float]) -> None:
            reached = scores["share_above_threshold"]
            text = f"accuracy {scores['validation_accuracy']:.3f}, above {reached:.0%}"
            bar.update(task, completed=done, scores=text)

        yield advance


if __name__ == "__main__":
    main()
