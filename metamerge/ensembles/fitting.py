"""Fitting few numbers to few labels: L-BFGS with a ridge whose strength cross-validation chooses.

Paper: Stone, "Cross-Validatory Choice and Assessment of Statistical Predictions", Journal of the
Royal Statistical Society B 36(2), 1974.

Every fitted consensus starts where it says the same as the plain vote, and the ridge pulls back to
that start. So what the labels do not tell is left to the vote, and the vote itself, an infinite
ridge, is among the candidates.

Shape comments: r problems side by side, b inputs, c classes.
"""

from collections.abc import Callable, Sequence
from math import inf
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metamerge.ensembles.votes import log_soft_vote
from metamerge.ensembles.watching import check_features, features, spread

Scores = Callable[[Tensor], Tensor]
"""Numbers ``[r, ...]`` -> unnormalised logarithms of probabilities ``[r, b, c]``."""

Added = Callable[[Tensor], Tensor]
"""Numbers ``[r, ...]`` -> what they add to the scores of the soft vote, ``[r, b, c]``."""

STRENGTHS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # for what reads a table of features
FOLDS = 5
STEPS = 30  # of L-BFGS per strength; each starts where the one before has arrived


class Fitted(NamedTuple):
    """The numbers, in float64, and what is told of how they were found."""

    numbers: Tensor
    told: dict[str, Any]


def fit(
    scores_of: Callable[[Tensor], Scores],
    start: Tensor,
    labels: Tensor,
    *,
    strengths: Sequence[float],
    generator: torch.Generator | None = None,
    turns: int = FOLDS,
) -> Fitted:
    """Fit numbers to labels, pulled towards a start as strongly as serves held-out labels best.

    Minimises the mean cross entropy plus ``strength`` times the squared distance to the start. All
    folds are fitted side by side, every strength starting from the result of the one before.

    Args:
        scores_of: Given which inputs each problem may look at, ``[r, b]``: what numbers say on all
            inputs; differentiable, and each problem on its own.
        start: Where to start and where to stay in doubt, ``[...]``.
        labels: ``[b]``.
        strengths: Ridges to choose from, falling; the start itself is always among the candidates.
        generator: Deals inputs to folds; without it a fixed seed.
        turns: How many of the five folds are held out in turn; fewer take less time.

    Returns:
        The numbers, and per strength the mean cross entropy on held-out inputs.
    """
    start = start.double()
    folds = fold_rows(labels, generator)[:turns]  # [r, b], True where held out
    scores = scores_of(~folds)
    path = start.expand(len(folds), *start.shape)
    held_out = {inf: _held_out(scores(path), labels, folds)}
    for strength in strengths if len(labels) > 1 else ():
        path = descend(scores, path, start, labels, (~folds).double(), strength)
        held_out[strength] = _held_out(scores(path), labels, folds)
    chosen = min(held_out, key=held_out.__getitem__)  # the strongest of equals
    everything = torch.ones_like(folds[:1])
    numbers, scores = start[None], scores_of(everything)
    for strength in (s for s in strengths if s >= chosen):
        numbers = descend(scores, numbers, start, labels, everything.double(), strength)
    told = {
        "ridge": "infinite" if chosen == inf else chosen,
        "held_out_loss": {"infinite" if s == inf else str(s): v for s, v in held_out.items()},
    }
    return Fitted(numbers[0], told)


def fit_on_vote(
    where: str,
    outputs: Tensor,
    labels: Tensor,
    added: Callable[[Tensor], Added],
    *,
    shape: Sequence[int],
    of: str,
    generator: torch.Generator | None = None,
    report: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Fit numbers that read a table of features; what they say is added to the soft vote's scores.

    Args:
        where: Name of the consensus, for messages.
        outputs: What members say, ``[m, b, c]``.
        labels: ``[b]``.
        added: Given the table, ``[m, b, c]``: what numbers add.
        shape: Shape of the numbers; with zeros they add nothing.
        of: What the table holds; see ``features``.
        generator: Deals inputs to folds; without it a fixed seed.
        report: Takes the ridge and the losses on held-out inputs.

    Returns:
        The numbers, and what logits are divided by, ``[m]``; both in float32.

    Raises:
        ConfigError: If ``of`` is unknown.
    """
    check_features(where, of)
    logits = outputs.double()
    scale = spread(logits) if of == "logits" else logits.new_ones(len(logits))
    vote, read = log_soft_vote(logits), added(features(logits, scale, of))
    found = fit(
        lambda _: lambda numbers: vote + read(numbers),
        logits.new_zeros(*shape),
        labels,
        strengths=STRENGTHS,
        generator=generator,
    )
    if report is not None:
        report.update(found.told)
    return found.numbers.float(), scale.float()


def fold_rows(labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Deal inputs to folds of equal size, whatever their classes.

    Folds with the classes of all would let a skew that chance brought into few labels look real.

    Args:
        labels: ``[b]``.
        generator: Randomness; without it a fixed seed.

    Returns:
        ``[folds, b]``, True where an input is held out; every input is in one fold. With fewer than
        five inputs there is a fold for each.
    """
    generator = generator or torch.Generator().manual_seed(0)
    drawn = torch.randperm(len(labels), generator=generator, device=generator.device)
    fold = drawn.to(labels.device) % FOLDS
    return fold == torch.arange(min(FOLDS, len(labels)), device=labels.device)[:, None]


def _held_out(scores: Tensor, labels: Tensor, folds: Tensor) -> float:
    return float((_losses(scores.detach(), labels) * folds).sum() / folds.sum())


def _losses(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross entropies, ``[r, b, c]`` and ``[b]`` -> ``[r, b]``."""
    return F.cross_entropy(scores.mT, labels.expand(len(scores), -1), reduction="none")


@torch.enable_grad()
def descend(
    scores: Scores, numbers: Tensor, start: Tensor, labels: Tensor, seen: Tensor, strength: float
) -> Tensor:
    """Minimise several problems together; they share steps, but no numbers.

    Args:
        scores: What the numbers say on all inputs.
        numbers: Where to go from, ``[r, ...]``.
        start: What the ridge pulls to.
        labels: ``[b]``.
        seen: Weight of every input in every problem, ``[r, b]``.
        strength: Of the ridge.

    Returns:
        Numbers ``[r, ...]``.
    """
    numbers = numbers.detach().clone().requires_grad_()
    weights = seen / seen.sum(1, keepdim=True).clamp_min(1)  # [r, b]
    search = torch.optim.LBFGS(
        [numbers],
        max_iter=STEPS,
        history_size=20,
        tolerance_grad=1e-7,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        search.zero_grad()
        loss = (_losses(scores(numbers), labels) * weights).sum()
        loss = loss + strength * (numbers - start).square().sum()
        loss.backward()
        return loss

    search.step(closure)
    return numbers.detach()
