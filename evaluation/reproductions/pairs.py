"""Pairs of networks that learned the same images from own inits: trained at once, then merged."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from evaluation.methods.settings import official_rows
from evaluation.metrics import accuracy, family_logits
from metamerge.corrections.refit import refit
from metamerge.corrections.repair import repair
from metamerge.declaration import bind
from metamerge.registry import get_alignment, list_alignments
from metamerge.structure import Layout, Permutation, Program
from metamerge.weights import Weights
from zoo.architectures import frozen
from zoo.tasks import Task
from zoo.training import init_networks, predict, train_networks

ALIGNMENTS = ("weight_matching", "activation_matching")


class PairOptions(Protocol):
    """What of an experiment's options decides how pairs are trained; mergeability hangs on it."""

    out: str
    pairs: int
    epochs: float
    batch_size: int
    lr: float
    weight_decay: float
    calibration: int
    images: int
    seed: int


def train_pairs(
    factory: Callable[[], nn.Module], program: Program, task: Task, options: PairOptions
) -> Weights:
    """Train two networks per pair on all training images, each from an init of its own.

    Args:
        factory: Builds a freshly initialised network.
        program: Its traced program.
        task: What they learn.
        options: How, and how many.

    Returns:
        Pairs, every tensor ``[f, 2, ...]``.
    """
    rows = official_rows(task)[0][: options.images or None]
    first = 2 * options.seed
    networks = range(first, first + 2 * options.pairs)
    trained = train_networks(
        program,
        init_networks(factory, networks),
        task.inputs,
        task.targets,
        [rows] * len(networks),
        epochs=options.epochs,
        batch_size=options.batch_size,
        lr=options.lr,
        weight_decay=options.weight_decay,
        seed=networks,
        frozen=frozen(factory()),
    )
    return {key: t.unflatten(0, (options.pairs, 2)) for key, t in trained.weights.items()}


def pair_scores(
    pairs: Weights, layout: Layout, task: Task, options: PairOptions
) -> dict[str, Tensor]:
    """``merged_scores`` on the test images of a task, calibrated on some of its training images.

    Args:
        pairs: ``[f, 2, ...]``.
        layout: Their architecture, without batch normalisation.
        task: What they learned.
        options: Says how many images calibrate.

    Returns:
        Name -> test accuracy of every pair, ``[f]``.
    """
    rows, test = official_rows(task)
    images = task.inputs[test], task.targets[test]
    return merged_scores(pairs, layout, task.inputs[rows[: options.calibration]], images)


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
        Name out of ``sizes.NAMES`` -> accuracy of every pair, ``[f]``.
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
