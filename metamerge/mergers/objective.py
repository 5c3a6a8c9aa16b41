"""The threshold objective: families below their threshold get the gradient, others fade out.

A merger is trained until the networks that it emits are good *enough*, nearly all of them: what
counts is the share of unseen families above their threshold, and training stops when the lower
Wilson bound of that share reaches a target.
"""

from dataclasses import dataclass
from math import isfinite, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from metamerge.errors import ConfigError

REFERENCES = ("absolute", "best_member", "ensemble")


@dataclass(frozen=True)
class ThresholdObjective:
    """Cross entropy of fused networks, weighed by how far each family is from its threshold.

    Attributes:
        reference: ``absolute``, or what the threshold is relative to: ``best_member`` or
            ``ensemble``.
        margin: The threshold itself, or how far above the reference it lies, in accuracy.
        softness: Accuracy over which a family fades out.
        headroom: How far beyond its threshold a family has to be to have faded half.
    """

    reference: str = "ensemble"
    margin: float = 0.0
    softness: float = 0.02
    headroom: float = 0.0

    def __post_init__(self) -> None:
        """Refuse settings that make no sense.

        Raises:
            ConfigError: Naming the setting.
        """
        if self.reference not in REFERENCES:
            raise ConfigError(f"reference: got {self.reference!r}, expected one of {REFERENCES}.")
        if self.reference == "absolute" and not 0 < self.margin <= 1:
            raise ConfigError(f"margin: an absolute threshold lies in (0, 1], got {self.margin}.")
        for name in ("margin", "headroom"):
            if not isfinite(getattr(self, name)):
                raise ConfigError(f"{name}: expected a number, got {getattr(self, name)}.")
        if not self.softness > 0:
            raise ConfigError(f"softness: expected more than 0, got {self.softness}.")

    def thresholds(self, best_member: Tensor, ensemble: Tensor) -> Tensor:
        """Accuracy that each family has to reach.

        Args:
            best_member: Accuracy of each family's best member, ``[f]``.
            ensemble: Accuracy of each family's soft-vote ensemble, ``[f]``.

        Returns:
            ``[f]``, at most 1.
        """
        base = {
            "absolute": torch.zeros_like(ensemble),
            "best_member": best_member,
            "ensemble": ensemble,
        }[self.reference]
        return (base + self.margin).clamp(max=1.0)

    def loss(self, logits: Tensor, targets: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
        """Weighed cross entropy of fused networks.

        Args:
            logits: ``[f, b, c]``.
            targets: Classes ``[b]``, or ``[f, b]`` where families know them by numbers of their
                own; or, without labels, probabilities ``[f, b, c]`` that are to be imitated, such
                as those of the members' soft vote.
            thresholds: Accuracy that each family has to reach, or agreement with the likeliest
                class where probabilities are imitated, ``[f]``.

        Returns:
            The loss, and the accuracy of each family on this batch, ``[f]``.
        """
        if targets.is_floating_point():
            losses = -(targets * logits.log_softmax(-1)).sum(-1).mean(1)
            wanted = targets.argmax(-1)
        else:
            wanted = targets.expand(len(logits), -1)
            losses = F.cross_entropy(logits.movedim(-1, 1), wanted, reduction="none").mean(1)
        accuracy = (logits.argmax(-1) == wanted).float().mean(1)
        reach = (thresholds + self.headroom).clamp(max=1.0)
        weight = ((reach - accuracy) / self.softness).sigmoid().detach()
        return (weight * losses).mean(), accuracy


def wilson_lower_bound(successes: int, trials: int, z: float = 1.96) -> float:
    """Lower end of the Wilson score interval of a share (Wilson, 1927).

    Args:
        successes: Number of successes.
        trials: Number of trials.
        z: Quantile of the normal distribution; 1.96 for 95 %.

    Returns:
        A number in [0, 1]; 0 without trials.

    Examples:
        >>> round(wilson_lower_bound(9, 10), 4)
        0.5958
    """
    if trials == 0:
        return 0.0
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, (centre - spread) / (1 + z * z / trials))
