"""The autoencoder merger: rows become latents, latents are fused, and rows are decoded again.

It shares with the graph network how units are read and mixed, how competence is gated, and the
refit. Between them stand latents: what the decoder says of the fused latents, *relative* to what it
says of the latents of the mixture, is added to the mixed rows. Fresh from the constructor it is the
average of the aligned members. Without that skip it is a plain bottleneck, which keeps of its
members what a few numbers per row can hold; it is there to be compared with.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from metamerge.corrections.refit import variance
from metamerge.mergers.gate import TOLD, CompetenceGate
from metamerge.mergers.latents import LatentCoder, Latents, row_states
from metamerge.mergers.messages import MessageRound
from metamerge.mergers.probes import Probes
from metamerge.mergers.reading import Fusion, finish, read_members, zero_head
from metamerge.mergers.tokens import UNIT_FEATURES
from metamerge.structure import OUTPUTS, Layer, Layout
from metamerge.structure.units import mix_units
from metamerge.weights import Weights


@dataclass(frozen=True)
class AutoencoderConfig:
    """What is fixed when an autoencoder merger is made.

    Attributes:
        probes: Number of probes in each bank.
        shapes: Shapes of input that it has a bank of learned probes, and column embeddings, for.
        width: Size of the units' states.
        rounds: Rounds of messages.
        size: Numbers in the latent of a row.
        gate: Whether the competence gate is on.
        skip: Whether decoded rows are added to the mixed ones; without, they stand for themselves,
            and there is no gate and no refit.
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
    size: int = 16
    gate: bool = True
    skip: bool = True
    refine: int = 0
    mixtures: int = 0
    start: str = "fused"
    familiar: float = 0.0
    inputs: bool = True
    spare: int = 0


class AutoencoderMerger(nn.Module):
    """Merge the members of many families at once, by way of latents.

    Args:
        config: What is fixed.
        probes: Starts of the learned probes, shape of one input -> ``[p, *shape]``; by default
            uniform noise.
    """

    def __init__(
        self, config: AutoencoderConfig, probes: Mapping[tuple[int, ...], Tensor] | None = None
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
        self.coder = LatentCoder(config.size, width, config.shapes)
        self.share = nn.Linear(config.size + 1 + width, config.size + 1, bias=False)
        nn.init.zeros_(self.share.weight)
        self.gate = CompetenceGate(width) if config.gate and config.skip else None
        if config.skip:
            self.gain = zero_head(width, 1)
            self.strength = nn.Parameter(torch.zeros(2))  # of the refit: hidden, output layer
            self.log_ridge = nn.Parameter(torch.tensor(-5.0))

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
        fused = self._decoded(members, layout, seen.states, seen.mixing)
        if not self.config.skip:
            state = seen.states[OUTPUTS]
            return Fusion(fused, state.new_zeros(*state.shape[:3], TOLD))
        return finish(self, fused, members, layout, seen)

    def _decoded(
        self,
        members: Weights,
        layout: Layout,
        states: Mapping[str, Tensor],
        mixing: Mapping[str, Tensor],
    ) -> Weights:
        """Mixed rows and what the decoder adds, or, without the skip, what it says."""
        fused = mix_units(members, layout, mixing)
        latents = self.coder.encode(members, layout, states)
        for layer in layout.unshared:
            said = self._said(layer, layout, latents[layer.node], states, mixing, members)
            keys = (layer.weight, layer.bias) if layer.bias else (layer.weight,)
            for key, (whole, change) in zip(keys, said, strict=False):
                deviation = (variance(members[key], 1) + 1e-12).sqrt()
                bounded = (deviation - 1e-6) * (change / deviation).tanh()
                fused[key] = fused[key] + bounded if self.config.skip else whole
        return fused

    def _said(
        self,
        layer: Layer,
        layout: Layout,
        latents: Latents,
        states: Mapping[str, Tensor],
        mixing: Mapping[str, Tensor],
        members: Weights,
    ) -> list[tuple[Tensor, Tensor]]:
        """Of weight and bias: what fused latents say, and how far that is from the mixture's."""
        rows = layout.rows(layer)
        own = rows.spread(rows.joined(mixing, 2), 2)[..., None]  # [f, m, out, 1]
        state = row_states(states, layer, layout)
        told = self.share(torch.cat([latents.codes, state], -1))
        shares = ((own + 1e-12).log() + told).softmax(1)  # [f, m, out, size + 1]
        both = torch.stack([(shares * latents.codes).sum(1), (own * latents.codes).sum(1)], 1)
        state = state.mean(1, keepdim=True).expand(-1, 2, -1, -1)
        said = self.coder.decode(both, state, latents, members[layer.weight].shape[2:])
        return [(tensor[:, 0], tensor[:, 0] - tensor[:, 1]) for tensor in said]
