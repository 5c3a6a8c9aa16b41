"""DARE: drop entries of every task vector at random, and rescale those that are left.

Paper: Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a
Free Lunch", ICML 2024, arXiv:2311.03099 (section 3.2; its drop rate p is ``1 - density``).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from metamerge.methods._task_vectors import add_task_vectors, agreed
from metamerge.options import check_choice, check_number
from metamerge.registry import merge_method
from metamerge.weights import Weights

_DRAWN = 2**20  # entries that are drawn at a time


@merge_method(
    paper="arXiv:2311.03099",
    align=None,
    ordered=True,  # members draw one after the other
    elementwise=True,
    neutral={"density": 1.0, "scale": 1.0},
    per_tensor={},
)
def dare(
    weights: Sequence[Weights],
    *,
    base: Weights,
    generator: torch.Generator,
    density: float = 0.5,
    scale: float = 1.0,
    elect: bool = False,
) -> Weights:
    """Add to the base the mean of task vectors of which only some entries, drawn at random, stay.

    Entries that stay are divided by ``density``, so that none changes in expectation.

    Args:
        weights: One state dict per member, fine-tuned from ``base``.
        base: What they were fine-tuned from.
        generator: Randomness.
        density: Probability of an entry to stay, in (0, 1].
        scale: Factor on the merged task vector; 0 gives back the base.
        elect: Whether, as in TIES, one sign is elected per entry and only those who agree are
            averaged; otherwise all are.

    Returns:
        New state dict with the members' names, shapes and dtypes; running statistics are averaged.

    Raises:
        ConfigError: If an option is out of its range.
    """
    check_number("dare", "density", density, "(0, 1]")
    check_number("dare", "scale", scale)
    check_choice("dare", "elect", elect, (False, True))

    def staying(tensor: Tensor) -> Tensor:
        pieces = tensor.new_empty(tensor.numel(), dtype=torch.bool, device=generator.device)
        for piece in pieces.split(_DRAWN):
            chances = torch.full(piece.shape, float(density), device=generator.device)
            piece.copy_(torch.bernoulli(chances, generator=generator))
        return pieces.reshape(tensor.shape).to(tensor.device)

    def fuse(_: str, vectors: Tensor) -> Tensor:
        merged = agreed(vectors) if elect else vectors.mean(0)
        return scale / density * merged

    return add_task_vectors(weights, base, fuse, staying if density < 1 else None)
