"""Where a training in rounds stands: what its next round starts from, and what is known so far."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metamerge.alignment import weight_matching
from metamerge.outer import Position
from metamerge.outer.position import gathered_at
from metamerge.structure import Permutation, PermutationSpec
from metamerge.weights import Weights
from trainers.outcome import part_of
from zoo.adam import Moments


class Standing:
    """A training between two rounds.

    Args:
        start: Where members start, ``[m, ...]``.
        shared: Whether that is one network for all of them. If not, there is no centre before the
            first merge.

    Attributes:
        position: Centre and members; None before the first merge of members with own inits.
        moments: What the members' optimisers remember; None to begin anew in every round.
        curve: Name of a number -> its values, one for every round that was made.
        seconds: That it took so far.
        stopped: Whether the threshold was reached.
    """

    def __init__(self, start: Weights, *, shared: bool) -> None:
        self._start = start
        self.position: Position | None = None
        if shared:
            first = {key: tensor[0].clone() for key, tensor in start.items()}
            self.position = gathered_at(first, len(next(iter(start.values()))))
        self.moments: Moments | None = None
        self.curve: dict[str, list[float]] = {}
        self.seconds, self.stopped = 0.0, False

    @property
    def start(self) -> Weights:
        """Where members start the next round, ``[m, ...]``."""
        return self.position.members if self.position else self._start

    @property
    def rounds(self) -> int:
        """Rounds that were made."""
        return max(map(len, self.curve.values()), default=0)

    def note(self, told: dict[str, float], threshold: float) -> None:
        """Keep what is told of a round; note when the threshold is reached on validation images."""
        for name, value in told.items():
            self.curve.setdefault(name, []).append(value)
        self.stopped = 0 < threshold <= told["validation"]

    def go_on(
        self,
        trained: Weights,
        merged: Weights,
        moments: Moments | None,
        outer: Callable[[Position, Weights], Position],
        spec: PermutationSpec | None,
    ) -> None:
        """Let the outer optimiser decide where the next round starts.

        Args:
            trained: Members after their training, ``[m, ...]``.
            merged: What they were merged into.
            moments: What their optimisers remember, of members in their own order of units.
            outer: The outer optimiser.
            spec: What may have been renumbered in the merge, and is to be brought back into the
                order of the centre; None for nothing.
        """
        momentum = self.position.momentum if self.position else None
        centre = self.position.centre if self.position else merged
        if spec is not None:
            one = {key: tensor[None] for key, tensor in merged.items()}
            back = spec.permute(one, order_of(centre, one, spec))
            merged = {key: tensor[0] for key, tensor in back.items()}
            perm = order_of(centre, trained, spec)
            trained = spec.permute(trained, perm)
            if moments is not None:
                first, second = (spec.permute(own, perm) for own in moments[:2])
                moments = Moments(first, second, moments.steps)
        self.position = outer(Position(centre, trained, momentum), merged)
        self.moments = moments

    def snapshot(self, mark: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that a resumed training needs, after its first round.

        Args:
            mark: Fingerprint of the training.

        Returns:
            Tensors, and everything else as JSON.
        """
        kept = {
            "centre": self.position.centre,
            "member": self.position.members,
            "momentum": self.position.momentum or {},
        }
        if self.moments is not None:
            kept |= {"first": self.moments.first, "second": self.moments.second}
            kept |= {"steps": {"made": self.moments.steps}}
        tensors = {f"{name}.{k}": t for name, own in kept.items() for k, t in own.items()}
        record = {"curve": self.curve, "seconds": self.seconds, "stopped": self.stopped}
        return tensors, {"fingerprint": mark, **record}

    def restore(self, state: tuple[dict[str, Tensor], dict[str, Any]] | None) -> None:
        """Put back what ``snapshot`` took.

        Args:
            state: What ``load_state`` found; None if there is nothing.
        """
        if state is None:
            return
        tensors, record = state
        parts = {
            name: part_of(tensors, f"{name}.")
            for name in ("centre", "member", "momentum", "first", "second")
        }
        # Files sort their tensors, and sums over tensors depend on the order in their last digits.
        kept = {
            name: {key: own[key] for key in self._start if key in own}
            for name, own in parts.items()
        }
        self.position = Position(kept["centre"], kept["member"], kept["momentum"] or None)
        if "steps.made" in tensors:
            self.moments = Moments(kept["first"], kept["second"], tensors["steps.made"])
        self.curve, self.stopped = record["curve"], record["stopped"]
        self.seconds = record["seconds"]


def order_of(centre: Weights, networks: Weights, spec: PermutationSpec) -> Permutation:
    """Match the units of networks to those of a centre, each by itself.

    Args:
        centre: The network whose order counts.
        networks: ``[n, ...]``.
        spec: Permutation spec of their architecture.

    Returns:
        Group -> ``[n, ...]``; apply it to the networks.
    """
    pairs = {
        key: torch.stack([centre[key].expand_as(own), own], 1) for key, own in networks.items()
    }
    perm = weight_matching(pairs, spec, to="reference", reference=0)
    return {group: index[:, 1] for group, index in perm.items()}
