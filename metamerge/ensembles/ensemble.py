"""An ensemble as one network: all members run in one pass, and a consensus speaks for them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metamerge.checkpoints import read_checkpoints, save_checkpoint
from metamerge.ensembles.convolutional_consensus import ConvolutionalConsensus
from metamerge.ensembles.gated_consensus import GatedConsensus
from metamerge.ensembles.learned_consensus import LearnedConsensus
from metamerge.ensembles.regression import LinearPool
from metamerge.ensembles.stacking import Stacking
from metamerge.ensembles.votes import MajorityVote, SoftVote
from metamerge.ensembles.watching import watch
from metamerge.ensembles.weighted_consensus import WeightedConsensus
from metamerge.errors import IncompatibleWeights, StructureError, Unreadable
from metamerge.structure import Program
from metamerge.weights import Weights, check_finite, unstack

KIND = "ensemble"
CONSENSUSES: dict[str, Callable[..., nn.Module]] = {
    made.__name__: made
    for made in (
        *(SoftVote, MajorityVote, WeightedConsensus, LearnedConsensus, ConvolutionalConsensus),
        *(GatedConsensus, Stacking, LinearPool),
    )
}
"""What a saved ensemble may name: each is made of its own buffers and its options."""


class Ensemble(nn.Module):
    """Several members as one network; by default logarithms of their soft vote come out.

    Its state dict holds ``members.<name>``, ``[m, ...]``, for every name in those of the members,
    and ``consensus.<name>``. All of it is frozen, and computing is in float32. Training and
    evaluation mode are the same: members are run as they are evaluated.

    Args:
        program: The members' architecture.
        weights: Their stacked weights, every tensor ``[m, ...]``; they are copied.
        consensus: A module that makes one output of a ``Seen``; by default the soft vote.
        report: What is known of how it was made, in plain types.
    """

    def __init__(
        self,
        program: Program,
        weights: Weights,
        consensus: nn.Module | None = None,
        report: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        lengths = {tensor.shape[:1] for tensor in weights.values()}
        if len(lengths) != 1 or not all(len(length) and length[0] for length in lengths):
            raise IncompatibleWeights(
                f"Ensemble: the leading axes of the weights are {sorted(map(tuple, lengths))}, "
                f"expected one common number of members. Stack them with metamerge.weights.stack."
            )
        self.program = program
        self.report = dict(report or {})
        self.members = nn.Module()
        for key, tensor in weights.items():
            kept = tensor.detach().clone()
            _put(self.members, key, kept.float() if kept.is_floating_point() else kept)
        self.consensus = SoftVote() if consensus is None else consensus

    def forward(self, *inputs: Tensor) -> Tensor:
        """Run all members in one batched pass and let the consensus speak for them.

        Args:
            *inputs: The network's inputs, batch axis first.

        Returns:
            Logarithms of probabilities ``[b, c]``; of networks that put out numbers, these.
        """
        weights = {key: self.members.get_buffer(key) for key in self.program.parameters.values()}
        dtype = next((t.dtype for t in weights.values() if t.is_floating_point()), torch.float32)
        given = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
        activations = getattr(self.consensus, "reads_activations", False)
        return self.consensus(watch(self.program, weights, given, activations=activations))

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write everything that ``load_ensemble`` needs: members, consensus and architecture.

        Args:
            folder: Target folder.
            overwrite: Whether an ensemble that lies there may be replaced.

        Returns:
            The folder.
        """
        consensus = {"name": type(self.consensus).__name__, "options": self.consensus.options}
        return save_checkpoint(
            self.state_dict(),
            folder,
            metadata={"kind": KIND, "consensus": consensus, "report": self.report},
            program=self.program.to_json(),
            overwrite=overwrite,
        )


def load_ensemble(folder: str | os.PathLike[str]) -> Ensemble:
    """Read an ensemble that ``Ensemble.save`` wrote.

    Args:
        folder: Its folder.

    Returns:
        The ensemble, in eval mode, on the CPU.

    Raises:
        Unreadable: If the folder holds something else.
        NonFinite: If a tensor holds NaN or infinity.
    """
    name = os.fspath(folder)
    checkpoint = read_checkpoints(folder)[0]
    check_finite(name, checkpoint.weights)
    if checkpoint.metadata.get("kind") != KIND or checkpoint.program is None:
        raise Unreadable(f"{name}: this checkpoint is no ensemble. Pass a folder of Ensemble.save.")
    program = Program.from_json(checkpoint.program)
    members, own = _part(checkpoint.weights, "members."), _part(checkpoint.weights, "consensus.")
    try:
        told = checkpoint.metadata["consensus"]
        consensus = CONSENSUSES[told["name"]](**own, **told["options"])
        ensemble = Ensemble(program, members, consensus, checkpoint.metadata["report"])
        program.check_weights(name, unstack(members)[0])
    except (KeyError, TypeError, ValueError, AttributeError, StructureError) as error:
        raise Unreadable(
            f"{name}: its parts do not make an ensemble ({error!r}). Make it again, or use the "
            "version of metamerge that wrote it."
        ) from error
    return ensemble.eval()


def _part(weights: Weights, prefix: str) -> Weights:
    return {k.removeprefix(prefix): t for k, t in weights.items() if k.startswith(prefix)}


def _put(module: nn.Module, key: str, tensor: Tensor) -> None:
    """Register a buffer under a dotted name, with the modules on the way to it."""
    *path, name = key.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module._modules[part]
    module.register_buffer(name, tensor)
