"""Loss and accuracy of mixtures of networks: on the line between two, or among many.

A mixture of a family's members is a row of coefficients ``[m]`` that sum to 1. ``lines`` and
``simplex`` give such rows, ``landscape`` scores all mixtures of all families at once.

Papers: Frankle, Dziugaite, Roy and Carbin, "Linear Mode Connectivity and the Lottery Ticket
Hypothesis", ICML 2020, arXiv:1912.05671; the barrier as in Entezari, Sedghi, Saukh and Neyshabur,
"The Role of Permutation Invariance in Linear Mode Connectivity of Neural Networks", ICLR 2022,
arXiv:2110.06296, equation 1, which is the excess of the loss over what the ends say on average.

Shape comments: f families, m members, p mixtures.
"""

from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from evaluation.metrics.classification import read_answers
from evaluation.metrics.regression import mean_squared_error, r2
from evaluation.metrics.scoring import at_once
from metamerge.corrections.batch_norm import recalibrate
from metamerge.structure import Program
from metamerge.weights import Weights
from zoo.training import predict


class Landscape(NamedTuple):
    """Loss and score of mixtures of members.

    Attributes:
        coefficients: Of the mixtures, ``[p, m]``.
        loss: Negative log-likelihood, or mean squared error, of the mixtures, ``[f, p]``.
        score: Accuracy, or R2, of the mixtures, ``[f, p]``.
        member_loss: Loss of the members, ``[f, m]``.
        member_score: Score of the members, ``[f, m]``.
    """

    coefficients: Tensor
    loss: Tensor
    score: Tensor
    member_loss: Tensor
    member_score: Tensor

    @property
    def excess(self) -> Tensor:
        """Loss beyond the members' losses, mixed by the same coefficients; ``[f, p]``."""
        return self.loss - self.member_loss @ self.coefficients.mT

    @property
    def lost(self) -> Tensor:
        """Score below the members' scores, mixed by the same coefficients; ``[f, p]``."""
        return self.member_score @ self.coefficients.mT - self.score


def lines(members: int, points: int = 11) -> tuple[list[tuple[int, int]], Tensor]:
    """Mixtures on the lines between all pairs of members, ends included.

    Args:
        members: Number of members.
        points: Mixtures on each line, at least 2.

    Returns:
        The pairs ``(i, j)``, i < j, and coefficients ``[pairs, points, m]`` in float64: the first
        of a line is member i, the last member j.
    """
    pairs = list(combinations(range(members), 2))
    time = torch.linspace(0, 1, points, dtype=torch.float64)
    coefficients = torch.zeros(len(pairs), points, members, dtype=torch.float64)
    for own, (first, second) in zip(coefficients, pairs, strict=True):
        own[:, first], own[:, second] = 1 - time, time
    return pairs, coefficients


def simplex(members: int, draws: int = 32, *, generator: torch.Generator) -> Tensor:
    """Mixtures of all members: their average, and others at random.

    Args:
        members: Number of members.
        draws: Mixtures beside the average, uniform on the simplex (Dirichlet with alpha 1).
        generator: Source of randomness.

    Returns:
        Coefficients ``[1 + draws, m]`` in float64, the average first.
    """
    drawn = torch.rand(draws, members, generator=generator, dtype=torch.float64)
    drawn = -(1 - drawn).log()  # of (0, 1]
    mean = torch.full((1, members), 1 / members, dtype=torch.float64)
    return torch.cat([mean, drawn / drawn.sum(1, keepdim=True)])


def mixtures(members: Weights, coefficients: Tensor) -> Weights:
    """Mix members by given coefficients.

    Args:
        members: ``[f, m, ...]``.
        coefficients: ``[p, m]``.

    Returns:
        ``[f, p, ...]``; what is not floating is the first member's.
    """
    mixed = {}
    for key, tensor in members.items():
        shape = (len(tensor), len(coefficients), *tensor.shape[2:])
        if tensor.is_floating_point():
            mixed[key] = (coefficients.to(tensor) @ tensor.flatten(2)).reshape(shape)
        else:
            mixed[key] = tensor[:, :1].expand(shape)
    return mixed


@torch.no_grad()
def landscape(
    program: Program,
    members: Weights,
    coefficients: Tensor,
    inputs: Tensor,
    targets: Tensor,
    *,
    calibration: Tensor | None = None,
) -> Landscape:
    """Score mixtures of members, as many networks at a time as fit into memory.

    Args:
        program: The architecture.
        members: ``[f, m, ...]``; aligned ones, where barriers after alignment are wanted.
        coefficients: Of the mixtures, ``[..., m]``; their leading axes are joined.
        inputs: ``[b, ...]``.
        targets: Classes ``[b]``, or ``[f, b]`` where families number them by themselves; or
            numbers ``[b, o]`` of a regression.
        calibration: Inputs that running statistics of batch normalisations are measured on, anew
            for every mixture; None mixes those of the members.

    Returns:
        What the mixtures and the members score.
    """
    count = coefficients.shape[-1]
    corners = torch.eye(count).to(coefficients)
    wanted = torch.cat([corners, coefficients.flatten(0, -2)])  # [m + p, m]
    families = len(next(iter(members.values())))
    size = at_once(program, {key: t[0, 0] for key, t in members.items()}, len(inputs))
    across = max(1, min(families, size // len(wanted)))  # families at a time
    own_targets = targets.ndim == 2 and not targets.is_floating_point()
    parts = []
    for start in range(0, families, across):
        at = slice(start, start + across)
        own = {key: tensor[at] for key, tensor in members.items()}
        classes = targets[at, None] if own_targets else targets
        parts += [
            torch.cat(
                [
                    _scored(program, own, some, inputs, classes, calibration)
                    for some in wanted.split(max(1, size // across))
                ],
                dim=2,
            )
        ]
    loss, score = torch.cat(parts, dim=1)  # [2, f, m + p]
    mixed = coefficients.flatten(0, -2).to(loss)
    return Landscape(mixed, loss[:, count:], score[:, count:], loss[:, :count], score[:, :count])


def _scored(
    program: Program,
    members: Weights,
    coefficients: Tensor,
    inputs: Tensor,
    targets: Tensor,
    calibration: Tensor | None,
) -> Tensor:
    """Loss and score of mixtures, ``[2, f, p]``."""
    mixed = mixtures(members, coefficients)
    shape = next(iter(mixed.values())).shape[:2]
    flat = {key: tensor.flatten(0, 1) for key, tensor in mixed.items()}
    if calibration is not None:
        flat = recalibrate(flat, program, calibration)
    outputs = predict(program, flat, inputs).unflatten(0, shape)
    if targets.is_floating_point():
        return torch.stack([mean_squared_error(outputs, targets), r2(outputs, targets)])
    answers = read_answers(outputs, targets)
    return torch.stack([answers.loss.mean(-1), answers.right.mean(-1)])


def barriers(
    program: Program,
    members: Weights,
    inputs: Tensor,
    targets: Tensor,
    *,
    points: int = 11,
    calibration: Tensor | None = None,
) -> Tensor:
    """Loss barrier between all pairs of members: the largest excess of the loss on their line.

    Args:
        program: The architecture.
        members: ``[f, m, ...]``.
        inputs: ``[b, ...]``.
        targets: As in ``landscape``.
        points: Mixtures on each line, ends included.
        calibration: As in ``landscape``.

    Returns:
        ``[f, m, m]``, symmetric, 0 on the diagonal; at least 0, since the ends have no excess.
    """
    count = next(iter(members.values())).shape[1]
    pairs, coefficients = lines(count, points)
    found = landscape(
        program, members, coefficients[:, 1:-1], inputs, targets, calibration=calibration
    )
    highest = found.excess.unflatten(1, (len(pairs), points - 2)).amax(2).clamp_min(0)
    matrix = highest.new_zeros(len(highest), count, count)
    for place, (first, second) in enumerate(pairs):
        matrix[:, first, second] = matrix[:, second, first] = highest[:, place]
    return matrix
