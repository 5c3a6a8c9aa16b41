"""Whether a row differs from another by more than the draw of families explains.

Rows are scored on the same families, so they are compared family by family. The interval says how
far the mean difference may lie from what was measured; the test says how often families that differ
by chance alone would make as large a difference.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from scipy.special import stdtr, stdtrit
from torch import Tensor

from evaluation.scored import Scored
from metamerge.errors import ConfigError

RESAMPLES = 10_000
LEVEL = 0.05
BEST = "best"
HOW = (
    "difference to the reference row, paired over families: 95 % interval by the bootstrap over "
    "families (10,000 resamples, percentiles expanded to Student's t), p by Student's paired test, "
    "corrected by Holm for all rows of one K; * is p < 0.05"
)


@dataclass(frozen=True)
class Difference:
    """What a row has beyond the reference.

    Attributes:
        against: Label of the reference row.
        mean: Mean difference in accuracy over families.
        low: Lower end of its 95 % interval; None with a single family.
        high: Upper end.
        p: Of no difference, corrected for the number of rows; None with a single family, and for
            the reference itself.
    """

    against: str
    mean: float
    low: float | None = None
    high: float | None = None
    p: float | None = None

    @property
    def significant(self) -> bool:
        """Whether chance alone is an unlikely explanation."""
        return self.p is not None and self.p < LEVEL

    def record(self) -> dict[str, str | float | None]:
        """What ``leaderboard.json`` holds of it."""
        numbers = {"difference": self.mean, "low": self.low, "high": self.high, "p": self.p}
        rounded = {k: None if v is None else round(v, 6) for k, v in numbers.items()}
        return {"against": self.against, **rounded}


def find_reference(scored: Sequence[Scored], name: str) -> Scored:
    """The row that all others of its number of members are held against.

    Args:
        scored: Rows of one number of members.
        name: Its method, or method and images as tables show them; ``best`` for the most accurate
            row that is no control.

    Returns:
        The row; where a method was given several budgets, that with the fewest images.

    Raises:
        ConfigError: If there is no such row.
    """
    if name == BEST:
        merges = [one for one in scored if not one.control] or list(scored)
        return max(merges, key=lambda one: float(one.accuracies.mean()))
    for one in scored:
        if name in (one.label, one.method):
            return one
    known = ", ".join(dict.fromkeys(one.label for one in scored))
    raise ConfigError(f"reference: no row {name!r}. There are: {BEST}, {known}.")


def against_reference(scored: Sequence[Scored], reference: Scored) -> list[Difference]:
    """Compare rows with one of them, family by family.

    Paper: Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of
    Statistics 6(2), 1979, for p; Hesterberg, "What Teachers Should Know About the Bootstrap", The
    American Statistician 69(4), 2015, section 4.3, for the expanded percentiles.

    Args:
        scored: Rows of one number of members, over the same families.
        reference: One of them.

    Returns:
        One difference per row, in their order.
    """
    gaps = torch.stack([one.accuracies.double() - reference.accuracies for one in scored])  # [r, f]
    means, label = gaps.mean(1).tolist(), reference.label
    if gaps.shape[1] < 2:
        return [Difference(label, mean) for mean in means]
    low, high = bootstrap_interval(gaps)
    others = [place for place, one in enumerate(scored) if one is not reference]
    corrected = dict(zip(others, holm(paired_t_p(gaps[others])).tolist(), strict=True))
    return [
        Difference(label, means[place], float(low[place]), float(high[place]), corrected.get(place))
        for place in range(len(scored))
    ]


def bootstrap_interval(gaps: Tensor) -> tuple[Tensor, Tensor]:
    """95 % interval of mean differences, by resampling families.

    Args:
        gaps: Differences, ``[r, f]`` with at least two families.

    Returns:
        Lower and upper ends, each ``[r]``.
    """
    families = gaps.shape[1]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(families, (RESAMPLES, families), generator=generator)
    counts = torch.zeros(RESAMPLES, families, dtype=gaps.dtype)
    counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=gaps.dtype))
    means = gaps @ counts.T / families  # [r, resamples]
    # percentiles of few families lie too near: the bootstrap's spread lacks (f - 1) / f, and t has
    # heavier tails than the normal distribution
    wide = float(stdtrit(families - 1, 1 - LEVEL / 2)) * (families / (families - 1)) ** 0.5
    tail = NormalDist().cdf(-wide)
    return means.quantile(tail, dim=1), means.quantile(1 - tail, dim=1)


def paired_t_p(gaps: Tensor) -> Tensor:
    """Two-sided p of mean differences, by Student's test of paired samples.

    Args:
        gaps: Differences, ``[r, f]`` with at least two families.

    Returns:
        ``[r]``; 1 where no family differs.
    """
    means, families = gaps.mean(1), gaps.shape[1]
    errors = gaps.std(1, correction=1) / families**0.5
    statistic = (means.abs() / errors).where(means.abs() > 1e-12, 0.0)
    return torch.from_numpy(2 * stdtr(families - 1, -statistic.numpy()))


def holm(p: Tensor) -> Tensor:
    """Correct p-values of several tests, step down.

    Args:
        p: ``[r]``.

    Returns:
        ``[r]``, at most 1.
    """
    order = p.argsort()
    factors = torch.arange(len(p), 0, -1, dtype=p.dtype)
    stepped = (p[order] * factors).cummax(0).values.clamp_max(1.0) if len(p) else p
    corrected = torch.empty_like(p)
    corrected[order] = stepped
    return corrected
