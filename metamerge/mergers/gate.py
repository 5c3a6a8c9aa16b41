"""The competence gate: which member knows which class, read from weights and answers to probes."""

import torch
from torch import Tensor, nn

from metamerge.calibration import predict
from metamerge.mergers.tokens import CLASS_FEATURES, class_tokens, log_probability
from metamerge.structure import Layout
from metamerge.weights import Weights

TOLD = 5  # numbers that the gate reads off per member and class


class CompetenceGate(nn.Module):
    """Weighs what members say by what can be read of their competence.

    The consensus logit of a class is ``sum_k beta[k] * (centred logit[k] * exp(scale[k]) +
    gamma[k])``, where ``beta`` is a softmax over members of a score per member, class and input: a
    level that is read from the class token, and how high and how decided the member's logits are on
    that input. No class has an identity here: relabelling all members in the same way relabels the
    outcome. A fresh gate trusts all members alike.

    Args:
        width: Size of the states of the output units.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(CLASS_FEATURES + width, width), nn.SiLU())
        self.mixer = nn.Sequential(
            nn.Linear(4 * width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.head = nn.Linear(width, TOLD)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(
        self, states: Tensor, rows: Tensor, bias: Tensor | None, logits: Tensor, spread: Tensor
    ) -> Tensor:
        """Read every member's competence.

        Args:
            states: States of the output units, ``[f, m, c, width]``.
            rows: Output rows of the members, ``[f, m, c, i]``.
            bias: Output biases, ``[f, m, c]``.
            logits: Members' logits on probes, ``[f, m, r, c]``.
            spread: Disagreement of the members, ``[f]``; where there is none, none is weighed.

        Returns:
            What ``consensus`` wants to know, ``[f, m, c, TOLD]``.
        """
        token = self.embed(torch.cat([class_tokens(rows, bias, logits), states], -1))
        context = [token.mean(d, keepdim=True).expand_as(token) for d in (1, 2)]
        peak = token.amax(1, keepdim=True).expand_as(token)
        told = self.head(self.mixer(torch.cat([token, *context, peak], -1)))
        return told * spread[:, None, None, None]


def shares(trust: Tensor, logits: Tensor) -> Tensor:
    """How much members of known competence are listened to.

    Args:
        trust: What the gate read, ``[f, m, c, TOLD]``.
        logits: Members' logits on any inputs, ``[f, m, b, c]``.

    Returns:
        Shares that sum to 1 over members, ``[f, m, b, c]``.
    """
    level, slope, decided = trust[:, :, None, :, :3].unbind(-1)  # [f, m, 1, c]
    likely = log_probability(logits)
    sure = likely.amax(-1, keepdim=True)
    score = level + slope * likely.clamp_min(-12) + decided * sure.clamp_min(-4)
    return score.softmax(1)


def consensus(trust: Tensor, logits: Tensor) -> Tensor:
    """What members of known competence say together.

    Args:
        trust: What the gate read, ``[f, m, c, TOLD]``.
        logits: Members' logits on any inputs, ``[f, m, b, c]``.

    Returns:
        Logits ``[f, b, c]``.
    """
    gamma, scale = trust[:, :, None, :, 3:].unbind(-1)  # [f, m, 1, c]
    offset = logits.mean(-1, keepdim=True)  # [f, m, b, 1]
    told = shares(trust, logits) * ((logits - offset) * scale.exp() + gamma)
    # the offset changes no probability, but keeps copies of one network exact
    return told.sum(1) + offset.mean(1)


def answers_of(members: Weights, layout: Layout, inputs: Tensor) -> Tensor:
    """Ask all members of several families.

    Args:
        members: ``[f, m, ...]``.
        layout: Their architecture.
        inputs: ``[b, ...]``.

    Returns:
        Logits, ``[f, m, b, c]``.
    """
    families, count = next(iter(members.values())).shape[:2]
    flat = {key: tensor.flatten(0, 1) for key, tensor in members.items()}
    return predict(flat, layout, inputs).unflatten(0, (families, count))


def is_choice(answers: Tensor) -> bool:
    """Whether members' answers are logits of classes, ``[m, b, c]``, one choice per input."""
    return answers.ndim == 3 and answers.shape[-1] > 1
