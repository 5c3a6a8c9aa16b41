"""Which weights are trained, by name.

``random@0.25~20`` is a quarter of the kernels of every layer at random, drawn anew every 20 steps.
A family of masks puts the kernels of every layer (or the single weights of every tensor) into an
order, whose first part is live. Masks that rotate go on along the order, or draw another one.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor

from metamerge.errors import ConfigError
from metamerge.subsets import (
    Kernels,
    Live,
    Subset,
    by_kernel,
    hessian_diagonal,
    hessian_product,
    rows_subset,
    saliencies,
    single_subset,
    squared_interactions,
    summed_interactions,
    two_groups,
    window,
)
from metamerge.weights import Weights, stack

FULL = "full"
FAMILIES = {
    FULL: "all weights",
    "first": "the first kernels of every layer",
    "first-conv": "the first kernels of every convolution; fully connected layers are fixed",
    "first-conv+dense": "the first kernels of every convolution, and fully connected layers whole",
    "random": "kernels of every layer at random",
    "weak": "kernels that interact least with the fixed ones, by the Hessian",
    "strong": "kernels that interact most with the fixed ones, by the Hessian",
    "salient": "kernels of the largest optimal-brain-damage saliency in every layer",
    "unsalient": "kernels of the smallest saliency in every layer",
    "upper": "the last layers whole",
    "lower": "the first layers whole",
    "random-weights": "single weights of every tensor at random",
    "salient-weights": "single weights of the largest saliency in every tensor",
    "unsalient-weights": "single weights of the smallest saliency in every tensor",
}
INTERACTIONS = ("sums", "norms")
_CURVED = ("weak", "strong", "salient", "unsalient", "salient-weights", "unsalient-weights")
_NAME = re.compile(r"(?P<family>[a-z+-]+)(@(?P<share>[0-9.]+))?(~(?P<period>[0-9]+))?")


@dataclass(frozen=True)
class Recipe:
    """A mask by its name.

    Attributes:
        name: As it was given.
        family: One of ``FAMILIES``.
        share: Part of the kernels, weights or layers that is live.
        period: Steps between two draws; 0 for a mask that stays.
    """

    name: str
    family: str
    share: float = 0.5
    period: int = 0

    @classmethod
    def parse(cls, name: str) -> "Recipe":
        """Read ``family[@share][~period]``.

        Args:
            name: Such a text.

        Returns:
            The recipe.

        Raises:
            ConfigError: If it is none, or makes no sense.
        """
        found = _NAME.fullmatch(name)
        if not found or found["family"] not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise ConfigError(f"masks: got {name!r}, expected family[@share][~period]: {known}.")
        recipe = cls(name, found["family"], float(found["share"] or 0.5), int(found["period"] or 0))
        if not 0 < recipe.share < 1:
            raise ConfigError(f"masks: {name!r} has share {recipe.share}, expected 0 to 1.")
        if recipe.period and recipe.family in (FULL, "upper", "lower"):
            raise ConfigError(f"masks: {name!r}: {recipe.family!r} does not rotate.")
        return recipe

    @property
    def single(self) -> bool:
        """Whether single weights are live, of which no product can be left out."""
        return self.family.endswith("-weights")

    @property
    def curved(self) -> bool:
        """Whether it needs the Hessian."""
        return self.family in _CURVED


@dataclass(frozen=True, eq=False)
class Curvature:
    """What masks need to know of the Hessian at a network.

    Attributes:
        loss: Trained tensors of the network -> loss on some training rows.
        weights: These tensors.
        kernels: Of the network.
        interactions: ``sums`` of the Hessian over pairs of kernels, or ``norms`` of its blocks.
        probes: Vectors of random signs for its diagonal.
        seed: Of these vectors.
    """

    loss: Callable[[Weights], Tensor]
    weights: Weights
    kernels: Sequence[Kernels]
    interactions: str = "sums"
    probes: int = 16
    seed: int = 0

    @cached_property
    def affinity(self) -> Tensor:
        """How much every two kernels interact, ``[kernels, kernels]``, not negative."""
        product = hessian_product(self.loss, self.weights)
        if self.interactions == "sums":
            return summed_interactions(product, self.weights, self.kernels).abs()
        squares = squared_interactions(
            product, self.weights, self.kernels, generator=_generator(self.seed)
        )
        return squares.sqrt()

    @cached_property
    def saliency(self) -> Weights:
        """Optimal-brain-damage saliency of every weight."""
        product = hessian_product(self.loss, self.weights)
        generator = _generator(self.seed)
        diagonal = hessian_diagonal(product, self.weights, probes=self.probes, generator=generator)
        return saliencies(diagonal, self.weights)


@dataclass(frozen=True, eq=False)
class Masks:
    """Draws masks for networks.

    Attributes:
        kernels: Of their architecture.
        weights: The networks where training starts, ``[n, ...]``.
        seeds: One per network, of what is random.
        curvatures: Of each network; not needed by every family.
    """

    kernels: Sequence[Kernels]
    weights: Weights
    seeds: Sequence[int]
    curvatures: Sequence[Curvature] = ()
    _orders: dict[tuple[str, float, int], list[Tensor]] = field(default_factory=dict)

    @property
    def everything(self) -> Subset:
        """The subset of all trained weights."""
        return {key: Live() for own in self.kernels for key in own.keys}

    def draw(self, recipe: Recipe, number: int = 0) -> Subset:
        """Draw a mask.

        Args:
            recipe: Which.
            number: Of the draw, from 0.

        Returns:
            The subset that is live.

        Raises:
            ConfigError: If the network has no such kernels.
        """
        if recipe.family == FULL:
            return self.everything
        if recipe.family in ("upper", "lower"):
            return self._layers(recipe)
        turn = 0 if "random" in recipe.family else number  # an order anew, or the next part of it
        cut = partial(window, share=recipe.share, draw=turn)
        if recipe.single:
            orders = stack([self._of_weights(recipe, i, number) for i in range(len(self.seeds))])
            return single_subset({key: cut(order) for key, order in orders.items()})
        orders = [self._of_kernels(recipe, i, number) for i in range(len(self.seeds))]
        layers = [cut(torch.stack(order)) for order in zip(*orders, strict=True)]
        if not recipe.family.startswith("first-conv"):
            return rows_subset(self.kernels, layers)
        if all(own.dense for own in self.kernels):
            raise ConfigError(f"masks: {recipe.name!r}: the network has no convolutions.")
        pairs = [pair for pair in zip(self.kernels, layers, strict=True) if not pair[0].dense]
        subset = rows_subset(*zip(*pairs, strict=True))
        dense = [key for own in self.kernels if own.dense for key in own.keys]
        return subset | ({key: Live() for key in dense} if recipe.family.endswith("dense") else {})

    def _layers(self, recipe: Recipe) -> Subset:
        count = max(1, round(recipe.share * len(self.kernels)))
        chosen = self.kernels[-count:] if recipe.family == "upper" else self.kernels[:count]
        return {key: Live() for own in chosen for key in own.keys}

    def _of_kernels(self, recipe: Recipe, network: int, number: int) -> list[Tensor]:
        """Kernels of every layer in order, ``[o]`` each."""
        counts = [own.count for own in self.kernels]
        if recipe.family == "random":
            generator = _generator(self.seeds[network], number)
            return [torch.randperm(count, generator=generator) for count in counts]
        if recipe.family.startswith("first"):
            return [torch.arange(count) for count in counts]
        kept = (recipe.family, recipe.share, network)
        if kept not in self._orders:
            self._orders[kept] = self._by_curvature(recipe, network, counts)
        return self._orders[kept]

    def _by_curvature(self, recipe: Recipe, network: int, counts: Sequence[int]) -> list[Tensor]:
        curvature = self.curvatures[network]
        if recipe.family not in ("weak", "strong"):
            sums = by_kernel(curvature.saliency, self.kernels)
            return [_sorted(own, recipe) for own in sums.split(counts)]
        side = two_groups(
            curvature.affinity.cpu(),
            counts,
            share=recipe.share,
            strong=recipe.family == "strong",
            generator=_generator(self.seeds[network]),
        )
        return [(~own).long().argsort(stable=True) for own in side.split(counts)]

    def _of_weights(self, recipe: Recipe, network: int, number: int) -> Weights:
        """Single weights of every tensor in order, ``[p]`` each."""
        keys = list(self.everything)
        if recipe.family == "random-weights":
            generator = _generator(self.seeds[network], number)
            sizes = {key: self.weights[key][0].numel() for key in keys}
            return {key: torch.randperm(size, generator=generator) for key, size in sizes.items()}
        saliency = self.curvatures[network].saliency
        return {key: _sorted(saliency[key].flatten(), recipe) for key in keys}


def _sorted(saliency: Tensor, recipe: Recipe) -> Tensor:
    return saliency.argsort(descending=recipe.family.startswith("salient"), stable=True).cpu()


def _generator(seed: int, draw: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + draw)
