"""What all mergers share: states of units, mixing coefficients, competence, and the refit."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from metamerge.corrections.refit import Target, construct, mixed_target, moments, observe, variance
from metamerge.mergers.gate import TOLD, CompetenceGate, consensus
from metamerge.mergers.messages import Edge
from metamerge.mergers.tokens import Moments, unit_tokens
from metamerge.structure import OUTPUTS, Layer, Layout
from metamerge.structure.layers import INPUTS
from metamerge.weights import Weights


class Fusion(NamedTuple):
    """What a merger makes of its members.

    Attributes:
        weights: Fused weights, ``[f, ...]``.
        trust: What it read of their competence, for ``consensus``: ``[f, m, c, 5]``.
    """

    weights: Weights
    trust: Tensor


class Reading(NamedTuple):
    """What a merger reads of its members before it fuses anything.

    Attributes:
        probes: Inputs that they were watched on, ``[b, ...]``.
        observed: Pre-activations on them per layer, ``[f, m, r, o]``.
        moments: Their means and variances over probes per layer, ``[f, m, o]``.
        states: Space -> states of its units, ``[f, m, n, width]``.
        mixing: Space -> coefficients over members, ``[f, m, n]``.
        spread: What ``disagreement`` says of every layer, ``[f]``.
    """

    probes: Tensor
    observed: dict[str, Tensor]
    moments: dict[str, Moments]
    states: dict[str, Tensor]
    mixing: dict[str, Tensor]
    spread: dict[str, Tensor]


def read_members(
    merger: nn.Module, members: Weights, layout: Layout, inputs: Tensor | None, *, sparse: bool
) -> Reading:
    """Watch members on probes, read their units, and say how they are to be mixed.

    Args:
        merger: A merger, with ``probes``, ``embed``, ``rounds`` and a head to ``mix`` by.
        members: Aligned members, ``[f, m, ...]``.
        layout: Layers of their architecture.
        inputs: Inputs that take the place of the probes, or None.
        sparse: Whether messages take the sparse path.

    Returns:
        What was read.
    """
    probes = merger.probes.for_members(members, layout) if inputs is None else inputs
    observed = observe(members, layout, probes)
    known = {node: moments(values, 2) for node, values in observed.items()}
    states = read_units(
        members, layout, observed, merger.embed, merger.rounds, known=known, sparse=sparse
    )
    mixing = mixing_of(states, merger.mix)
    return Reading(probes, observed, known, states, mixing, disagreement(members, layout))


def finish(
    merger: nn.Module, fused: Weights, members: Weights, layout: Layout, seen: Reading
) -> Fusion:
    """Let the gate say whom to trust, and refit fused weights to that.

    Args:
        merger: A merger, with ``gate``, ``gain``, ``strength`` and ``log_ridge``.
        fused: What it has fused, ``[f, ...]``.
        members: Aligned members, ``[f, m, ...]``.
        layout: Layers of their architecture.
        seen: What it has read of them.

    Returns:
        The outcome.
    """
    trust = trust_in(merger.gate, members, layout, seen.states, seen.observed, seen.spread)
    lift = {space: merger.gain(state.mean(1)).squeeze(-1) for space, state in seen.states.items()}
    weights = fit(
        fused,
        layout,
        seen.probes,
        seen.observed,
        known=seen.moments,
        mixing=seen.mixing,
        lift=lift,
        spread=seen.spread,
        trust=None if merger.gate is None else trust,
        strength=merger.strength,
        ridge=merger.log_ridge.exp(),
    )
    return Fusion(weights, trust)


def read_units(
    members: Weights,
    layout: Layout,
    observed: Mapping[str, Tensor],
    embed: nn.Module,
    rounds: Iterable[nn.Module],
    *,
    known: Mapping[str, Moments] | None = None,
    sparse: bool = False,
) -> dict[str, Tensor]:
    """States of all units after all rounds of messages.

    Args:
        members: Aligned members, ``[f, m, ...]``.
        layout: Layers of their architecture.
        observed: Pre-activations on probes per layer, ``[f, m, r, o]``.
        embed: Tokens -> states.
        rounds: Rounds of messages, each a ``MessageRound``.
        known: Means and variances of the pre-activations over probes, where these are known.
        sparse: Whether messages take the sparse path.

    Returns:
        Space -> ``[f, m, n, width]``; inputs, which all members share, ``[f, 1, n, width]``.
    """
    tokens = unit_tokens(members, layout, observed, known)
    states = {
        s: embed(t.mean(1, keepdim=True) if s.startswith(INPUTS) else t) for s, t in tokens.items()
    }
    rounds = list(rounds)
    edges = weight_edges(members, layout) if rounds else []
    for update in rounds:
        states = update(states, edges, sparse=sparse)
    return states


def mixing_of(states: Mapping[str, Tensor], head: nn.Module) -> dict[str, Tensor]:
    """Coefficients over members, which sum to 1.

    Args:
        states: Space -> ``[f, m, n, width]``.
        head: State of a unit -> its logit.

    Returns:
        Space -> ``[f, m, n]``; inputs have none.
    """
    return {
        space: head(state).squeeze(-1).softmax(1)
        for space, state in states.items()
        if not space.startswith(INPUTS)
    }


def trust_in(
    gate: CompetenceGate | None,
    members: Weights,
    layout: Layout,
    states: Mapping[str, Tensor],
    observed: Mapping[str, Tensor],
    spread: Mapping[str, Tensor],
) -> Tensor:
    """What the gate reads of the members.

    Args:
        gate: The gate, or None.
        members: Aligned members, ``[f, m, ...]``.
        layout: Layers of their architecture.
        states: Space -> ``[f, m, n, width]``.
        observed: Pre-activations on probes per layer, ``[f, m, r, o]``.
        spread: What ``disagreement`` returned.

    Returns:
        ``[f, m, c, TOLD]``; zeros, which trust all alike, where there is no gate or there is no one
        output layer.
    """
    last = layout.producers(OUTPUTS)
    if gate is None or len(last) != 1:
        state = states[OUTPUTS]
        return state.new_zeros(*state.shape[:3], TOLD)
    layer = last[0]
    rows = layout.matrix(layer, members[layer.weight]).flatten(3)
    bias = members[layer.bias] if layer.bias else None
    return gate(states[OUTPUTS], rows, bias, observed[layer.node], spread[layer.weight])


def fit(
    fused: Weights,
    layout: Layout,
    probes: Tensor,
    observed: dict[str, Tensor],
    *,
    known: Mapping[str, Moments],
    mixing: Mapping[str, Tensor],
    lift: Mapping[str, Tensor],
    spread: Mapping[str, Tensor],
    trust: Tensor | None,
    strength: Tensor,
    ridge: Tensor,
) -> Weights:
    """Refit every layer to the mixture of the members, the last one to their consensus.

    Args:
        fused: Starting weights, ``[f, ...]``.
        layout: Layers of their architecture.
        probes: Inputs that the members were observed on, ``[b, ...]``.
        observed: Pre-activations on them per layer, ``[f, m, r, o]``.
        known: Their means and variances over probes per layer, ``[f, m, o]``.
        mixing: Space -> coefficients over members, ``[f, m, n]``.
        lift: Space -> logarithm of the gain on the restored spread, ``[f, n]``.
        spread: What ``disagreement`` returned; where there is none, nothing is lifted.
        trust: What the gate read, ``[f, m, c, TOLD]``; None for a mixture at the outputs, too.
        strength: How far to go, hidden layers and output layer, ``[2]``.
        ridge: See ``refit``.

    Returns:
        New weights ``[f, ...]``.
    """
    gated = trust is not None and len(layout.producers(OUTPUTS)) == 1

    def targets(layer: Layer, values: Tensor) -> Target:
        if gated and OUTPUTS in layer.targets:
            return Target(consensus(trust, values), strength[1])
        at = layout.rows(layer)
        rows = at.spread(at.joined(mixing, 2), 2)  # [f, m, out]
        gain = at.spread(at.joined(lift, 1), 1) * spread[layer.weight][:, None]
        return Target(mixed_target(values, rows, gain.exp(), known[layer.node][1]), strength[0])

    return construct(fused, observed, layout, probes, targets=targets, ridge=ridge)


def weight_edges(members: Weights, layout: Layout) -> list[Edge]:
    """The edges along which messages pass.

    Args:
        members: Aligned members, ``[f, m, ...]``.
        layout: Layers of their architecture.

    Returns:
        One per layer, with weights that are summed over taps.
    """
    edges = []
    for layer in layout.layers:
        matrix = layout.matrix(layer, members[layer.weight])  # [f, m, rows, columns, rest]
        taps = matrix.shape[-1]
        matrix = matrix.squeeze(-1) if taps == 1 else matrix.sum(-1) / taps**0.5
        size = root_mean_square(matrix).clamp_min(1e-6)[:, None, None, None]
        edges.append(Edge(layer.sources, layer.targets, matrix, size))
    return edges


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
        square = root_mean_square(weight).square().clamp_min(1e-12)
        spread[layer.weight] = variance(weight, 1).flatten(1).mean(1) / square
    return spread


def root_mean_square(values: Tensor) -> Tensor:
    """Size of all that a family has of one kind.

    Args:
        values: ``[f, ...]``.

    Returns:
        ``[f]``.
    """
    return values.flatten(1).norm(dim=1) / values[0].numel() ** 0.5


def zero_head(width: int, outputs: int) -> nn.Linear:
    """A linear head that says nothing before it has learned.

    Args:
        width: Size of what it reads.
        outputs: How many numbers it tells.

    Returns:
        The head, all zeros.
    """
    head = nn.Linear(width, outputs)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head
