"""Inversion: inputs that members know, where a merger's learned probes are strange to them.

A merger's probes look like the inputs of the tasks that it was trained on. Members of another task
put most of them into a few of their classes, or are sure of none, so that neither the gate nor the
refit sees the others. What is missing is then drawn from the members themselves: copies of the
probes are moved until all classes have their share of them.

Papers: Yin et al., "Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion", CVPR
2020, arXiv:1912.08795, for inputs that are made from a network, with total variation as their
prior; Asano, Rupprecht, Vedaldi, "Self-labelling via Simultaneous Clustering and Representation
Learning", arXiv:1911.05371, for equal shares.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from metamerge.mergers.gate import answers_of, is_choice
from metamerge.structure import Layout, run
from metamerge.weights import Weights

STEPS = 20  # of Adam
RATE = 0.4  # its learning rate, in standard deviations of the probes
SMOOTH = 8.0  # weight of the total variation, whose unit is that of the start
FEW = 2  # members that are asked in a step, drawn anew for each
APART = 0.25  # of the median agreement with the others: who has less is not asked
ROUNDS = 20  # in which classes and inputs take turns to get their shares


def invert(members: Weights, layout: Layout, start: Tensor, grid: Sequence[int]) -> Tensor:
    """Move inputs until members see every class in them.

    Every input gets a class, the likeliest for it under the condition that classes have equal
    shares. Steps of Adam make that class likely for members, a few of them in every step, and
    images smooth.

    Args:
        members: Aligned members of one family in canonical order, ``[1, m, ...]``.
        layout: Their architecture.
        start: Inputs, ``[b, ...]``.
        grid: Shape in which neighbours of an input's numbers are neighbours; only images, ``[c, h,
            w]``, are smoothed.

    Returns:
        New inputs, ``[b, ...]``, between the smallest and the largest number of ``start``; copies
        of it where members do not choose among classes.
    """
    answers = answers_of(members, layout, start)[0]
    if not is_choice(answers):
        return start.clone()
    likely = answers.softmax(-1)
    sound = in_agreement(likely)
    wanted = equal_shares(likely[sound].mean(0))
    low, high = start.amin(), start.amax()
    unit, images = start.std().clamp_min(1e-6), len(grid) == 3
    known = _variation(start.reshape(-1, *grid)).clamp_min(1e-6) if images else None
    generator = torch.Generator().manual_seed(0)
    inputs = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([inputs], lr=RATE * float(unit))
    for _ in range(STEPS):
        asked = sound[torch.randperm(len(sound), generator=generator)[:FEW].to(start.device)]
        few = {key: tensor[0, asked] for key, tensor in members.items()}
        with torch.enable_grad():
            likely = run(layout.program, few, [inputs], stacked=True).softmax(-1).mean(0)
            loss = F.nll_loss(likely.clamp_min(1e-6).log(), wanted, reduction="sum")
            if images:
                rough = _variation(inputs.reshape(-1, *grid)) / known
                loss = loss + SMOOTH * len(inputs) * rough
            inputs.grad = torch.autograd.grad(loss, inputs)[0]
        optimizer.step()
        with torch.no_grad():
            inputs.clamp_(low, high)
    return inputs.detach()


def in_agreement(likely: Tensor) -> Tensor:
    """Members that have something in common with the others, so that noise is not asked.

    Args:
        likely: Probabilities that members give to classes, ``[m, b, c]``.

    Returns:
        Their numbers, ``[n]``: those whose agreement is at least a quarter of the median of all.
    """
    found = agreement(likely)
    return (found >= APART * found.median()).nonzero()[:, 0]


def agreement(likely: Tensor) -> Tensor:
    """How far every member agrees with the others.

    Args:
        likely: Probabilities that members give to classes, ``[m, b, c]``.

    Returns:
        The probability that it and the mean of the others name the same class, ``[m]``.
    """
    others = (likely.sum(0) - likely) / max(1, len(likely) - 1)
    return (likely * others).sum(-1).mean(1)


def equal_shares(likely: Tensor) -> Tensor:
    """Give every input a class, so that classes get about equally many.

    Args:
        likely: Probabilities, ``[b, c]``.

    Returns:
        Classes, ``[b]``. Other names of the classes give the same classes by their other names.
    """
    plan = likely.double().clamp_min(1e-12).log()
    for _ in range(ROUNDS):  # Sinkhorn and Knopp
        plan = plan - plan.logsumexp(0, keepdim=True)
        plan = plan - plan.logsumexp(1, keepdim=True)
    return plan.argmax(-1)


def _variation(images: Tensor) -> Tensor:
    """Total variation of images, ``[b, c, h, w]``, per number."""
    return images.diff(dim=-1).abs().mean() + images.diff(dim=-2).abs().mean()
