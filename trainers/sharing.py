"""Members that are dealt out to processes by turns, and what all processes agree on."""

from collections.abc import Sequence
from math import ceil

from accelerate import Accelerator
from accelerate.utils import broadcast

from metamerge.weights import Weights


def own_members(count: int, accelerator: Accelerator) -> Sequence[int]:
    """Numbers of the members that this process trains; none where there are more processes."""
    return range(accelerator.process_index, count, accelerator.num_processes)


def everyone(own: Weights, count: int, accelerator: Accelerator) -> Weights:
    """Collect the members of all processes on each of them.

    Args:
        own: Those of this process, as ``own_members`` numbers them, ``[n, ...]``.
        count: How many there are on all processes.
        accelerator: The processes.

    Returns:
        All of them in their order, ``[count, ...]``, on the CPU.
    """
    world = accelerator.num_processes
    if world == 1:
        return own
    size, found = ceil(count / world), {}
    for key, tensor in own.items():
        padded = tensor.new_zeros(size, *tensor.shape[1:], device=accelerator.device)
        padded[: len(tensor)] = tensor
        rounds = accelerator.gather(padded).unflatten(0, (world, size)).transpose(0, 1)
        found[key] = rounds.flatten(0, 1)[:count].cpu()
    return found


def agreed(weights: Weights, accelerator: Accelerator) -> Weights:
    """What the first process has: on others the last digits may have come out otherwise.

    Args:
        weights: Of this process.
        accelerator: The processes.

    Returns:
        Weights of the first process, on the CPU.
    """
    if accelerator.num_processes == 1:
        return weights
    there = {key: tensor.to(accelerator.device) for key, tensor in weights.items()}
    return {key: tensor.cpu() for key, tensor in broadcast(there).items()}
