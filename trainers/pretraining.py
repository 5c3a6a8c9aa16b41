"""Pre-training of an autoencoder merger: single members have to come back from their latents."""

from collections.abc import Sequence

import torch

from metamerge.mergers import AutoencoderMerger, reconstruction_loss
from trainers.drawing import turn
from trainers.families import Families

RATE = 3e-3


def pretrain(
    merger: AutoencoderMerger, groups: Sequence[Families], steps: int, at_once: int, seed: int
) -> None:
    """Train a merger to reconstruct its members; every process does the same.

    Args:
        merger: The merger; it is changed.
        groups: Families that it may see, which take turns.
        steps: Number of steps.
        at_once: Families per step.
        seed: Seed of their order.
    """
    optimizer = torch.optim.AdamW(merger.parameters(), lr=RATE, weight_decay=0.0)
    for step in range(steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        group = groups[turn(step, seed, len(groups))]
        rows = torch.randperm(len(group), generator=generator)[:at_once]
        members = {key: t[rows.to(t.device)] for key, t in group.weights.items()}
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / steps)
        loss = reconstruction_loss(merger, members, group.layout)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(merger.parameters(), 1.0)
        optimizer.step()
