"""Votes: ask all members and let them decide together; what merged networks must be compared with.

Paper: Lakshminarayanan, Pritzel, Blundell, "Simple and Scalable Predictive Uncertainty Estimation
using Deep Ensembles", NeurIPS 2017, arXiv:1612.01474 (the mean of probabilities).

Shape comments: m members, b inputs, c classes.
"""

from math import log

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metamerge.ensembles.kinds import consensus
from metamerge.ensembles.watching import Seen, check_outputs
from metamerge.errors import ConfigError
from metamerge.options import check_choice


def soft_vote(logits: Tensor) -> Tensor:
    """Average the members' probabilities.

    Args:
        logits: ``[m, b, c]``.

    Returns:
        Probabilities ``[b, c]``.
    """
    check_outputs("soft_vote", logits)
    return logits.softmax(-1).mean(0)


def log_soft_vote(logits: Tensor) -> Tensor:
    """Logarithms of the members' mean probabilities, finite where these are too small for a float.

    Args:
        logits: ``[m, b, c]``.

    Returns:
        ``[b, c]``.
    """
    check_outputs("soft_vote", logits)
    return logits.log_softmax(-1).logsumexp(0) - log(len(logits))


def majority_vote(logits: Tensor, tie_breaker: Tensor | None = None) -> Tensor:
    """Give every member one vote per input.

    Args:
        logits: ``[m, b, c]``.
        tie_breaker: Logits ``[b, c]`` of a model that chooses among the classes with the most
            votes; by default the sum of the members' probabilities does. What is equal even then
            goes to the lowest class.

    Returns:
        Predicted classes ``[b]``.

    Raises:
        ConfigError: If the tie breaker is not of the shape ``[b, c]``.
    """
    check_outputs("majority_vote", logits)
    if tie_breaker is not None and tie_breaker.shape != logits.shape[1:]:
        raise ConfigError(
            f"majority_vote: tie_breaker has shape {tuple(tie_breaker.shape)}, expected "
            f"{tuple(logits.shape[1:])}. Give the logits of one model on the same inputs."
        )
    preference = logits.softmax(-1).sum(0) if tie_breaker is None else tie_breaker.float()  # [b, c]
    preference = preference.clamp_min(torch.finfo(preference.dtype).min)  # -inf marks the others
    votes = _votes(logits)
    leading = votes == votes.amax(-1, keepdim=True)
    return preference.masked_fill(~leading, -torch.inf).argmax(-1)


@consensus(paper="arXiv:1612.01474", name="soft_vote", fitted=False)
class SoftVote(nn.Module):
    """The soft vote as a consensus of an ``Ensemble``."""

    options: dict = {}  # noqa: RUF012  (nothing to choose)

    def __init__(self) -> None:  # nn.Module's own takes any arguments
        super().__init__()

    def forward(self, seen: Seen) -> Tensor:
        """Logarithms of the mean of the members' probabilities, ``[m, b, c]`` -> ``[b, c]``."""
        return log_soft_vote(seen.outputs)


@consensus(name="majority_vote", fitted=False)
class MajorityVote(nn.Module):
    """The majority vote as a consensus of an ``Ensemble``.

    Its probabilities are shares of votes. One vote besides the members' is cut in two: a half goes
    to the class that ``majority_vote`` chooses, a half is dealt out as the tie breaker's
    probabilities (the members' mean ones without it) say. It can end ties and nothing else.

    Args:
        tie_breaker: Whether the last of the networks breaks ties and has no vote itself.
    """

    def __init__(self, *, tie_breaker: bool = False) -> None:
        super().__init__()
        check_choice("majority_vote", "tie_breaker", tie_breaker, (False, True))
        self.options = {"tie_breaker": tie_breaker}

    def forward(self, seen: Seen) -> Tensor:
        """Logarithms of shares of votes, ``[m, b, c]`` -> ``[b, c]``."""
        members, judge = seen.outputs, None
        if self.options["tie_breaker"]:
            check_outputs("majority_vote with a tie breaker", members[:-1])
            members, judge = members[:-1], members[-1]
        chosen = majority_vote(members, judge)
        preference = soft_vote(members if judge is None else judge[None])
        last = (F.one_hot(chosen, members.shape[-1]) + preference) / 2
        tiny = torch.finfo(last.dtype).tiny
        return ((_votes(members) + last) / (len(members) + 1)).clamp_min(tiny).log()


def _votes(logits: Tensor) -> Tensor:
    """Number of members that choose a class, ``[m, b, c]`` -> ``[b, c]``."""
    return F.one_hot(logits.argmax(-1), logits.shape[-1]).sum(0)
