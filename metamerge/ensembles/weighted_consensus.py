"""Weighted consensus: members count by how well they do on labelled data.

No paper of its own; a linear opinion pool (Stone, "The Opinion Pool", Annals of Mathematical
Statistics 32(4), 1961) whose weights are read off validation losses.

Shape comments: m members, b inputs, c classes.
"""

from math import inf
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metamerge.ensembles.kinds import consensus
from metamerge.ensembles.watching import Seen, check_labels, check_outputs
from metamerge.errors import ConfigError
from metamerge.options import check_choice, check_number

TEMPERATURES = (inf, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01)
_BY = ("softmax", "inverse")


@consensus()
def weighted_consensus(
    seen: Seen,
    labels: Tensor,
    *,
    by: str = "softmax",
    temperature: float | None = None,
    report: dict[str, Any] | None = None,
) -> "WeightedConsensus":
    """Weigh members by their mean cross entropy on labelled inputs.

    Args:
        seen: What members say about the inputs.
        labels: Their classes, ``[b]``.
        by: ``softmax`` of minus the losses over the temperature, or ``inverse`` of the losses.
        temperature: Of the softmax; high ones make members equal, low ones leave only the best. By
            default that one of ``TEMPERATURES`` whose consensus has the lowest loss itself.
        report: Takes losses, weights and temperature.

    Returns:
        The consensus.

    Raises:
        ConfigError: If an option is out of its range, or labels do not fit the outputs.
    """
    check_outputs("weighted_consensus", seen.outputs)
    check_labels("weighted_consensus", labels, seen.outputs)
    _check(by, temperature)
    logits = seen.outputs.double()
    losses = F.cross_entropy(logits.mT, labels.expand(len(logits), -1), reduction="none").mean(
        1
    )  # [m]
    weights, temperature = _weights(logits, labels, losses, by, temperature)
    if report is not None:
        report.update(losses=losses.tolist(), weights=weights.tolist())
        report.update({} if temperature is None else {"temperature": str(temperature)})
    return WeightedConsensus(weights.float())


class WeightedConsensus(nn.Module):
    """A mean of the members' probabilities with a weight for each.

    Args:
        weights: ``[m]``, which sum to 1.
    """

    options: dict = {}  # noqa: RUF012  (nothing to choose)

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.register_buffer("weights", weights)

    def forward(self, seen: Seen) -> Tensor:
        """Logarithms of the weighted mean of probabilities, ``[m, b, c]`` -> ``[b, c]``."""
        check_outputs("weighted_consensus", seen.outputs, len(self.weights))
        return pooled(seen.outputs, self.weights[:, None])


def pooled(logits: Tensor, weights: Tensor) -> Tensor:
    """Logarithms of a weighted mean of probabilities.

    Args:
        logits: ``[m, b, c]``.
        weights: ``[m, b]`` or ``[m, 1]``, which sum to 1 over members.

    Returns:
        ``[b, c]``.
    """
    # log 0 would be -inf, and its gradient NaN
    logs = weights.clamp_min(torch.finfo(weights.dtype).tiny).log()
    return (logits.log_softmax(-1) + logs[..., None]).logsumexp(0)


def _weights(
    logits: Tensor, labels: Tensor, losses: Tensor, by: str, temperature: float | None
) -> tuple[Tensor, float | None]:
    """Weights ``[m]``, and the temperature behind them if there is one."""
    if by == "inverse":
        inverse = 1 / losses.clamp_min(1e-12)
        return inverse / inverse.sum(), None
    tried = TEMPERATURES if temperature is None else (temperature,)
    made = [(-losses / t).softmax(0) for t in tried]
    scores = [int((pooled(logits, w[:, None]).argmax(-1) != labels).sum()) for w in made]
    best = min(range(len(tried)), key=scores.__getitem__)  # the highest of equals
    return made[best], float(tried[best])


def _check(by: str, temperature: float | None) -> None:
    check_choice("weighted_consensus", "by", by, _BY)
    chosen = "to have it chosen"
    check_number("weighted_consensus", "temperature", temperature, "(0, inf]", none=chosen)
    if by == "inverse" and temperature is not None:
        raise ConfigError("weighted_consensus: temperature is one of by='softmax'. Leave it out.")
