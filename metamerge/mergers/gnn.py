"""The graph-network merger: reads the weights of K aligned members and emits one set of weights.

It mixes units with coefficients that it reads from the weight graph, finds out from weights and
probes which member knows which class, and refits every layer in closed form on probes that it has
learned. Fresh from the constructor all heads are zero, so it *is* the average of the aligned
members; whatever it does beyond that it has learned.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from metamerge.mergers.gate import CompetenceGate
from metamerge.mergers.messages import MessageRound
from metamerge.mergers.probes import Probes
from metamerge.mergers.reading import Fusion, finish, read_members, zero_head
from metamerge.mergers.tokens import UNIT_FEATURES
from metamerge.structure import Layout
from metamerge.structure.units import mix_units
from metamerge.weights import Weights


@dataclass(frozen=True)
class GNNConfig:
    """What is fixed when a merger is made.

    Attributes:
        probes: Number of probes in each bank.
        shapes: Shapes of input that it has a bank of learned probes for.
        width: Size of the node states.
        rounds: Rounds of messages.
        prior: Side of the square input prior on first-layer rows; 0 switches it off.
        gate: Whether the competence gate is on.
        refine: Steps of refining that proved best when the merger was trained.
        mixtures: Inputs that mixtures of probes fill up to, for the fit and these steps; 0: none.
        start: Where these steps start from: ``fused``, or the ``member`` that says most of what the
            consensus says.
        familiar: How much members have to tell its probes apart, see ``told_apart``, for these not
            to be strange to them; 0: they never are.
        inputs: Whether inputs may join or replace its probes; not where they did harm in training.
        spare: Probes of each bank beside these, on which nothing but refining takes steps.
    """

    probes: int = 256
    shapes: tuple[tuple[int, ...], ...] = ()
    width: int = 32
    rounds: int = 2
    prior: int = 5
    gate: bool = True
    refine: int = 0
    mixtures: int = 0
    start: str = "fused"
    familiar: float = 0.0
    inputs: bool = True
    spare: int = 0


class GNNMerger(nn.Module):
    """Merge the members of many families at once.

    Args:
        config: What is fixed.
        probes: Starts of the learned probes, shape of one input -> ``[p, *shape]``; by default
            uniform noise.
    """

    def __init__(
        self, config: GNNConfig, probes: Mapping[tuple[int, ...], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.config = config
        width = config.width
        starts = probes or {
            shape: torch.rand(config.probes + config.spare, *shape) for shape in config.shapes
        }
        self.probes = Probes(starts, config.probes)
        self.embed = nn.Linear(UNIT_FEATURES, width)
        self.rounds = nn.ModuleList(MessageRound(width) for _ in range(config.rounds))
        self.mix = zero_head(width, 1)
        self.gain = zero_head(width, 1)
        self.gate = CompetenceGate(width) if config.gate else None
        self.strength = nn.Parameter(torch.zeros(2))  # of the refit: hidden layers, output layer
        self.log_ridge = nn.Parameter(torch.tensor(-5.0))
        if config.prior:
            self.prior = nn.Parameter(torch.zeros(config.prior, config.prior))

    def forward(
        self,
        members: Weights,
        layout: Layout,
        inputs: Tensor | None = None,
        *,
        sparse: bool = False,
    ) -> Fusion:
        """Merge aligned members.

        Args:
            members: Aligned members of ``f`` families, ``[f, m, ...]``.
            layout: Layers of their architecture.
            inputs: Inputs ``[b, ...]`` to watch the members on in place of the learned probes.
            sparse: Whether messages take the sparse path.

        Returns:
            Fused weights, and whom of the members to trust with what.

        Raises:
            IncompatibleWeights: If there are no probes of the networks' input shape.
        """
        seen = read_members(self, members, layout, inputs, sparse=sparse)
        fused = mix_units(members, layout, seen.mixing)
        fused = self._with_prior(fused, layout, seen.spread)
        return finish(self, fused, members, layout, seen)

    def _with_prior(self, fused: Weights, layout: Layout, spread: Mapping[str, Tensor]) -> Weights:
        """Smooth first-layer rows that look at images, by a kernel that starts as the identity."""
        shape = layout.program.input_shape()[1:]
        if not self.config.prior or len(shape) != 3 or None in shape:
            return fused
        fused = dict(fused)
        for layer in layout.unshared:
            weight = fused[layer.weight]
            whole = weight[0, 0].numel() == torch.Size(shape).numel()
            if layer.reads_inputs and layer.linear and whole:
                maps = weight.reshape(-1, *shape[1:])
                change = correlate(maps, self.prior)
                gate = spread[layer.weight][:, None, None]
                fused[layer.weight] = weight + gate * change.reshape(weight.shape)
        return fused


def correlate(maps: Tensor, kernel: Tensor) -> Tensor:
    """Correlate many maps with one kernel, with zeros around them.

    The same as a convolution layer of one channel, whose gradients take several times as long:
    every row of the kernel becomes a banded matrix, the maps are multiplied by all at once, and a
    product with zeros and ones adds up the outcomes, each moved by its row of the kernel.

    Args:
        maps: ``[n, h, w]``.
        kernel: ``[k, k]``, k odd.

    Returns:
        ``[n, h, w]``.
    """
    size, tap = len(kernel), torch.arange(len(kernel), device=maps.device)
    down, across = (
        place[:, None] - place + size // 2  # [from, to]
        for place in (torch.arange(n, device=maps.device) for n in maps.shape[1:])
    )
    inside = (across >= 0) & (across < size)
    bands = kernel[:, across.clamp(0, size - 1)] * inside  # [k, w from, w to]
    rows = maps @ bands.permute(1, 0, 2).flatten(1)  # [n, h, k * w]
    moved = (down.mT[..., None] == tap).to(maps.dtype).flatten(1)  # [h to, h from * k]
    return moved.expand(len(maps), -1, -1) @ rows.unflatten(-1, (size, -1)).flatten(1, 2)
