"""A piece of work of ``trainers/subsets.py``: some seeds from one start with one mask."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.metrics import accuracy, barriers, negative_log_likelihood, soft_vote
from metamerge.checkpoints import read_checkpoints, save_checkpoint
from metamerge.structure import Program, run
from metamerge.subsets import Kernels, Live, Subset, find_kernels, live_weights, taken
from metamerge.weights import Weights
from trainers.ground import Ground
from zoo.architectures import frozen, program_of
from zoo.masks import FULL, Curvature, Masks, Recipe
from zoo.partial import Data, Descent, PartialTraining, train_partly
from zoo.recipe import factory_for
from zoo.rewrites import pool_first
from zoo.training import init_networks, predict

INIT, CONVERGED = "init", "converged"
STARTS = (INIT, CONVERGED)
HALVES, TIMED = "halves", "halves-timed"  # of the full network's steps, or of its seconds
_SEEDS = 2**20  # seeds that everything of one kind has for itself


@dataclass(frozen=True)
class Setting:
    """What all runs share.

    Attributes:
        descent: How networks are trained; ``period`` is that of the mask.
        every: Steps between two looks at a network.
        images: Training images of a seed; 0 for all there are.
        seed: Of everything.
        restart_lr: Learning rate of trainings that start from a converged network.
        interactions: Of kernels: see ``zoo.masks.Curvature``.
        probes: Vectors of random signs for the Hessian's diagonal.
        curved: Training images that the Hessian is taken on.
    """

    descent: Descent
    every: int
    images: int
    seed: int
    restart_lr: float
    interactions: str
    probes: int
    curved: int

    @property
    def marks(self) -> list[int]:
        """Steps after which networks are looked at: the first few, and then at equal distances."""
        steps = self.descent.steps
        early = [self.every // 4, self.every // 2]
        return sorted({0, *early, *range(self.every, steps, self.every), steps})


@dataclass(frozen=True)
class Piece:
    """A start, a mask (or halves), and the seeds that are trained side by side."""

    start: str
    mask: str
    seeds: tuple[int, ...]
    steps: int = 0  # where they are others than those of all trainings

    @property
    def name(self) -> str:
        """Of its row in the ledger."""
        told = f"{self.start}; {self.mask}; seeds {' '.join(map(str, self.seeds))}"
        return f"{told}; {self.steps} steps" if self.steps else told


class Workshop:
    """Trains pieces.

    Args:
        setting: What they share.
        ground: The task and the architecture.
        states: Folder of the ways that full trainings took; masks are held against these.
    """

    def __init__(self, setting: Setting, ground: Ground, states: Path) -> None:
        self.setting, self.ground, self.states = setting, ground, states
        self._masks: dict[tuple[str, tuple[int, ...]], Masks] = {}

    @cached_property
    def kernels(self) -> list[Kernels]:
        """Of the architecture."""
        return find_kernels(self.ground.layout, frozen(self.ground.factory()))

    def masks(self, start: str, seeds: tuple[int, ...]) -> Masks:
        """What draws masks where networks start; what the Hessian told is kept."""
        if (start, seeds) not in self._masks:
            weights = self._start(start, seeds)
            curvatures = [self._curvature(weights, i, seed) for i, seed in enumerate(seeds)]
            drawn = [self.setting.seed * _SEEDS + seed for seed in seeds]
            self._masks = {(start, seeds): Masks(self.kernels, weights, drawn, curvatures)}
        return self._masks[start, seeds]

    def make(self, piece: Piece) -> dict[str, Any]:
        """Train a piece.

        Args:
            piece: Which.

        Returns:
            Its row: every number by seeds, curves by seeds and marks.
        """
        with self.ground.split.training():
            if piece.mask in (HALVES, TIMED):
                row, logits = self._halves(piece)
            else:
                row, logits = self._masked(piece)
        _, targets = self.ground.split.images("test")
        said = [own() for own in logits]  # of the one network of each seed, or of its two halves
        row["test"] = [float(accuracy(soft_vote(own), targets)) for own in said]
        if len(said[0]) > 1:
            row["test_alone"] = [float(accuracy(own, targets).mean()) for own in said]
        return {"start": piece.start, "mask": piece.mask, "seeds": list(piece.seeds), **row}

    def training(
        self, masks: Masks, recipe: Recipe, start: str, seeds: Sequence[int], steps: int
    ) -> PartialTraining:
        """A training of a mask, before its first step."""
        setting = self.setting
        lr = setting.restart_lr if start == CONVERGED else setting.descent.lr
        descent = replace(setting.descent, lr=lr, period=recipe.period, steps=steps)
        draws = partial(masks.draw, recipe)
        data = self._data(seeds, STARTS.index(start))
        return PartialTraining(self.ground.program, masks.weights, data, draws, descent)

    def halves(self, seeds: Sequence[int], steps: int) -> PartialTraining:
        """Two networks of half the channels per seed, side by side, before their first step."""
        factory = factory_for(self.ground.options, self.ground.split.task, times=0.5)
        program = program_of(factory(), self.ground.inputs.shape[1:])
        both = [2 * seed + half for seed in seeds for half in range(2)]
        weights = init_networks(factory, self._numbers(both, 3))
        everything = {key: Live() for key in program.parameters.values()}
        rows = [own for own in self._data(seeds, 0).rows for _ in range(2)]
        inputs, targets = self.ground.inputs, self.ground.targets
        data = Data(inputs, targets, rows, self._numbers(both, 4))
        descent = replace(self.setting.descent, steps=steps)
        return PartialTraining(program, weights, data, lambda _: everything, descent)

    # ------------------------------------------------------------------------------ kinds of runs

    def _masked(self, piece: Piece) -> tuple[dict[str, Any], list[Any]]:
        recipe, seeds = Recipe.parse(piece.mask), piece.seeds
        masks = self.masks(piece.start, seeds)
        training = self.training(masks, recipe, piece.start, seeds, self.setting.descent.steps)
        watched = masks.everything if recipe.period else training.subset
        start, kept = training.weights, _Curves(self)
        full = {} if recipe.family == FULL else self._paths(piece.start, seeds)
        path: list[Weights] = []

        def watch(step: int, weights: Weights, losses: Tensor) -> None:
            kept.note(step, losses, predict(self.ground.program, weights, self.validation[0]))
            gone = _difference(weights, start, watched)  # [n, p]
            kept.add("displacement", gone.norm(dim=1))
            if full:
                at = {key: tensor[:, len(kept.steps) - 1] for key, tensor in full.items()}
                other = _difference(at, start, watched)
                kept.add("same", other.norm(dim=1))
                kept.add("cosine", F.cosine_similarity(gone, other, dim=1))
            else:
                path.append({key: tensor.clone() for key, tensor in weights.items()})

        end = train_partly(training, self.setting.marks, watch)
        if path:
            self._keep(piece, path)
        whole = live_weights(start, masks.everything)
        row = {"live": live_weights(start, training.subset), "weights": whole, **kept.row()}
        row["norm"] = _difference(start, None, watched).norm(dim=1).tolist()
        if piece.start == CONVERGED:
            row |= self._left(start, end, seeds)
        each = [slice(i, i + 1) for i in range(len(seeds))]
        return row, [partial(self._said, self.ground.program, end, one) for one in each]

    def _halves(self, piece: Piece) -> tuple[dict[str, Any], list[Any]]:
        steps = piece.steps or self.setting.descent.steps
        training = self.halves(piece.seeds, steps)
        marks = [round(mark * steps / self.setting.descent.steps) for mark in self.setting.marks]
        kept = _Curves(self)

        def watch(step: int, weights: Weights, losses: Tensor) -> None:
            logits = predict(training.program, weights, self.validation[0])
            voted = soft_vote(logits.unflatten(0, (-1, 2)))
            kept.note(step, losses.unflatten(0, (-1, 2)).mean(1), voted)
            kept.add("alone", self._loss(logits).unflatten(0, (-1, 2)).mean(1))

        end = train_partly(training, set(marks), watch)
        size = 2 * sum(tensor[0].numel() for tensor in end.values())
        row = {"live": size, "weights": size, **kept.row()}

        pairs = [slice(2 * i, 2 * i + 2) for i in range(len(piece.seeds))]
        return row, [partial(self._said, training.program, end, pair) for pair in pairs]

    # ------------------------------------------------------------------------------ small parts

    @cached_property
    def validation(self) -> tuple[Tensor, Tensor]:
        """Images that curves are measured on."""
        inputs, targets = self.ground.split.images("validation")
        return inputs.to(self.ground.device), targets.to(self.ground.device)

    def _loss(self, logits: Tensor) -> Tensor:
        return negative_log_likelihood(logits, self.validation[1])

    def _said(self, program: Program, weights: Weights, networks: slice) -> Tensor:
        """Logits of some networks on test images, ``[m, b, c]``."""
        own = {key: tensor[networks] for key, tensor in weights.items()}
        inputs = self.ground.split.images("test")[0].to(self.ground.device)
        return predict(program, own, inputs).cpu()

    def _numbers(self, seeds: Sequence[int], kind: int) -> list[int]:
        """Seeds of one kind: those of two kinds, or of two commands' seeds, never meet."""
        return [(self.setting.seed * 8 + kind) * _SEEDS + seed for seed in seeds]

    def _data(self, seeds: Sequence[int], again: int) -> Data:
        rows = [self._rows(seed) for seed in seeds]
        orders = self._numbers(seeds, 1 + again)
        return Data(self.ground.inputs, self.ground.targets, rows, orders)

    def _rows(self, seed: int) -> Tensor:
        """Training images of a seed."""
        own = self.ground.split.rows("segments")
        generator = torch.Generator().manual_seed(self._numbers([seed], 5)[0])
        return own[torch.randperm(len(own), generator=generator)[: self.setting.images or None]]

    def _start(self, start: str, seeds: tuple[int, ...]) -> Weights:
        if start == INIT:
            return init_networks(self.ground.factory, self._numbers(seeds, 0))
        return {key: tensor[:, -1].clone() for key, tensor in self._paths(INIT, seeds).items()}

    def _curvature(self, weights: Weights, network: int, seed: int) -> Curvature:
        keys = [key for own in self.kernels for key in own.keys]
        own = {key: tensor[network] for key, tensor in weights.items()}
        rows, program = self._rows(seed)[: self.setting.curved], pool_first(self.ground.program)
        inputs, targets = self.ground.inputs[rows], self.ground.targets[rows]

        def loss(trained: Weights) -> Tensor:
            return F.cross_entropy(run(program, {**own, **trained}, [inputs]), targets)

        return Curvature(
            loss,
            {key: own[key] for key in keys},
            self.kernels,
            self.setting.interactions,
            self.setting.probes,
            self._numbers([seed], 6)[0],
        )

    def _left(self, start: Weights, end: Weights, seeds: Sequence[int]) -> dict[str, list[float]]:
        """Whether networks left their minimum: loss at both ends, and the barrier between them."""
        found: dict[str, list[float]] = {"loss_before": [], "loss_after": [], "barrier": []}
        for i, seed in enumerate(seeds):
            rows = self._rows(seed)[: len(self.validation[0])]
            inputs, targets = self.ground.inputs[rows], self.ground.targets[rows]
            pair = {key: torch.stack([start[key][i], own[i]])[None] for key, own in end.items()}
            both = {key: tensor[0] for key, tensor in pair.items()}
            told = predict(self.ground.program, both, inputs)
            losses = negative_log_likelihood(told, targets).tolist()
            for name, value in zip(("loss_before", "loss_after"), losses, strict=True):
                found[name].append(value)
            barrier = barriers(self.ground.program, pair, inputs, targets)
            found["barrier"].append(float(barrier[0, 0, 1]))
        return found

    def _keep(self, piece: Piece, path: Sequence[Weights]) -> None:
        for i, seed in enumerate(piece.seeds):
            own = {key: torch.stack([at[key][i].cpu() for at in path]) for key in path[0]}
            save_checkpoint(own, self._place(piece.start, seed), overwrite=True)

    def _paths(self, start: str, seeds: Sequence[int]) -> Weights:
        """Ways that full trainings took, ``[n, marks, ...]``."""
        found = [read_checkpoints(self._place(start, seed))[0].weights for seed in seeds]
        device = self.ground.device
        return {key: torch.stack([own[key] for own in found]).to(device) for key in found[0]}

    def _place(self, start: str, seed: int) -> Path:
        return self.states / f"{start}-seed{seed}"


class _Curves:
    """Numbers by marks."""

    def __init__(self, workshop: Workshop) -> None:
        self.workshop, self.steps, self.values = workshop, [], {}

    def note(self, step: int, losses: Tensor, logits: Tensor) -> None:
        """Begin the next mark with the losses on training and validation images."""
        self.steps.append(step)
        self.add("train", losses)
        self.add("validation", self.workshop._loss(logits))

    def add(self, name: str, values: Tensor) -> None:
        """Add a number of every network to this mark."""
        self.values.setdefault(name, []).append(values.cpu())

    def row(self) -> Mapping[str, Any]:
        """What JSON can hold."""
        curves = {name: torch.stack(own, 1).tolist() for name, own in self.values.items()}
        return {"steps": self.steps, "curves": curves}


def _difference(weights: Weights, start: Weights | None, subset: Subset) -> Tensor:
    """Live weights, less those of a start, end to end: ``[n, p]``."""
    gone = taken(weights, subset)
    if start is not None:
        gone = {key: own - taken(start, {key: subset[key]})[key] for key, own in gone.items()}
    return torch.cat([tensor.flatten(1) for tensor in gone.values()], 1)
