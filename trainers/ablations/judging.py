"""How good a merger is at every use that its parts are for, family by family."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from evaluation.gates import noise
from evaluation.metrics import accuracy
from metamerge.mergers import Merger, fuse
from metamerge.structure import run
from metamerge.weights import Weights
from trainers.families import Families
from zoo.store import Zoo

REFINED = 25  # steps of refining
AT_ONCE = 12  # families
USES = {
    "at once": "weights only, one pass",
    "refined": f"weights only, one pass and {REFINED} steps of refining",
    "garbage": "one pass, one member is noise",
    "fewer": "one pass, every other member is left out",
    "inputs": "one pass, members watched on objective images in place of probes",
}


def unaligned(groups: Sequence[Families], zoo: Zoo, part: str) -> list[Families]:
    """The same families with their members' units in the order in which they were trained.

    Args:
        groups: Families of a zoo by size.
        zoo: The zoo.
        part: The part of it that they are.

    Returns:
        The families.
    """
    return [replace(group, weights=zoo.families(part, group.members)) for group in groups]


@torch.no_grad()
def judge(merger: Merger, groups: Sequence[Families], inputs: Tensor) -> dict[str, list[float]]:
    """Accuracy of fused networks at every use.

    Args:
        merger: The merger.
        groups: Families, and the images that they are judged on.
        inputs: Objective images to watch members on.

    Returns:
        Use -> accuracy of every family, those of one group after those of another.
    """
    scores: dict[str, list[float]] = {use: [] for use in USES}
    for group in groups:
        for rows in torch.arange(len(group)).split(AT_ONCE):
            members = {key: tensor[rows] for key, tensor in group.weights.items()}
            for use, found in scores.items():
                fused = _fused(use, merger, members, group, inputs)
                logits = run(group.layout.program, fused, [group.images[0]], stacked=True)
                found += accuracy(logits, group.targets(rows)).tolist()
    return scores


def _fused(use: str, merger: Merger, members: Weights, group: Families, inputs: Tensor) -> Weights:
    """Families merged as one of ``USES`` says."""
    if use == "garbage":
        first = {key: tensor[:, :1] for key, tensor in members.items()}
        drawn = noise(first, torch.Generator().manual_seed(0))
        members = {key: torch.cat([drawn[key], t[:, 1:]], 1) for key, t in members.items()}
    if use == "fewer":
        members = {key: tensor[:, ::2] for key, tensor in members.items()}
    watched = inputs if use == "inputs" else None
    return fuse(merger, members, group.layout, watched, steps=REFINED if use == "refined" else 0)
