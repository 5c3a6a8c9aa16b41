"""The graph-network merger: reads the weights of K aligned members and emits one set of weights.

It mixes units with coefficients that it reads from the weight graph, finds out from weights and
probes which member knows which class, and refits every layer in closed form on probes that it has
learned. Fresh from the constructor all heads are zero, so it *is* the average of the aligned
members; whatever it does beyond that it has learned.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metamerge.corrections.refit import Target, construct, mixed_target, observe
from metamerge.errors import IncompatibleWeights
from metamerge.mergers.messages import MessageRound
from metamerge.mergers.tokens import CLASS_FEATURES, UNIT_FEATURES, class_tokens, unit_tokens
from metamerge.structure import OUTPUTS, Layer, Layout
from metamerge.weights import Weights


@dataclass(frozen=True)
class GNNConfig:
    """What is fixed when a merger is made.

    Attributes:
        input_shape: Shape of one probe.
        probes: Number of learned probes.
        width: Size of the node states.
        rounds: Rounds of messages.
        rank: Rank of the residual; 0 switches it off.
        prior: Side of the square input prior on first-layer rows; 0 switches it off.
        gate: Whether the competence gate is on.
    """

    input_shape: tuple[int, ...]
    probes: int = 256
    width: int = 32
    rounds: int = 2
    rank: int = 4
    prior: int = 5
    gate: bool = True


class GNNMerger(nn.Module):
    """Merge the members of many families at once.

    Args:
        config: What is fixed.
        probes: Start of the learned probes, ``[p, *input_shape]``; by default uniform noise.
    """

    def __init__(self, config: GNNConfig, probes: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        width = config.width
        start = torch.rand(config.probes, *config.input_shape) if probes is None else probes.clone()
        self.probes = nn.Parameter(start)
        self.embed = nn.Linear(UNIT_FEATURES, width)
        self.rounds = nn.ModuleList(MessageRound(width) for _ in range(config.rounds))
        self.mix = nn.ModuleDict(
            {level: _zero_head(width, 1) for level in ("unit", "layer", "model")}
        )
        self.gain = _zero_head(width, 1)
        self.gate = CompetenceGate(width) if config.gate else None
        self.strength = nn.Parameter(torch.zeros(2))  # of the refit: hidden layers, output layer
        self.log_ridge = nn.Parameter(torch.tensor(-5.0))
        if config.rank:
            self.row_factor = _zero_head(width, config.rank)
            self.column_factor = nn.Linear(width, config.rank)
        if config.prior:
            self.prior = nn.Parameter(torch.zeros(config.prior, config.prior))

    def forward(
        self,
        members: Weights,
        layout: Layout,
        inputs: Tensor | None = None,
        *,
        sparse: bool = False,
    ) -> Weights:
        """Merge aligned members.

        Args:
            members: Aligned members of ``f`` families, ``[f, m, ...]``.
            layout: Layers of their architecture.
            inputs: Calibration inputs ``[b, ...]`` that replace the learned probes.
            sparse: Whether messages take the sparse path.

        Returns:
            Fused weights, ``[f, ...]``.

        Raises:
            IncompatibleWeights: If the networks' inputs are not of the probes' shape.
        """
        probes = self.probes if inputs is None else inputs
        wanted = layout.program.input_shape()[1:]
        if tuple(probes.shape[1:]) != tuple(wanted):
            raise IncompatibleWeights(
                f"The checkpoints take inputs of shape {tuple(wanted)}, the merger's probes have "
                f"{tuple(probes.shape[1:])}. Pass batches= with inputs of the checkpoints' task, "
                "or train a merger on it."
            )
        observed = observe(members, layout, probes)
        states = self._states(members, layout, observed, sparse)
        spread = disagreement(members, layout)
        mixing = self._mixing(states)
        fused = mix(members, layout, mixing)
        fused = self._residual(fused, members, layout, states)
        fused = self._with_prior(fused, layout, spread)

        def targets(layer: Layer, values: Tensor) -> Target:
            rho = spread[layer.weight]  # [f]
            if layer.target == OUTPUTS and self.gate is not None:
                value = self.gate(
                    states[OUTPUTS],
                    layout.matrix(layer, members[layer.weight]).flatten(3),
                    members[layer.bias] if layer.bias else None,
                    values,
                    rho,
                )
                return Target(value, self.strength[1])
            gain = (self.gain(states[layer.target].mean(1)).squeeze(-1) * rho[:, None]).exp()
            return Target(mixed_target(values, mixing[layer.target], gain), self.strength[0])

        return construct(
            fused, observed, layout, probes, targets=targets, ridge=self.log_ridge.exp()
        )

    def _states(
        self, members: Weights, layout: Layout, observed: dict[str, Tensor], sparse: bool
    ) -> dict[str, Tensor]:
        """Node states after all rounds, space -> ``[f, m, n, width]``."""
        states = {s: self.embed(t) for s, t in unit_tokens(members, layout, observed).items()}
        edges = []
        for layer in layout.layers:
            matrix = layout.matrix(layer, members[layer.weight])  # [f, m, rows, columns, rest]
            matrix = matrix.sum(-1) / matrix.shape[-1] ** 0.5
            scale = matrix.square().mean((1, 2, 3), keepdim=True).sqrt().clamp_min(1e-6)
            edges.append((layer.source, layer.target, matrix / scale))
        for update in self.rounds:
            states = update(states, edges, sparse=sparse)
        return states

    def _mixing(self, states: dict[str, Tensor]) -> dict[str, Tensor]:
        """Coefficients over members per unit, space -> ``[f, m, n]``."""
        model = torch.stack([s.mean(2) for s in states.values()]).mean(0)  # [f, m, width]
        return {
            space: (
                self.mix["unit"](state).squeeze(-1)
                + self.mix["layer"](state.mean(2))
                + self.mix["model"](model)
            ).softmax(1)
            for space, state in states.items()
        }

    def _residual(
        self, fused: Weights, members: Weights, layout: Layout, states: dict[str, Tensor]
    ) -> Weights:
        """Low-rank change of every layer, no entry larger than the members' deviation there."""
        if not self.config.rank:
            return fused
        fused = dict(fused)
        for layer in layout.layers:
            rows = self.row_factor(states[layer.target].mean(1))  # [f, rows, rank]
            columns = self.column_factor(states[layer.source].mean(1))
            change = (rows @ columns.mT).tanh()  # [f, rows, columns]
            deviation = (members[layer.weight].var(1, correction=0) + 1e-12).sqrt() - 1e-6
            fused[layer.weight] = fused[layer.weight] + _spread_over(
                change, layer, layout, deviation
            )
        return fused

    def _with_prior(self, fused: Weights, layout: Layout, spread: dict[str, Tensor]) -> Weights:
        """Smooth first-layer rows that look at images, by a kernel that starts as the identity."""
        shape = self.config.input_shape
        if not self.config.prior or len(shape) != 3:
            return fused
        fused = dict(fused)
        for layer in layout.layers:
            weight = fused[layer.weight]
            if (
                layer.reads_inputs
                and layer.linear
                and weight[0, 0].numel() == torch.Size(shape).numel()
            ):
                maps = weight.reshape(-1, 1, *shape[1:])
                change = F.conv2d(maps, self.prior[None, None], padding=self.config.prior // 2)
                gate = spread[layer.weight][:, None, None]
                fused[layer.weight] = weight + gate * change.reshape(weight.shape)
        return fused


class CompetenceGate(nn.Module):
    """Reads from weights and probes which member knows which class, and weighs its logits by it.

    The fused logit of a class is ``sum_k beta[k] * (centred logit[k] * exp(scale[k]) + gamma[k])``,
    where ``beta`` is a softmax over members of a score per member, class and probe (learned from
    the class token, and from how high and how decided the member's logits are on that probe). No
    class has an identity here: relabelling all members in the same way relabels the outcome.

    Args:
        width: Size of the node states.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(CLASS_FEATURES + width, width), nn.SiLU())
        self.mixer = nn.Sequential(
            nn.Linear(4 * width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.head = _zero_head(width, 5)

    def forward(
        self, states: Tensor, rows: Tensor, bias: Tensor | None, logits: Tensor, spread: Tensor
    ) -> Tensor:
        """Target logits on probes.

        Args:
            states: States of the output units, ``[f, m, c, width]``.
            rows: Output rows of the members, ``[f, m, c, i]``.
            bias: Output biases, ``[f, m, c]``.
            logits: Members' logits on probes, ``[f, m, r, c]``.
            spread: Disagreement of the members, ``[f]``.

        Returns:
            ``[f, r, c]``.
        """
        token = self.embed(torch.cat([class_tokens(rows, bias, logits), states], -1))
        context = [token.mean(d, keepdim=True).expand_as(token) for d in (1, 2)]
        peak = token.amax(1, keepdim=True).expand_as(token)
        told = self.head(self.mixer(torch.cat([token, *context, peak], -1)))  # [f, m, c, 5]
        told = told * spread[:, None, None, None]
        level, slope, decided, gamma, scale = told[:, :, None].unbind(-1)  # [f, m, 1, c]
        offset = logits.mean(-1, keepdim=True)  # [f, m, r, 1]
        sure = logits.log_softmax(-1).amax(-1, keepdim=True)
        score = level + slope * logits.log_softmax(-1).clamp_min(-12) + decided * sure.clamp_min(-4)
        beta = score.softmax(1)  # [f, m, r, c]
        told = beta * ((logits - offset) * scale.exp() + gamma)
        # the offset changes no probability, but keeps copies of one network exact
        return told.sum(1) + offset.mean(1)


def mix(members: Weights, layout: Layout, mixing: dict[str, Tensor]) -> Weights:
    """Convex combinations of the members' units.

    Args:
        members: Aligned members, ``[f, m, ...]``.
        layout: Layers of the architecture.
        mixing: Space -> coefficients ``[f, m, n]``.

    Returns:
        ``[f, ...]``; integer tensors are those of the first member.
    """
    mixed = {}
    for key, tensor in members.items():
        space = layout.spec.row_group(key) or (OUTPUTS if key in _output_keys(layout) else None)
        if not tensor.is_floating_point():
            mixed[key] = tensor[:, 0]
        elif space is None:
            mixed[key] = tensor.mean(1)
        else:
            shape = (*mixing[space].shape, *[1] * (tensor.ndim - 3))
            mixed[key] = (tensor * mixing[space].reshape(shape)).sum(1)
    return mixed


def disagreement(members: Weights, layout: Layout) -> dict[str, Tensor]:
    """How far members differ: their variance over their mean square, per layer, in [0, 1).

    Args:
        members: Aligned members, ``[f, m, ...]``.
        layout: Layers of the architecture.

    Returns:
        Key of the layer's weight -> ``[f]``; 0 where all members are equal.
    """
    spread = {}
    for layer in layout.layers:
        weight = members[layer.weight]
        variance = weight.var(1, correction=0).flatten(1).mean(1)
        spread[layer.weight] = variance / weight.square().flatten(1).mean(1).clamp_min(1e-12)
    return spread


def _output_keys(layout: Layout) -> set[str | None]:
    layers = layout.producers(OUTPUTS)
    return {layer.weight for layer in layers} | {layer.bias for layer in layers}


def _spread_over(change: Tensor, layer: Layer, layout: Layout, deviation: Tensor) -> Tensor:
    """``change[f, rows, columns]`` times the deviation, in the shape of the weight."""
    if layer.reads_inputs:
        return deviation * change.reshape(*change.shape, *[1] * (deviation.ndim - 3))
    factors = layout.spec.axes[layer.weight][1]
    place = next(i for i, f in enumerate(factors) if f.group)
    split = deviation.unflatten(2, [f.size for f in factors])
    shape = [*change.shape[:2], *[1] * (split.ndim - 2)]
    shape[2 + place] = change.shape[2]
    return (split * change.reshape(shape)).reshape(deviation.shape)


def _zero_head(width: int, outputs: int) -> nn.Linear:
    head = nn.Linear(width, outputs)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def probe_start(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Start of the probes: images drawn without labels, with repeats where there are too few.

    Args:
        images: ``[n, ...]``.
        count: Number of probes.
        generator: Source of randomness.

    Returns:
        ``[count, ...]``.
    """
    rounds = -(-count // len(images))
    picks = [torch.randperm(len(images), generator=generator) for _ in range(rounds)]
    return images[torch.cat(picks)[:count]]
