"""Train many networks of one architecture at once: stacked weights, one product per layer."""

from collections.abc import Callable, Collection, Sequence
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metamerge.errors import ZooError
from metamerge.structure import Program, run
from metamerge.weights import Weights, stack
from zoo.adam import Moments
from zoo.chunks import Chunk, Job, Trained, Transform
from zoo.rewrites import pool_first

Loss = Callable[[Tensor, Tensor], Tensor]
"""Outputs ``[n, b, c]`` and targets ``[n, b]`` or ``[n, b, c]`` -> one loss per network ``[n]``."""

Progress = Callable[[int], None]

CACHE = 3 * 2**21  # bytes of a chunk's largest tensor: beyond it memory is slower than sums


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


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of each network, ``[n, b, o]`` twice -> ``[n]``."""
    return (outputs - targets).square().mean((1, 2))


def train_networks(
    program: Program,
    weights: Weights,
    inputs: Tensor,
    targets: Tensor,
    rows: Sequence[Tensor],
    *,
    epochs: float | Tensor,
    batch_size: int = 32,
    lr: float | Tensor = 1e-2,
    last_lr: float | Tensor = 0.0,
    weight_decay: float | Tensor = 0.0,
    seed: int | Sequence[int] = 0,
    loss: Loss = cross_entropy,
    frozen: Collection[str] = (),
    held_back: Sequence[Tensor] | None = None,
    patience: int = 0,
    snapshots: int = 0,
    moments: Moments | None = None,
    transform: Transform | None = None,
    precision: torch.dtype | None = None,
    chunk: int | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train ``n`` networks with AdamW, each on its own rows, with a linearly falling learning rate.

    Each network makes ``ceil(epochs * rows / batch_size)`` steps; those with many rows train
    longest. Networks are handled in chunks of similar length to bound memory, and a chunk drops
    those that are done. Batch normalisation works as in a module in training mode.

    Args:
        program: The architecture.
        weights: Stacked state dicts ``[n, ...]``, not modified.
        inputs: All inputs, ``[rows, ...]``; their device is where the networks are trained.
        targets: Labels ``[rows]``, or what the loss compares with: ``[rows, c]``, or
            ``[n, rows, c]`` per network.
        rows: Per network, the indices it trains on.
        epochs: Passes over its rows; like ``lr``, ``last_lr`` and ``weight_decay`` for all
            networks, or ``[n]``.
        batch_size: Rows per step.
        lr: Learning rate at the start.
        last_lr: Where it arrives, linearly.
        weight_decay: Decoupled weight decay.
        seed: Seed of the order of rows; or one per network.
        loss: One loss per network.
        frozen: Keys of float tensors that are not trained, such as a module's buffers.
        held_back: Per network, rows that it is judged on after every epoch.
        patience: Epochs without a smaller loss on ``held_back`` after which a network stops; it
            then keeps its best weights. 0 trains to the end and keeps the last.
        snapshots: Weights to keep on the way, per network.
        moments: What the optimizer remembers of an earlier training, not modified; None to begin
            anew.
        transform: What networks see instead of the rows themselves: see ``zoo.chunks``.
        precision: Lower precision of the products, such as ``torch.bfloat16``; weights and
            optimizer keep theirs.
        chunk: Networks that are trained side by side; by default as many as have a step's largest
            tensor in a core's cache, or 4,096 on a GPU.
        progress: Called after every chunk with the number of networks finished so far.

    Returns:
        The trained networks.

    Raises:
        ZooError: If a network has no rows.
    """
    n, lengths = len(rows), torch.tensor([len(r) for r in rows])
    if (lengths == 0).any():
        raise ZooError(f"train_networks: rows[{int(lengths.argmin())}] is empty, expected some.")
    values = (epochs, lr, last_lr, weight_decay)
    passes, rate, last_rate, decay = (_each(value, n) for value in values)
    steps = (passes * lengths / batch_size).ceil().long()
    job = Job(
        program=pool_first(program),
        inputs=inputs,
        targets=targets,
        rows=rows,
        lengths=lengths,
        steps=steps,
        epochs=max(1, ceil(float(passes.max()))),
        batch_size=batch_size,
        rate=rate,
        last_rate=last_rate,
        decay=decay,
        seeds=[seed * 1_000_003 + i for i in range(n)] if isinstance(seed, int) else seed,
        loss=loss,
        frozen=frozenset(frozen),
        held_back=held_back,
        patience=patience,
        snapshots=snapshots,
        transform=transform,
        precision=precision,
        moments=moments,
    )
    result = _room(weights, job)
    order = steps.argsort(descending=True, stable=True)
    chunk = chunk or chunk_size(program, weights, inputs, batch_size)
    for start in range(0, n, chunk):
        Chunk(job, weights, order[start : start + chunk], result).train()
        if progress:
            progress(min(start + chunk, n))
    return result


def _each(value: float | Tensor, n: int) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64).expand(n)


def _room(weights: Weights, job: Job) -> Trained:
    """A result that chunks fill in; it starts with the start."""
    losses, held_back = torch.full((2, len(job.steps), job.epochs), torch.nan)
    on_the_way = {
        key: tensor.detach().unsqueeze(1).repeat(1, job.snapshots, *[1] * (tensor.ndim - 1))
        for key, tensor in weights.items()
        if job.snapshots
    }
    start = {key: tensor.detach().clone() for key, tensor in weights.items()}
    moments = job.moments and job.moments.only(torch.arange(len(job.steps)))
    return Trained(start, job.steps.clone(), losses, held_back, on_the_way, moments)


def chunk_size(program: Program, weights: Weights, inputs: Tensor, batch_size: int) -> int:
    """Networks to train side by side: as many as have a step's largest tensor in a core's cache.

    Args:
        program: The architecture.
        weights: ``[n, ...]``.
        inputs: Of the task, where networks are trained.
        batch_size: Rows per step.

    Returns:
        Their number, from 1 on; 4,096 on a GPU.
    """
    if inputs.device.type != "cpu":
        return 4096
    largest = max(tensor[0].numel() for tensor in weights.values())
    numbers = max(batch_size * program.widest, largest)
    return max(1, CACHE // (numbers * inputs.element_size()))


@torch.no_grad()
def predict(
    program: Program, weights: Weights, inputs: Tensor, *, budget: int | None = None
) -> Tensor:
    """Outputs of ``n`` networks on common inputs, in chunks of networks and of inputs.

    Args:
        program: The architecture.
        weights: Stacked state dicts ``[n, ...]``.
        inputs: ``[b, ...]``.
        budget: Numbers that the widest value of a chunk may hold, roughly; by default what a
            core's cache holds, or 2**26 on a GPU.

    Returns:
        ``[n, b, c]``.
    """
    n = len(next(iter(weights.values())))
    budget = budget or (CACHE // 4 if inputs.device.type == "cpu" else 2**26)
    rows = max(1, min(len(inputs), budget // program.widest))
    size = max(1, budget // (program.widest * rows))
    chunks = []
    for start in range(0, n, size):
        own = {key: tensor[start : start + size] for key, tensor in weights.items()}
        parts = [run(program, own, [some], stacked=True) for some in inputs.split(rows)]
        chunks.append(torch.cat(parts, 1) if len(parts) > 1 else parts[0])
    return torch.cat(chunks)
