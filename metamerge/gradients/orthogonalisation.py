"""Orthogonalised gradients: what several gradients agree on counts once, the rest in full.

The gradients of k parts of the data are brought into an order and pass through Gram-Schmidt; the
step is the sum of what is left of them. Of k equal gradients that is one of them, of k orthogonal
ones their sum. Gradient surgery (Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS
2020, arXiv:2001.06782) takes projections away only where two gradients point against each other;
here they go wherever two are not orthogonal, and each vector is cleared of all before it.

The step is no gradient of anything. Where the mean gradient vanishes and its parts do not, it goes
on along the first of them; of two gradients in increasing order it may even point uphill.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metamerge.errors import ConfigError

ORDERS = ("increasing", "decreasing", "given")
"""By norm, shortest or longest first, or as the gradients come."""

_DEPENDENT = 8  # times the precision: squared residuals below it are rounding, not a direction


def orthogonalise(
    gradients: Tensor, *, order: str = "increasing", leak: float = 0.0, kept: Tensor | None = None
) -> Tensor:
    """Sum k gradients after Gram-Schmidt, for any number of independent runs at once.

    The first vector stays whole; from each other the projection onto the span of those before it is
    taken away. No vector is normalised. A vector that lies in that span, as one of zeros does,
    adds nothing and takes nothing away. All follows from the k x k products of the gradients, so
    that the p numbers of a vector are read twice, whatever k is. The price is precision: of a
    vector in float32, a residual below a thousandth of its length counts as lying in the span.

    Args:
        gradients: ``[..., k, p]``, not modified.
        order: One of ``ORDERS``; equal norms keep the order they come in.
        leak: Share of every projection that is left in place, in [0, 1]; with 1 the result is the
            plain sum.
        kept: Which vectors take part, bool ``[..., k]``; None for all. See ``keep_some``.

    Returns:
        The step's direction, ``[..., p]``, in the gradients' dtype.

    Raises:
        ConfigError: If an option is out of range, or a shape does not fit.

    Examples:
        >>> orthogonalise(torch.tensor([[1.0, 0.0], [2.0, 2.0]])).tolist()  # [1, 0] + [0, 2]
        [1.0, 2.0]
    """
    if order not in ORDERS:
        raise ConfigError(f"orthogonalise: order must be one of {ORDERS}, got {order!r}.")
    if not 0 <= leak <= 1:
        raise ConfigError(f"orthogonalise: leak must be in [0, 1], got {leak}.")
    if gradients.ndim < 2 or (kept is not None and kept.shape != gradients.shape[:-1]):
        raise ConfigError(
            f"orthogonalise: expected gradients [..., k, p] and kept [..., k], got "
            f"{tuple(gradients.shape)} and {None if kept is None else tuple(kept.shape)}."
        )
    products = (gradients @ gradients.mT).double()  # [..., k, k]
    if kept is not None:
        both = kept.unsqueeze(-1) & kept.unsqueeze(-2)
        products = products.where(both, 0.0)
    precision = torch.finfo(gradients.dtype).eps
    shares = _shares(products, order, _DEPENDENT * precision)  # [..., k]
    alive = 1.0 if kept is None else kept.double()
    shares = (1 - leak) * shares + leak * alive
    return (shares.to(gradients.dtype).unsqueeze(-2) @ gradients).squeeze(-2)


def keep_some(draws: Tensor, dropped: float) -> Tensor:
    """Drop vectors at random, never all of a run.

    Args:
        draws: Random numbers in [0, 1), ``[..., k]``.
        dropped: Probability that a vector is left out, in [0, 1).

    Returns:
        Which are kept, bool ``[..., k]``; that of the largest number always is.

    Raises:
        ConfigError: If ``dropped`` is out of range.
    """
    if not 0 <= dropped < 1:
        raise ConfigError(f"keep_some: dropped must be in [0, 1), got {dropped}.")
    return (draws >= dropped) | (draws == draws.amax(-1, keepdim=True))


def _shares(products: Tensor, order: str, dependent: float) -> Tensor:
    """What each vector is multiplied by in the sum of the orthogonalised ones, ``[..., k]``."""
    squares = products.diagonal(dim1=-2, dim2=-1)  # [..., k]
    if order == "given":
        return _sum_of_residuals(products, dependent)
    places = squares.argsort(dim=-1, descending=order == "decreasing", stable=True)
    rows = products.gather(-2, places.unsqueeze(-1).expand_as(products))
    ordered = rows.gather(-1, places.unsqueeze(-2).expand_as(products))
    return torch.empty_like(squares).scatter_(-1, places, _sum_of_residuals(ordered, dependent))


def _sum_of_residuals(products: Tensor, dependent: float) -> Tensor:
    """Gram-Schmidt in the order given, on the products ``L D L^T`` alone; ``made`` is ``L^-1``."""
    count = products.shape[-1]
    made = torch.eye(count, dtype=products.dtype, device=products.device).expand_as(products)
    made = made.clone()
    inverse = torch.zeros_like(products[..., 0])  # one over the squared norms of residuals, or 0
    for i in range(count):
        if i:
            before = made[..., :i, :]  # [..., i, k]
            along = (before @ products[..., i, :, None]).squeeze(-1)  # g_i on earlier residuals
            taken = (along * inverse[..., :i]).unsqueeze(-2)
            made[..., i, :] -= (taken @ before).squeeze(-2)
        row = made[..., i, :]
        left = (row.unsqueeze(-2) @ products @ row.unsqueeze(-1)).squeeze((-1, -2))
        alone = left <= dependent * products[..., i, i]  # false where something is NaN
        made[..., i, :] = row.masked_fill(alone.unsqueeze(-1), 0.0)
        inverse[..., i] = left.reciprocal().masked_fill(alone, 0.0)
    return made.sum(-2)
