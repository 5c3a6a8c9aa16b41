"""Task arithmetic: add task vectors, what fine-tuning changed, to the common base.

Paper: Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023, arXiv:2212.04089
(section 4; the paper's plain sum with factor a is ``coefficients=[a, a, ...]``).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from metamerge.errors import ConfigError
from metamerge.methods._task_vectors import add_task_vectors
from metamerge.options import check_number
from metamerge.registry import merge_method
from metamerge.weights import Weights


@merge_method(paper="arXiv:2212.04089", align=None, per_tensor={}, pointwise=True)
def task_arithmetic(
    weights: Sequence[Weights],
    *,
    base: Weights,
    scale: float = 1.0,
    coefficients: Sequence[float] | None = None,
) -> Weights:
    """Add the members' task vectors to the base, each times a coefficient.

    Running statistics are averaged, whatever the coefficients.

    Args:
        weights: One state dict per member, fine-tuned from ``base``.
        base: What they were fine-tuned from.
        scale: Factor on the sum of task vectors; 0 gives back the base.
        coefficients: One number per member, by default 1 over their number: the mean of the task
            vectors. A negative one takes away what that member learned.

    Returns:
        New state dict with the members' names, shapes and dtypes.

    Raises:
        ConfigError: If there are more or fewer coefficients than members, or a number is not
            finite.
    """
    check_number("task_arithmetic", "scale", scale)
    shares = _shares(coefficients, len(weights))
    factors = torch.tensor(shares, dtype=torch.float64) * float(scale)  # [m]

    def fuse(_: str, vectors: Tensor) -> Tensor:
        return factors.to(vectors) @ vectors

    return add_task_vectors(weights, base, fuse)


def _shares(coefficients: Sequence[float] | None, members: int) -> list[float]:
    if coefficients is None:
        return [1 / members] * members
    try:
        numbers = [float(number) for number in coefficients]
    except (TypeError, ValueError):
        raise ConfigError(
            f"task_arithmetic: coefficients is {coefficients!r}, expected a sequence of numbers. "
            f"Write coefficients=[0.4, 0.4]."
        ) from None
    if len(numbers) != members:
        raise ConfigError(
            f"task_arithmetic: there are {len(numbers)} coefficients and {members} members. Give "
            f"one coefficient per member, in the order of the members."
        )
    for index, number in enumerate(numbers):
        check_number("task_arithmetic", f"coefficients[{index}]", number)
    return numbers
