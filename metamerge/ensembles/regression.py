"""Ensembles of networks that put out numbers: mean, weighted mean, and stacked mean.

Papers: Breiman, "Stacked Regressions", Machine Learning 24, 1996 (least squares on the members'
predictions, with weights of 0 or above); Lawson, Hanson, "Solving Least Squares Problems", 1974
(the algorithm behind them).

Shape comments: m members, b inputs, o outputs.
"""

from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from metamerge.ensembles.fitting import fold_rows
from metamerge.ensembles.kinds import consensus
from metamerge.ensembles.watching import Seen, check_outputs
from metamerge.errors import ConfigError
from metamerge.options import check_choice

STRENGTHS = (inf, 10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4)
_BY = ("inverse", "softmax")
_SIGNS = ("positive", "any")


@consensus(fitted=False, numbers=True)
def mean() -> "LinearPool":
    """Average the members' outputs.

    Returns:
        The consensus.
    """
    return LinearPool()


@consensus(numbers=True)
def weighted_mean(
    seen: Seen, targets: Tensor, *, by: str = "inverse", report: dict[str, Any] | None = None
) -> "LinearPool":
    """Weigh members by their mean squared error, every output divided by its targets' spread.

    Args:
        seen: What members say about the inputs.
        targets: What they should say, ``[b, o]``.
        by: ``inverse`` of the errors, which is best for members without bias whose errors are
            independent; or ``softmax`` of minus the errors over the smallest of them.
        report: Takes errors and weights.

    Returns:
        The consensus.

    Raises:
        ConfigError: If ``by`` is unknown, or targets do not fit the outputs.
    """
    check_choice("weighted_mean", "by", by, _BY)
    outputs, wanted = _standardised("weighted_mean", seen.outputs, targets)
    errors = (outputs - wanted).square().mean((1, 2)).clamp_min(1e-12)  # [m]
    relative = errors / errors.min()
    weights = 1 / relative if by == "inverse" else (-relative).softmax(0)
    weights = weights / weights.sum()
    if report is not None:
        report.update(errors=errors.tolist(), weights=weights.tolist())
    return LinearPool(weights.float())


@consensus(paper="doi:10.1007/BF00117832", numbers=True)
def stacked_mean(
    seen: Seen,
    targets: Tensor,
    *,
    sign: str = "positive",
    generator: torch.Generator | None = None,
    report: dict[str, Any] | None = None,
) -> "LinearPool":
    """Fit the members' weights by least squares, with a ridge towards the plain mean.

    Args:
        seen: What members say about the inputs.
        targets: What they should say, ``[b, o]``; every output is divided by their spread.
        sign: ``positive`` for weights of 0 or above, ``any`` for weights below 0 as well. They need
            not sum to 1.
        generator: Deals inputs to the folds that choose the ridge.
        report: Takes ridge, weights and the errors on held-out inputs.

    Returns:
        The consensus.

    Raises:
        ConfigError: If ``sign`` is unknown, or targets do not fit the outputs.
    """
    check_choice("stacked_mean", "sign", sign, _SIGNS)
    outputs, wanted = _standardised("stacked_mean", seen.outputs, targets)
    folds = fold_rows(torch.zeros(len(targets), dtype=torch.long, device=targets.device), generator)
    errors = {s: _held_out(outputs, wanted, folds, s, sign) for s in STRENGTHS}
    chosen = min(errors, key=errors.__getitem__)  # the strongest of equals
    weights = _least_squares(outputs, wanted, chosen, sign)
    if report is not None:
        named = {"infinite" if s == inf else str(s): e for s, e in errors.items()}
        ridge = "infinite" if chosen == inf else chosen
        report.update(ridge=ridge, held_out_error=named, weights=weights.tolist())
    return LinearPool(weights.float())


class LinearPool(nn.Module):
    """A weighted sum of the members' outputs.

    Args:
        weights: ``[m]``; without them, the mean of however many members.
    """

    options: dict = {}  # noqa: RUF012  (nothing to choose)

    def __init__(self, weights: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weights", weights)

    def forward(self, seen: Seen) -> Tensor:
        """The sum, ``[m, b, o]`` -> ``[b, o]``."""
        if self.weights is None:
            check_outputs("mean", seen.outputs)
            return seen.outputs.mean(0)
        check_outputs("weighted_mean", seen.outputs, len(self.weights))
        return torch.einsum("m,mbo->bo", self.weights.to(seen.outputs), seen.outputs)


def _standardised(where: str, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and targets in float64, divided by the spread of the targets per output."""
    check_outputs(where, outputs)
    if targets.shape != outputs.shape[1:] or not targets.isfinite().all() or not len(targets):
        raise ConfigError(
            f"{where}: targets have shape {tuple(targets.shape)}, expected "
            f"{tuple(outputs.shape[1:])} finite numbers, those that the members should put out."
        )
    wanted = targets.double()
    spread = wanted.std(0, correction=0)
    spread = spread.where(spread > 0, 1.0)
    return outputs.double() / spread, wanted / spread


def _held_out(outputs: Tensor, wanted: Tensor, folds: Tensor, strength: float, sign: str) -> float:
    """Mean squared error on the rows of each fold, of weights fitted to all others."""
    total = 0.0
    for out in folds:
        seen = ~out if len(folds) > 1 else out
        weights = _least_squares(outputs[:, seen], wanted[seen], strength, sign)
        said = torch.einsum("m,mbo->bo", weights, outputs[:, out])
        total += float((said - wanted[out]).square().sum())
    return total / wanted.numel()


def _least_squares(outputs: Tensor, wanted: Tensor, strength: float, sign: str) -> Tensor:
    """Weights ``[m]`` of ``||sum_k w_k y_k - y||^2 + strength * trace * ||w - 1/m||^2``."""
    members = len(outputs)
    uniform = outputs.new_full((members,), 1 / members)
    if strength == inf:
        return uniform
    table = outputs.flatten(1).T  # [b * o, m]
    pull = (strength * table.square().sum() / members).sqrt()
    rows = torch.cat([table, pull * torch.eye(members).to(table)])
    aims = torch.cat([wanted.flatten(), pull * uniform])
    if sign == "any":
        return torch.linalg.lstsq(rows, aims[:, None]).solution[:, 0]
    from scipy.optimize import nnls  # takes a while to import

    return torch.from_numpy(nnls(rows.cpu().numpy(), aims.cpu().numpy())[0]).to(table)
