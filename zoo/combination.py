"""How the gradients of several clusters become one step: the rules that are compared."""

from dataclasses import dataclass

from torch import Tensor

from metamerge.errors import ConfigError
from metamerge.gradients import keep_some, orthogonalise

MEAN = "mean"


@dataclass(frozen=True)
class Rule:
    """A way to combine gradients.

    Attributes:
        order: "mean", or the order in which gradients are orthogonalised.
        leak: Share of the projections that is left in place.
        dropped: Probability that a gradient is left out of a step.
        stretched: Whether the step has the direction of the mean and the length of the sum of
            orthogonalised gradients: what is gained by length alone.
        adam: Whether Adam makes the step, and not gradient descent.
    """

    order: str = MEAN
    leak: float = 0.0
    dropped: float = 0.0
    stretched: bool = False
    adam: bool = False


RULES = {
    "plain": Rule(),
    "increasing": Rule("increasing"),
    "decreasing": Rule("decreasing"),
    "given": Rule("given"),
    "leaky": Rule("increasing", leak=0.5),
    "leaky-decreasing": Rule("decreasing", leak=0.5),
    "dropped": Rule("increasing", dropped=0.25),
    "dropped-decreasing": Rule("decreasing", dropped=0.25),
    "stretched": Rule("increasing", stretched=True),
    "adam": Rule(adam=True),
    "adam-increasing": Rule("increasing", adam=True),
    "adam-decreasing": Rule("decreasing", adam=True),
}


def rule_named(name: str) -> Rule:
    """Look up a rule.

    Args:
        name: One of ``RULES``.

    Returns:
        The rule.

    Raises:
        ConfigError: If there is none of this name.
    """
    if name not in RULES:
        raise ConfigError(f"rules: got {name!r}, there are {', '.join(RULES)}.")
    return RULES[name]


def combine(
    gradients: Tensor, shares: Tensor, rule: Rule, draws: Tensor, admitted: Tensor | None = None
) -> Tensor:
    """Make one direction of k gradients, for every run.

    Args:
        gradients: Mean gradient of every cluster, ``[r, k, p]``.
        shares: Part that each cluster has in the rows of this step, ``[r, k]``; only the mean
            looks at it, which is thereby the gradient of the mean loss of all rows.
        rule: How.
        draws: Random numbers in [0, 1), ``[r, k]``: which gradients are dropped.
        admitted: Clusters that take part, bool ``[r, k]``; None for all.

    Returns:
        ``[r, p]``.
    """
    kept = admitted
    if rule.dropped:
        among = draws if admitted is None else draws.where(admitted, -1.0)  # never the largest
        kept = keep_some(among, rule.dropped)
    if rule.order == MEAN:
        return _mean(gradients, shares, kept)
    summed = orthogonalise(gradients, order=rule.order, leak=rule.leak, kept=kept)
    if not rule.stretched:
        return summed
    mean = _mean(gradients, shares, kept)
    lengths = [vector.norm(dim=-1, keepdim=True) for vector in (summed, mean)]
    return mean * (lengths[0] / lengths[1].clamp_min(1e-30))


def _mean(gradients: Tensor, shares: Tensor, kept: Tensor | None) -> Tensor:
    weights = shares if kept is None else shares * kept
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-30)
    return (weights.to(gradients.dtype).unsqueeze(-2) @ gradients).squeeze(-2)
