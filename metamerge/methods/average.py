"""Average: the plain mean of all members.

Paper: Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves
accuracy without increasing inference time", ICML 2022, arXiv:2203.05482 (the uniform soup).
"""

from collections.abc import Sequence

from metamerge.methods._combination import combine
from metamerge.registry import merge_method
from metamerge.weights import Weights


@merge_method(paper="arXiv:2203.05482", per_tensor={}, pointwise=True)
def average(weights: Sequence[Weights]) -> Weights:
    """Average all members, each with the same coefficient.

    Args:
        weights: One state dict per member, of one architecture.

    Returns:
        New state dict with the members' names, shapes and dtypes.
    """
    return combine(weights, [1 / len(weights)] * len(weights))
