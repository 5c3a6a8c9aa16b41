"""Members that know a few classes each: how they are dealt their images, and trained.

Paper: Su, Li and Xue, "One-Shot Federated Learning without Server-side Training", Neural Networks
2023, arXiv:2204.12493, and the code that its authors published.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation.controls import Images
from metamerge.weights import Weights, stack

LEAST = 10  # rows that every member gets


class Training(Protocol):
    """What of an experiment's options decides how members are made."""

    members: int
    alpha: float
    epochs: int
    batch_size: int
    lr: float
    momentum: float


def network() -> nn.Sequential:
    """The paper's perceptron, freshly initialised."""
    widths = (784, 400, 200, 100, 10)
    layers: list[nn.Module] = [nn.Flatten()]
    for rows, columns in zip(widths[1:], widths[:-1], strict=True):
        layers += [nn.Linear(columns, rows, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def trained(images: Images, rows: Tensor, options: Training, seed: int) -> Weights:
    """Train one member with plain SGD.

    Args:
        images: Inputs and classes of the whole task.
        rows: What it learns from.
        options: How.
        seed: Of its init and of the order of images.

    Returns:
        Its state dict.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        member = network()
        optimizer = torch.optim.SGD(member.parameters(), lr=options.lr, momentum=options.momentum)
        for _ in range(options.epochs):
            for batch in rows[torch.randperm(len(rows))].split(options.batch_size):
                optimizer.zero_grad()
                F.cross_entropy(member(images[0][batch]), images[1][batch]).backward()
                optimizer.step()
    return {key: tensor.detach().clone() for key, tensor in member.state_dict().items()}


def shares(targets: Tensor, rows: Tensor, options: Training, seed: int) -> list[Tensor]:
    """Deal rows out class by class; who holds an even share gets no more, as in the paper's code.

    Args:
        targets: Class of every row of the task.
        rows: Rows to deal out.
        options: Number of members and skew.
        seed: Of the draw.

    Returns:
        Rows of each member.
    """
    rng = np.random.default_rng(seed)
    even = len(rows) / options.members
    while True:
        dealt: list[list[Tensor]] = [[] for _ in range(options.members)]
        for label in targets[rows].unique().tolist():
            own = rows[targets[rows] == label]
            own = own[torch.from_numpy(rng.permutation(len(own)))]
            part = rng.dirichlet(np.full(options.members, options.alpha))
            part *= [sum(map(len, held)) < even for held in dealt]
            if part.sum() == 0:  # all of it fell to members that hold enough
                part = np.array([float(sum(map(len, held)) < even) for held in dealt])
            cuts = (part / part.sum()).cumsum()[:-1] * len(own)
            for held, piece in zip(dealt, own.tensor_split(cuts.astype(int).tolist()), strict=True):
                held.append(piece)
        joined = [torch.cat(held) for held in dealt]
        if min(map(len, joined)) >= LEAST:
            return joined


def family(images: Images, dealt: Sequence[Tensor], options: Training, seed: int) -> Weights:
    """Train a member on each share.

    Args:
        images: Inputs and classes of the whole task.
        dealt: Rows of each member.
        options: How.
        seed: Of inits.

    Returns:
        ``[m, ...]``.
    """
    first = seed * options.members
    return stack([trained(images, own, options, first + m) for m, own in enumerate(dealt)])


def known_classes(targets: Tensor, dealt: Sequence[Tensor]) -> Tensor:
    """Which classes each member has seen more than once, ``[m, classes]``."""
    counts = torch.stack([targets[own].bincount(minlength=10) for own in dealt])
    return (counts > 1).float()
