"""How much faster are many networks trained together than one after another?

``python -m evaluation.benchmarks.zoo_training`` trains MLPs 64-32-10 on segments of 300 digits:
``n`` of them at once, and a few of them one by one with ``torch.optim.AdamW`` in the ordinary loop.
The last line is JSON; ``value`` is the ratio of networks per second at the largest ``n``.
"""

import json
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from zoo import architectures
from zoo.options import parse
from zoo.tasks import load_task
from zoo.training import init_networks, train_networks


@dataclass(frozen=True)
class BenchmarkOptions:
    """Compare batched training with the ordinary loop."""

    networks: tuple[int, ...] = (1, 10, 100, 360)  # numbers of networks to train together
    alone: int = 5  # networks to train one by one
    rows: int = 300  # images per network
    epochs: float = 30.0  # passes over them
    batch_size: int = 32  # images per step
    repeats: int = 3  # measurements; the fastest counts


def ordinary_loop(
    network: nn.Module, inputs: Tensor, targets: Tensor, options: BenchmarkOptions
) -> None:
    """Train one network as everybody does."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.0)
    steps = -(-int(options.epochs * len(inputs)) // options.batch_size)
    for _ in range(steps):
        rows = torch.randint(len(inputs), (options.batch_size,))
        loss = F.cross_entropy(network(inputs[rows]), targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main() -> None:
    """Entry point of ``python -m evaluation.benchmarks.zoo_training``."""
    options = parse(BenchmarkOptions, prog="python -m evaluation.benchmarks.zoo_training")
    console = Console()
    task = load_task("digits")
    shape = task.inputs.shape[1:]

    def network() -> nn.Module:
        return architectures.build("mlp", shape, task.classes, widths=(32,))

    program = architectures.program_of(network(), shape)
    generator = torch.Generator().manual_seed(0)

    def together(count: int) -> float:
        rows = [
            torch.randperm(len(task.targets), generator=generator)[: options.rows]
            for _ in range(count)
        ]
        start = init_networks(network, range(count))
        clock = time.perf_counter()
        train_networks(
            program,
            start,
            task.inputs,
            task.targets,
            rows,
            epochs=options.epochs,
            batch_size=options.batch_size,
        )
        return count / (time.perf_counter() - clock)

    def alone() -> float:
        networks = [network() for _ in range(options.alone)]
        inputs, targets = task.inputs[: options.rows], task.targets[: options.rows]
        clock = time.perf_counter()
        for own in networks:
            ordinary_loop(own, inputs, targets, options)
        return options.alone / (time.perf_counter() - clock)

    rates = {
        count: max(together(count) for _ in range(options.repeats)) for count in options.networks
    }
    reference = max(alone() for _ in range(options.repeats))
    for count, rate in rates.items():
        console.print(
            f"{count:5d} together: {rate:8.1f} networks/s, {rate / reference:6.1f} x the loop"
        )
    console.print(f"  one by one: {reference:8.1f} networks/s")
    print(
        json.dumps(
            {
                "name": "zoo_training",
                "value": round(rates[max(rates)] / reference, 2),
                "unit": "x",
                "against": "torch.optim.AdamW, one network after another",
                "details": {
                    "networks_per_second": {str(k): round(v, 1) for k, v in rates.items()},
                    "one_by_one": round(reference, 1),
                    "threads": torch.get_num_threads(),
                },
            }
        )
    )


if __name__ == "__main__":
    main()
