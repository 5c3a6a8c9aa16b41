"""A step of training: merge families, run the fused networks, compare with the thresholds."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metamerge.mergers import Merger, ThresholdObjective, consensus
from metamerge.structure import run
from trainers.drawing import Batch


class Step(nn.Module):
    """A merger with its loss: one forward pass is one step, whatever architectures it holds.

    Processes average the gradients of one pass, so all batches of a step have to be in it.

    Args:
        merger: The merger.
        objective: The loss of fused networks.
        share: Weight of the loss of what the gate makes of the members' own answers, which trains
            it without the detour of a fused network.
        imitate: Share of that consensus in what fused networks are taught, 0 to 1; the rest is the
            images' classes. Members have not seen the images, so that what they say of them
            cannot be learned by heart as classes can.
        precision: ``float32``, or ``bfloat16`` for the products of the fused networks; merging
            itself, which solves linear systems, keeps its precision.
    """

    def __init__(
        self,
        merger: Merger,
        objective: ThresholdObjective,
        share: float,
        imitate: float,
        precision: str,
    ) -> None:
        super().__init__()
        self.merger, self.objective = merger, objective
        self.share, self.imitate = share, imitate
        self.half = precision == "bfloat16"

    def forward(self, batches: Sequence[Batch]) -> Tensor:
        """The loss of a step.

        Args:
            batches: Families of one architecture and size each.

        Returns:
            Mean over batches.
        """
        return torch.stack([self._loss(batch) for batch in batches]).mean()

    def _loss(self, batch: Batch) -> Tensor:
        fused, trust = self.merger(batch.members, batch.layout, batch.watched)
        with torch.autocast(batch.inputs.device.type, torch.bfloat16, enabled=self.half):
            logits = run(batch.layout.program, fused, [batch.inputs], stacked=True)  # [f, b, c]
        said = consensus(trust, batch.answers)
        judged, _ = self.objective.loss(said, batch.targets, batch.thresholds)
        taught, wanted = batch.targets, None
        if self.imitate:
            taught, wanted = _blended(batch.targets, said.detach().softmax(-1), self.imitate)
        loss, _ = self.objective.loss(logits.float(), taught, batch.thresholds, wanted)
        return loss + self.share * judged


def _blended(targets: Tensor, said: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Targets of which a share is what was said, ``[f, b, c]``, and the classes they had."""
    if targets.is_floating_point():
        return torch.lerp(targets, said, share), targets.argmax(-1)
    return torch.lerp(F.one_hot(targets, said.shape[-1]).to(said), said, share), targets
