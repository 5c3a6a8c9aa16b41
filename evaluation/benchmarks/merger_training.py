"""How many merge sets does the training of a merger take per second?

``python -m evaluation.benchmarks.merger_training`` runs whole training steps (merge, functional
loss of the fused networks, loss of the consensus, gradients, AdamW) on families of K=10 networks
784-128-128-10. Nothing depends on what the members have learned, so they are freshly initialised.

The cores of a CPU are used in both ways that training can use them: as threads of one process, and
as processes that share the families of a step and average their gradients, which is what
``accelerate launch`` starts. ``value`` is sets per second of the faster way at the largest number
of families per step; the curve over smaller ones stands beside it.

``--channels 16 32 32 --parts 1 2 3 6`` measures convolutional networks, and steps whose gradients
are taken in so many parts of the families, with what memory they take: training does so where the
maps of all members on all probes are too many.
"""

import json
import os
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from evaluation.benchmarks.memory import peak
from metamerge.mergers import GNNConfig, GNNMerger, consensus
from metamerge.options import check_count
from metamerge.structure import Layout, discover_program, run
from metamerge.weights import Weights
from zoo import architectures
from zoo.memory import keep_freed_memory
from zoo.options import command
from zoo.training import init_networks

SHAPE, CLASSES = (1, 28, 28), 10


@dataclass(frozen=True)
class BenchmarkOptions:
    """Measure training steps of a merger."""

    members: int = 10  # members per family
    widths: tuple[int, ...] = (128, 128)  # units per hidden layer
    channels: tuple[int, ...] = ()  # of convolutions, in place of hidden layers
    families: tuple[int, ...] = (1, 2, 4, 8, 16)  # families per step, over all processes
    probes: int = 256  # learned probes
    images: int = 256  # objective images per step
    repeats: int = 3  # steps of each size, after one that does not count; the fastest counts
    processes: tuple[int, ...] = (1, 2)  # ways to share out the cores of a CPU
    parts: tuple[int, ...] = (1,)  # parts in which a process takes the gradients of a step

    def __post_init__(self) -> None:
        """Refuse numbers of which there is nothing to measure.

        Raises:
            ConfigError: Naming the option.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            for number in value if isinstance(value, tuple) else (value,):
                check_count("merger_training", field.name, number, 1)


class Measured(NamedTuple):
    """Families per step -> sets per second, and the most memory that a process has taken."""

    rates: dict[int, float]
    gigabytes: float


class Step(nn.Module):
    """A merger with its loss: one forward pass is one step."""

    def __init__(self, merger: GNNMerger, layout: Layout) -> None:
        super().__init__()
        self.merger, self.layout = merger, layout

    def forward(self, members: Weights, answers: Tensor, images: Tensor, targets: Tensor) -> Tensor:
        """The loss of fused networks and of the consensus."""
        fused, trust = self.merger(members, self.layout)
        logits = run(self.layout.program, fused, [images], stacked=True)
        said = consensus(trust, answers)
        return sum(F.cross_entropy(x.movedim(-1, 1), targets) for x in (logits, said))


def measure(options: BenchmarkOptions) -> None:
    """Measure it, and end with a line of JSON.

    Args:
        options: What is measured.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: dict[str, Measured] = {}
    console = Console()
    for processes in options.processes if device == "cpu" else (1,):
        threads = max(1, (os.cpu_count() or 1) // processes)
        for parts in options.parts:
            way = f"{device}, processes: {processes}, threads of each: {threads}"
            way += f", parts of a step: {parts}" if options.parts != (1,) else ""
            found[way] = measured(options, device, processes, threads, parts)
            for count, rate in found[way].rates.items():
                console.print(f"{count} families per step: {rate:.3g} sets/s ({way})")
            console.print(f"{found[way].gigabytes:.2f} GB of memory at most ({way})")
    most = max(options.families)
    final = {way: round(own.rates[most], 2) for way, own in found.items() if most in own.rates}
    best = max(final, key=final.get)
    print(
        json.dumps(
            {
                "name": "merger_training",
                "value": final[best],
                "unit": "sets/s",
                "against": "; ".join(f"{final[way]} with {way}" for way in final if way != best),
                "details": {
                    "with": best,
                    "families_per_step": most,
                    "sets_per_second": {
                        way: {k: round(v, 2) for k, v in own.rates.items()}
                        for way, own in found.items()
                    },
                    "gigabytes": {way: round(own.gigabytes, 2) for way, own in found.items()},
                    "members": options.members,
                    "cores": os.cpu_count(),
                },
            }
        )
    )


def measured(
    options: BenchmarkOptions, device: str, processes: int, threads: int, parts: int = 1
) -> Measured:
    """Sets per second of processes that share the families of a step.

    Args:
        options: What is measured.
        device: Where.
        processes: Number of processes.
        threads: Threads of each.
        parts: Parts in which each takes the gradients of its families, where it has so many.

    Returns:
        Rates for those numbers of families that all processes have a part of, and memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = (options, device, processes, threads, parts, folder)
        multiprocessing.spawn(take_steps, given, nprocs=processes)
        rates, gigabytes = json.loads((Path(folder) / "measured.json").read_text())
    return Measured({int(count): rate for count, rate in rates.items()}, gigabytes)


def take_steps(
    rank: int,
    options: BenchmarkOptions,
    device: str,
    processes: int,
    threads: int,
    parts: int,
    folder: str,
) -> None:
    """What each of the processes does; the first one writes down the rates."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    met = f"file://{folder}/meeting"
    distributed.init_process_group("gloo", init_method=met, rank=rank, world_size=processes)

    def network() -> nn.Module:
        kind, sizes = ("cnn", options.channels) if options.channels else ("mlp", options.widths)
        return architectures.build(kind, SHAPE, CLASSES, widths=sizes)

    program = architectures.program_of(network(), SHAPE)
    layout = Layout(program, discover_program(program))
    torch.manual_seed(0)  # the same start in all processes
    merger = GNNMerger(GNNConfig(probes=options.probes, shapes=(SHAPE,))).to(device)
    optimizer = torch.optim.AdamW(merger.parameters(), lr=1e-3)
    step = Step(merger, layout)
    if processes > 1:
        step = DistributedDataParallel(step, find_unused_parameters=True)  # as in training
    own, members = max(options.families) // processes, options.members
    stacked = init_networks(network, range(rank * own * members, (rank + 1) * own * members))
    families = {key: t.unflatten(0, (own, members)).to(device) for key, t in stacked.items()}
    images = torch.rand(options.images, *SHAPE, device=device)
    answers = torch.randn(own, members, options.images, CLASSES, device=device)
    targets = torch.randint(CLASSES, (own, options.images), device=device)

    def seconds(count: int) -> float:
        settle(device)
        clock = time.perf_counter()
        optimizer.zero_grad()
        for rows in torch.arange(count).tensor_split(min(parts, count)):
            own = slice(int(rows[0]), int(rows[-1]) + 1)
            some = {key: tensor[own] for key, tensor in families.items()}
            last = own.stop == count  # with it processes average their gradients
            with nullcontext() if last or processes == 1 else step.no_sync():
                loss = step(some, answers[own], images, targets[own])
                (loss * len(rows) / count).backward()
        optimizer.step()
        settle(device)
        return time.perf_counter() - clock

    rates = {}
    for count in options.families:
        if count % processes == 0:
            seconds(count // processes)
            rates[count] = count / min(seconds(count // processes) for _ in range(options.repeats))
    if rank == 0:
        taken = torch.cuda.max_memory_allocated() if device == "cuda" else peak()
        (Path(folder) / "measured.json").write_text(json.dumps([rates, taken / 1e9]))
    distributed.destroy_process_group()


def settle(device: str) -> None:
    """Wait for all processes, and for the device."""
    if device == "cuda":
        torch.cuda.synchronize()
    distributed.barrier()


def main() -> None:
    """Entry point of ``python -m evaluation.benchmarks.merger_training``."""
    command(BenchmarkOptions, measure, prog="python -m evaluation.benchmarks.merger_training")


if __name__ == "__main__":
    main()
