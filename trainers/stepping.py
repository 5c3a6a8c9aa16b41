"""A step of training: merge families, run the fused networks, compare with the thresholds."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from metamerge.mergers import Merger, ThresholdObjective, consensus
from metamerge.structure import run
from trainers.drawing import Batch


class Step(nn.Module):
    """A merger with its loss: one forward pass is one step, whatever architectures it holds.

    Processes average the gradients of one pass, the last one of a step that is taken in parts, so
    all groups of a step have to be in it.

    Args:
        merger: The merger.
        objective: The loss of fused networks.
        share: Weight of the loss of what the gate makes of the members' own answers, which trains
            it without the detour of a fused network.
        precision: ``float32``, or ``bfloat16`` for the products of the fused networks; merging
            itself, which solves linear systems, keeps its precision.
    """

    def __init__(
        self, merger: Merger, objective: ThresholdObjective, share: float, precision: str
    ) -> None:
        super().__init__()
        self.merger, self.objective, self.share = merger, objective, share
        self.half = precision == "bfloat16"

    def forward(self, batches: Sequence[Batch]) -> Tensor:
        """The loss of a step.

        Args:
            batches: Families of one architecture and size each.

        Returns:
            Mean over batches; of a part of a step, its share of that.
        """
        return torch.stack([batch.share * self._loss(batch) for batch in batches]).mean()

    def _loss(self, batch: Batch) -> Tensor:
        fused, trust = self.merger(batch.members, batch.layout, batch.watched)
        with torch.autocast(batch.inputs.device.type, torch.bfloat16, enabled=self.half):
            logits = run(batch.layout.program, fused, [batch.inputs], stacked=True)  # [f, b, c]
        loss, _ = self.objective.loss(logits.float(), batch.targets, batch.thresholds)
        said = consensus(trust, batch.answers)
        return loss + self.share * self.objective.loss(said, batch.targets, batch.thresholds)[0]


def take_gradients(
    step: nn.Module, parts: Sequence[Sequence[Batch]], accelerator: Accelerator
) -> Tensor:
    """Add up the gradients of a step's parts; processes average theirs with the last one.

    Args:
        step: A ``Step``, as the accelerator has prepared it.
        parts: Batches of every part.
        accelerator: The processes.

    Returns:
        The loss of all parts.
    """
    losses = []
    for place, part in enumerate(parts, 1):
        with nullcontext() if place == len(parts) else accelerator.no_sync(step):
            loss = step(part)
            accelerator.backward(loss)
        losses.append(loss.detach())
    return torch.stack(losses).sum()
