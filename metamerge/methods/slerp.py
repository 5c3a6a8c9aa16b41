"""SLERP: walk from one member to another along the great circle between them.

Paper: Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985,
doi:10.1145/325165.325242 (the formula for two unit vectors, used with vectors of any length).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from metamerge.errors import ConfigError
from metamerge.methods._directions import SCOPES, combine_by_angles
from metamerge.options import check_choice, check_number
from metamerge.registry import merge_method
from metamerge.weights import Weights

_COLINEAR = 0.9995  # cosine beyond which the circle is a line to the digits of float32


@merge_method(
    paper="doi:10.1145/325165.325242", ordered=True, per_tensor={"scope": "tensor"}, most=2
)
def slerp(weights: Sequence[Weights], *, t: float = 0.5, scope: str = "tensor") -> Weights:
    """Interpolate two members on the sphere.

    With the angle a between them, ``sin((1-t) a) / sin(a)`` times the first and ``sin(t a) /
    sin(a)`` times the second. Where one is all zeros or both lie on one line, and for running
    statistics, it is ``1-t`` and ``t``.

    Args:
        weights: Two state dicts of one architecture; a single one comes back as it is.
        t: Place on the way from the first (0) to the second (1), in [0, 1].
        scope: ``tensor`` walks for every tensor by itself, ``model`` for the vector of all.

    Returns:
        New state dict with the members' names, shapes and dtypes.

    Raises:
        ConfigError: If there are more than two members, or an option is out of its range.
    """
    check_number("slerp", "t", t, "[0, 1]")
    check_choice("slerp", "scope", scope, SCOPES)
    if len(weights) > 2:
        raise ConfigError(
            f"slerp: got {len(weights)} members, expected 2. Use method='karcher_mean', which is "
            f"the same for any number."
        )
    if len(weights) == 1:
        return combine_by_angles(weights, torch.ones_like, scope="tensor", shares=[1.0])

    def choose(products: Tensor) -> Tensor:
        return _on_the_circle(products, t)

    return combine_by_angles(weights, choose, scope=scope, shares=[1 - t, t])


def _on_the_circle(products: Tensor, t: float) -> Tensor:
    """Coefficients of two vectors from their inner products, ``[2, 2]`` -> ``[2]``."""
    straight = products.new_tensor([1 - t, t])
    squares = products.diagonal()
    if bool((squares == 0).any()):
        return straight
    cosine = products[0, 1] / squares.prod().sqrt()
    if float(cosine.detach().abs()) > _COLINEAR:
        return straight
    angle = cosine.acos()
    return (angle * straight).sin() / angle.sin()
