"""Votes: ask all members and let them decide together; what merged networks must be compared with.

Paper: Lakshminarayanan, Pritzel, Blundell, "Simple and Scalable Predictive Uncertainty Estimation
using Deep Ensembles", NeurIPS 2017, arXiv:1612.01474 (the mean of probabilities).

Shape comments: m members, b inputs, c classes.
"""

from math import log

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metamerge.errors import ConfigError, IncompatibleWeights
from metamerge.structure import Program, run
from metamerge.weights import Weights


def soft_vote(logits: Tensor) -> Tensor:
    """Average the members' probabilities.

    Args:
        logits: ``[m, b, c]``.

    Returns:
        Probabilities ``[b, c]``.
    """
    _check_logits("soft_vote", logits)
    return logits.softmax(-1).mean(0)


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
    _check_logits("majority_vote", logits)
    if tie_breaker is not None and tie_breaker.shape != logits.shape[1:]:
        raise ConfigError(
            f"majority_vote: tie_breaker has shape {tuple(tie_breaker.shape)}, expected "
            f"{tuple(logits.shape[1:])}. Give the logits of one model on the same inputs."
        )
    preference = logits.softmax(-1).sum(0) if tie_breaker is None else tie_breaker.float()  # [b, c]
    preference = preference.clamp_min(torch.finfo(preference.dtype).min)  # -inf marks the others
    votes = F.one_hot(logits.argmax(-1), logits.shape[-1]).sum(0)  # [b, c]
    leading = votes == votes.amax(-1, keepdim=True)
    return preference.masked_fill(~leading, -torch.inf).argmax(-1)


class Ensemble(nn.Module):
    """The soft vote of several members as one network: logarithms of probabilities come out.

    Its state dict holds ``members.<name>``, ``[m, ...]``, for every name in those of the members.
    All of it is frozen, and computing is in float32.

    Args:
        program: The members' architecture.
        weights: Their stacked weights, every tensor ``[m, ...]``; they are copied.
    """

    def __init__(self, program: Program, weights: Weights) -> None:
        super().__init__()
        lengths = {tensor.shape[:1] for tensor in weights.values()}
        if len(lengths) != 1 or not all(len(length) and length[0] for length in lengths):
            raise IncompatibleWeights(
                f"Ensemble: the leading axes of the weights are {sorted(map(tuple, lengths))}, "
                f"expected one common number of members. Stack them with metamerge.weights.stack."
            )
        self.program = program
        self.members = nn.Module()
        for key, tensor in weights.items():
            kept = tensor.detach().clone()
            _put(self.members, key, kept.float() if kept.is_floating_point() else kept)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Run all members in one batched pass and average their probabilities.

        Args:
            *inputs: The network's inputs, batch axis first.

        Returns:
            Logarithms of probabilities, ``[b, c]``.
        """
        weights = {key: self.members.get_buffer(key) for key in self.program.parameters.values()}
        given = [x.float() if x.is_floating_point() else x for x in inputs]
        logits = run(self.program, weights, given, stacked=True)  # [m, b, c]
        return logits.log_softmax(-1).logsumexp(0) - log(len(logits))


def _put(module: nn.Module, key: str, tensor: Tensor) -> None:
    """Register a buffer under a dotted name, with the modules on the way to it."""
    *path, name = key.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module._modules[part]
    module.register_buffer(name, tensor)


def _check_logits(where: str, logits: Tensor) -> None:
    if logits.ndim != 3 or not len(logits):
        raise ConfigError(
            f"{where}: logits have shape {tuple(logits.shape)}, expected (members, inputs, "
            f"classes) with at least one member."
        )
