"""Train many networks of one architecture at once: stacked weights, one product per layer."""

from collections.abc import Callable, Sequence
from math import ceil, prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metamerge.structure import Program, run
from metamerge.weights import Weights, stack

Loss = Callable[[Tensor, Tensor], Tensor]
"""Logits ``[n, b, c]`` and targets ``[n, b]`` or ``[n, b, c]`` -> one loss per network ``[n]``."""

Progress = Callable[[int], None]

CACHE = 2**21  # bytes of inputs per step: beyond it a core waits for memory more than it computes


def init_networks(factory: Callable[[], nn.Module], seeds: Sequence[int]) -> Weights:
    """Initialise one network per seed as ``factory`` does; equal seeds give equal networks.

    Args:
        factory: Builds a freshly initialised network.
        seeds: One seed per network.

    Returns:
        Stacked state dicts, every tensor ``[n, ...]``.
    """
    made: dict[int, Weights] = {}
    with torch.random.fork_rng(devices=[]):
        for seed in dict.fromkeys(seeds):
            torch.manual_seed(seed)
            made[seed] = factory().state_dict()
    return stack([made[seed] for seed in seeds])


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of each network, ``[n, b, c]`` and ``[n, b]`` -> ``[n]``."""
    return F.cross_entropy(logits.movedim(-1, 1), targets, reduction="none").mean(1)


def distillation(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy to a teacher's probabilities, ``[n, b, c]`` twice -> ``[n]``."""
    return -(targets * logits.log_softmax(-1)).sum(-1).mean(1)


def train_networks(
    program: Program,
    weights: Weights,
    inputs: Tensor,
    targets: Tensor,
    rows: Sequence[Tensor],
    *,
    epochs: float,
    batch_size: int = 32,
    lr: float = 1e-2,
    weight_decay: float = 0.0,
    seed: int = 0,
    loss: Loss = cross_entropy,
    chunk: int | None = None,
    progress: Progress | None = None,
) -> Weights:
    """Train ``n`` networks with Adam, each on its own rows, with a linearly falling learning rate.

    Each network makes ``ceil(epochs * rows / batch_size)`` steps; those with many rows train
    longest. Networks are handled in chunks of similar length to bound memory, and a chunk drops
    those that are done.

    Args:
        program: The architecture.
        weights: Stacked state dicts ``[n, ...]``, not modified.
        inputs: All images, ``[rows, ...]``.
        targets: Labels ``[rows]``, or what the loss compares with: ``[rows, c]``, or
            ``[n, rows, c]`` per network.
        rows: Per network, the indices it trains on.
        epochs: Passes over its rows.
        batch_size: Rows per step.
        lr: Learning rate at the start; it falls to zero linearly.
        weight_decay: Decoupled weight decay.
        seed: Seed of the order of rows.
        loss: One loss per network.
        chunk: Networks that are trained side by side; by default as many as have a step's inputs in
            a core's cache, or 4,096 on a GPU.
        progress: Called after every chunk with the number of networks finished so far.

    Returns:
        Trained weights ``[n, ...]``.
    """
    steps = torch.tensor([ceil(epochs * len(r) / batch_size) for r in rows])
    trained = {key: tensor.clone() for key, tensor in weights.items()}
    order = steps.argsort(descending=True, stable=True)
    chunk = chunk or _chunk_size(inputs, batch_size)
    for start in range(0, len(order), chunk):
        part = order[start : start + chunk]
        done = _train_chunk(
            program,
            {key: tensor[part] for key, tensor in weights.items()},
            inputs,
            targets[part] if targets.ndim == 3 else targets,
            _orders([rows[i] for i in part], steps[part], batch_size, part, seed),
            steps[part],
            (batch_size, lr, weight_decay),
            loss,
        )
        for key, tensor in done.items():
            trained[key][part] = tensor
        if progress:
            progress(start + len(part))
    return trained


def _orders(
    rows: list[Tensor], steps: Tensor, batch_size: int, networks: Tensor, seed: int
) -> Tensor:
    """Rows in the order in which each network meets them, ``[n, steps * batch_size]``."""
    orders = torch.zeros(len(rows), int(steps.max()) * batch_size, dtype=torch.long)
    for i, own in enumerate(rows):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + int(networks[i]))
        length = int(steps[i]) * batch_size
        passes = ceil(length / len(own))
        shuffled = torch.rand(passes, len(own), generator=generator).argsort(1)
        orders[i, :length] = own[shuffled].flatten()[:length]
    return orders


def _chunk_size(inputs: Tensor, batch_size: int) -> int:
    if inputs.device.type != "cpu":
        return 4096
    bytes_per_network = batch_size * inputs[0].numel() * inputs.element_size()
    return max(16, CACHE // bytes_per_network)


def _train_chunk(
    program: Program,
    weights: Weights,
    inputs: Tensor,
    targets: Tensor,
    orders: Tensor,
    steps: Tensor,
    hyper: tuple[int, float, float],
    loss: Loss,
) -> Weights:
    batch_size, lr, weight_decay = hyper
    keys = [key for key in program.parameters.values() if weights[key].is_floating_point()]
    keys = [key for key in keys if not key.endswith(("running_mean", "running_var"))]
    state = {key: (torch.zeros_like(weights[key]), torch.zeros_like(weights[key])) for key in keys}
    device = inputs.device
    orders, falling = orders.to(device), steps.to(device)
    for step in range(int(steps.max())):
        active = int((steps > step).sum())  # sorted by steps: the first ones are still at work
        rows = orders[:active, step * batch_size : (step + 1) * batch_size]
        live = {key: tensor[:active] for key, tensor in weights.items()}
        leaves = {key: live[key].detach().requires_grad_() for key in keys}
        logits = run(program, {**live, **leaves}, [inputs[rows]], stacked=True, own_inputs=True)
        chosen = _targets(targets, rows)
        grads = torch.autograd.grad(loss(logits, chosen).sum(), list(leaves.values()))
        rate = lr * (1 - step / falling[:active])
        for key, grad in zip(keys, grads, strict=True):
            first, second = (s[:active] for s in state[key])
            _adam(live[key], grad, first, second, rate, weight_decay, step + 1)
    return weights


def _targets(targets: Tensor, rows: Tensor) -> Tensor:
    if targets.ndim < 3:
        return targets[rows]
    return torch.take_along_dim(targets[: len(rows)], rows[..., None], dim=1)


@torch.no_grad()
def _adam(
    weight: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    rate: Tensor,
    decay: float,
    step: int,
) -> None:
    """One AdamW step in place; ``rate`` holds one learning rate per network."""
    first.lerp_(grad, 0.1)
    second.lerp_(grad.square(), 0.001)
    scale = (second / (1 - 0.999**step)).sqrt_().add_(1e-8)
    update = (first / (1 - 0.9**step)).div_(scale)
    if decay:
        update.add_(weight, alpha=decay)
    weight.sub_(update.mul_(rate.reshape(-1, *[1] * (weight.ndim - 1))))


@torch.no_grad()
def predict(program: Program, weights: Weights, inputs: Tensor, *, budget: int = 2**26) -> Tensor:
    """Logits of ``n`` networks on common inputs, in chunks of bounded memory.

    Args:
        program: The architecture.
        weights: Stacked state dicts ``[n, ...]``.
        inputs: ``[b, ...]``.
        budget: Numbers that the widest value of a chunk may hold, roughly.

    Returns:
        ``[n, b, c]``.
    """
    n = len(next(iter(weights.values())))
    widest = max(prod(s for s in shape if s) for shape in program.shapes.values())
    size = max(1, budget // (widest * len(inputs)))
    chunks = [
        run(program, {key: t[i : i + size] for key, t in weights.items()}, [inputs], stacked=True)
        for i in range(0, n, size)
    ]
    return torch.cat(chunks)
