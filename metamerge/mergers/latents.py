"""Latents of rows: a few numbers that hold what a unit reads, whatever it reads from.

The latent of a row is a message that is linear in its weights, ``z = sum_j w_j e_j``, so members
whose units lie in one order have latents that can be mixed. What an embedding ``e_j`` of a column
is, is learned: of inputs a table, which starts as smooth functions of the place, of hidden units a
reading of their own latents and states. Rows are decoded by the least squares that the embeddings
allow, and a network that corrects the latent before.
"""

from collections.abc import Iterable, Mapping
from math import isqrt, prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metamerge.mergers.probes import name_of
from metamerge.mergers.reading import zero_head
from metamerge.structure import Layer, Layout
from metamerge.structure.layers import INPUTS
from metamerge.weights import Weights

TAPS = 9  # smooth functions of the places that a unit's columns lie at: taps, positions of maps
RIDGE = 1e-3  # of the least squares, relative to the mean square of the embeddings


class Latents(NamedTuple):
    """A layer's rows as latents.

    Attributes:
        codes: ``[f, m, out, size + 1]``; the last number is the bias.
        basis: Embeddings of the columns of every block, ``[f, blocks, columns, size]``.
        scale: Typical size of the layer's weights, ``[f]``.
    """

    codes: Tensor
    basis: Tensor
    scale: Tensor


class LatentCoder(nn.Module):
    """Encode the rows of all layers of all members, and decode them.

    Args:
        size: Numbers that a row becomes, besides its bias.
        width: Size of the units' states.
        shapes: Shapes of input with a table of embeddings of their own.
    """

    def __init__(self, size: int, width: int, shapes: Iterable[tuple[int, ...]]) -> None:
        super().__init__()
        self.size = size
        tables = {name_of(shape): nn.Parameter(place_codes(shape, size)) for shape in shapes}
        self.tables = nn.ParameterDict(tables)
        self.source = nn.Linear(size + 1 + width, size)
        self.taps = nn.Linear(TAPS, size)
        self.correct = nn.Sequential(
            nn.Linear(size + 1 + width, 2 * width), nn.SiLU(), zero_head(2 * width, size + 1)
        )

    def encode(
        self, members: Weights, layout: Layout, states: Mapping[str, Tensor]
    ) -> dict[str, Latents]:
        """Latents of every layer, in execution order: later ones read earlier ones.

        Args:
            members: Aligned members, ``[f, m, ...]``.
            layout: Layers of their architecture.
            states: Space -> ``[f, m, n, width]``.

        Returns:
            Node of the layer -> its latents.
        """
        found: dict[str, Latents] = {}
        for layer in layout.layers:
            weight = members[layer.weight]
            basis = self._basis(weight, layer, layout, states, found)
            scale = (weight.square().flatten(1).mean(1) + 1e-12).sqrt()
            rows = weight.flatten(3) if weight.ndim > 4 else weight[..., None].flatten(3)
            rows = rows.unflatten(2, (layer.blocks, -1))  # [f, m, blocks, out / blocks, columns]
            codes = (rows @ basis[:, None]).flatten(2, 3)  # [f, m, out, size]
            bias = members[layer.bias] if layer.bias else torch.zeros_like(codes[..., 0])
            codes = torch.cat([codes, bias[..., None]], -1) / scale[:, None, None, None]
            found[layer.node] = Latents(codes, basis, scale)
        return found

    def decode(
        self, codes: Tensor, state: Tensor, latents: Latents, like: torch.Size
    ) -> tuple[Tensor, Tensor]:
        """Rows and biases that codes stand for.

        Args:
            codes: ``[f, m, out, size + 1]``.
            state: States of the units that the rows make, ``[f, m, out, width]``.
            latents: Latents of the layer.
            like: Shape of one member's weight.

        Returns:
            Weights ``[f, m, *like]``, biases ``[f, m, out]``.
        """
        codes = codes + self.correct(torch.cat([codes, state], -1))
        codes = codes * latents.scale[:, None, None, None]
        columns = _inverted(latents.basis)
        rows = codes[..., :-1].unflatten(2, (columns.shape[1], -1)) @ columns[:, None]
        return rows.reshape(*codes.shape[:2], *like), codes[..., -1]

    def _basis(
        self,
        weight: Tensor,
        layer: Layer,
        layout: Layout,
        states: Mapping[str, Tensor],
        found: Mapping[str, Latents],
    ) -> Tensor:
        """Embeddings of the columns of a layer, ``[f, blocks, columns, size]``."""
        columns, taps = layout.columns(layer), tuple(weight.shape[4:])
        shape = layout.program.input_shape()[1:]
        whole = layer.linear and layer.reads_inputs and prod(weight.shape[3:]) == _volume(shape)
        if layer.reads_inputs:
            place = self._places(shape if whole else tuple(weight.shape[3:]), weight)
            return place.expand(len(weight), 1, -1, -1)
        known = {space: self._of_units(space, layout, states, found) for space in columns.spaces}
        units = columns.spread(columns.joined(known, 1), 1)  # [f, in * blocks, size]
        turn, turns = _turns(columns.index)
        cells = units[:, :, None]
        if turns * prod(taps) > 1:
            codes = place_codes((*_square(turns), *taps), TAPS).to(weight)
            codes = self.taps(codes * len(codes) ** 0.5).unflatten(0, (turns, -1))
            cells = cells * codes[turn.to(weight.device)]  # [f, in * blocks, taps, size]
        basis = cells.flatten(1, 2).unflatten(1, (layer.blocks, -1))
        return basis / basis.shape[2] ** 0.5

    def _places(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Embeddings of fixed places: a table where there is one, and smooth functions."""
        name = name_of(shape)
        return self.tables[name] if name in self.tables else place_codes(shape, self.size).to(like)

    def _of_units(
        self,
        space: str,
        layout: Layout,
        states: Mapping[str, Tensor],
        found: Mapping[str, Latents],
    ) -> Tensor:
        """Embeddings of the units of a space, one for all members, ``[f, n, size]``."""
        state = states[space].mean(1)
        if space.startswith(INPUTS):
            return self._places((state.shape[1],), state).expand(len(state), -1, -1)
        made = [
            layout.rows(x).collected(found[x.node].codes, 2, space).mean((1, 3))
            for x in layout.producers(space)
            if x.node in found
        ]
        code = sum(made) if made else state.new_zeros(*state.shape[:2], self.size + 1)
        size = (code.square().mean((1, 2), keepdim=True) + 1e-12).sqrt()
        return self.source(torch.cat([code / size, state], -1))


def row_states(states: Mapping[str, Tensor], layer: Layer, layout: Layout) -> Tensor:
    """States of the units that the rows of a layer make.

    Args:
        states: Space -> ``[f, m, n, width]``.
        layer: The layer.
        layout: The layout it is of.

    Returns:
        ``[f, m, out, width]``.
    """
    rows = layout.rows(layer)
    return rows.spread(rows.joined(states, 2), 2)


def place_codes(shape: tuple[int, ...], count: int) -> Tensor:
    """Orthonormal functions of the places of a grid: cosines, the smoothest ones first.

    Places along a single axis have no order: theirs are random, the same ones every time.

    Args:
        shape: Shape of the grid.
        count: Number of functions; those beyond the number of places are 0.

    Returns:
        ``[places, count]``.
    """
    places, codes = prod(shape), torch.zeros(prod(shape), count)
    if len(shape) == 1:
        generator = torch.Generator().manual_seed(places)
        drawn = torch.linalg.qr(torch.randn(places, min(places, count), generator=generator))[0]
        codes[:, : drawn.shape[1]] = drawn
        return codes
    turns = torch.cartesian_prod(*(torch.arange(n) for n in shape))  # [frequencies, axes]
    smooth = turns.square().sum(-1).argsort(stable=True)[:count]
    waves = torch.ones(places, len(smooth))
    for axis, size in enumerate(shape):
        angle = (turns[:, axis, None] + 0.5) * turns[smooth, axis] * torch.pi / size
        waves = waves * angle.cos()
    codes[:, : len(smooth)] = waves / waves.norm(dim=0)
    return codes


def _inverted(basis: Tensor) -> Tensor:
    """The least squares that bring codes back to rows.

    Embeddings of units that are much alike make for a system that magnifies rounding: float64.

    Args:
        basis: ``[f, blocks, columns, size]``.

    Returns:
        ``[f, blocks, size, columns]``.
    """
    exact = basis.double()
    gram = exact.mT @ exact
    ridge = RIDGE * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] + 1e-12
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + ridge * eye, exact.mT).to(basis.dtype)


def _turns(index: Tensor) -> tuple[Tensor, int]:
    """Which of its unit's entries each entry is, and how many a unit has at most."""
    order = index.argsort(stable=True)
    counts = index.bincount()
    turn = torch.empty_like(index)
    turn[order] = torch.arange(len(index)) - (counts.cumsum(0) - counts)[index[order]]
    return turn, int(counts.max())


def _square(count: int) -> tuple[int, ...]:
    """Entries of a unit as a grid: they are the positions of a map, mostly square."""
    side = isqrt(count)
    return (side, side) if side * side == count else (count, 1)


def _volume(shape: tuple[int | None, ...]) -> int | None:
    return None if None in shape else prod(shape)
