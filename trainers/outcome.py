"""The best merger so far, and what a training that is resumed has to know."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from metamerge.mergers import Merger
from trainers.resume import optimizer_tensors, restore_optimizer


class Outcome:
    """The best merger so far by validation accuracy, and whether the target was reached."""

    def __init__(self, merger: Merger, scores: dict[str, float], step: int, stopped: bool) -> None:
        self.merger, self.scores, self.step, self.stopped = merger, scores, step, stopped
        self.weights = {k: v.detach().cpu().clone() for k, v in merger.state_dict().items()}
        self.seconds: float = 0.0
        self.run: str | None = None
        self.history: list[dict[str, float]] = []  # one entry per look at the validation families

    def consider(self, merger: Merger, scores: dict[str, float], step: int, target: float) -> None:
        """Keep the merger if it is the best yet; note when the target is reached."""
        if scores["validation_accuracy"] > self.scores.get("validation_accuracy", -1.0):
            self.scores, self.step = scores, step
            self.weights = {k: v.detach().cpu().clone() for k, v in merger.state_dict().items()}
        if scores["wilson_lower_bound"] >= target:
            self.stopped = True


def snapshot(
    merger: Merger, averaged: AveragedModel, optimizer: Any, best: Outcome, mark: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Collect everything that a resumed run needs.

    Args:
        merger: The merger as it is trained.
        averaged: The running average of its parameters.
        optimizer: Its optimizer.
        best: The best merger so far.
        mark: Fingerprint of options and zoos.

    Returns:
        Tensors, and everything else as JSON.
    """
    tensors = {
        **{f"merger.{k}": v for k, v in merger.state_dict().items()},
        **{f"averaged.{k}": v for k, v in averaged.state_dict().items()},
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
        "history": best.history,
    }
    return tensors, record


def restore(
    merger: Merger, averaged: AveragedModel, optimizer: torch.optim.Optimizer, state: Any
) -> tuple[int, Outcome]:
    """Put back what ``snapshot`` took, if there is anything.

    Args:
        merger: The merger; it is changed.
        averaged: The running average of its parameters; it is changed.
        optimizer: Its optimizer; it is changed.
        state: What ``load_state`` found, or None.

    Returns:
        The step to go on from, and the best merger so far.
    """
    if state is None:
        return 0, Outcome(merger, {}, 0, False)
    tensors, record = state
    merger.load_state_dict(part_of(tensors, "merger."))
    averaged.load_state_dict(part_of(tensors, "averaged."))
    restore_optimizer(optimizer, merger, tensors)
    best = Outcome(merger, record["best_scores"], record["best_step"], record["stopped"])
    best.weights = part_of(tensors, "best.")
    best.seconds, best.run = record["seconds"], record["run"]
    best.history = record.get("history", [])  # older states have none
    return record["step"], best


def part_of(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Tensors under a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
