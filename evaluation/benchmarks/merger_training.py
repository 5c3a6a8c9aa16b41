"""How many merge sets does the training of a merger take per second?

``python -m evaluation.benchmarks.merger_training`` runs whole training steps (merge, functional
loss of the fused networks, loss of the consensus, gradients, AdamW) on families of K=10 networks
784-128-128-10. Nothing depends on what the members have learned, so they are freshly initialised.

The cores of a CPU are used in both ways that training can use them: as threads of one process, and
as processes that share the families of a step and average their gradients, which is what
``accelerate launch`` starts. ``value`` is sets per second of the faster way at the largest number
of families per step; the curve over smaller ones stands beside it.
"""

import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from metamerge.mergers import GNNConfig, GNNMerger, consensus
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
    families: tuple[int, ...] = (1, 2, 4, 8, 16)  # families per step, over all processes
    probes: int = 256  # learned probes
    images: int = 256  # objective images per step
    repeats: int = 3  # steps of each size, after one that does not count; the fastest counts
    processes: tuple[int, ...] = (1, 2)  # ways to share out the cores of a CPU


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
    curves, console = {}, Console()
    for processes in options.processes if device == "cpu" else (1,):
        threads = max(1, (os.cpu_count() or 1) // processes)
        way = f"{device}, processes: {processes}, threads of each: {threads}"
        curves[way] = measured(options, device, processes, threads)
        for count, rate in curves[way].items():
            console.print(f"{count} families per step: {rate:.1f} sets/s ({way})")
    most = max(options.families)
    final = {way: round(curve[most], 1) for way, curve in curves.items() if most in curve}
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
                        way: {k: round(v, 2) for k, v in curve.items()}
                        for way, curve in curves.items()
                    },
                    "members": options.members,
                    "cores": os.cpu_count(),
                },
            }
        )
    )


def measured(
    options: BenchmarkOptions, device: str, processes: int, threads: int
) -> dict[int, float]:
    """Sets per second of processes that share the families of a step.

    Args:
        options: What is measured.
        device: Where.
        processes: Number of processes.
        threads: Threads of each.

    Returns:
        Families per step -> sets per second, for those numbers that all processes have a part of.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = (options, device, processes, threads, folder)
        multiprocessing.spawn(take_steps, given, nprocs=processes)
        found = json.loads((Path(folder) / "rates.json").read_text())
    return {int(count): rate for count, rate in found.items()}


def take_steps(
    rank: int, options: BenchmarkOptions, device: str, processes: int, threads: int, folder: str
) -> None:
    """What each of the processes does; the first one writes down the rates."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    met = f"file://{folder}/meeting"
    distributed.init_process_group("gloo", init_method=met, rank=rank, world_size=processes)

    def network() -> nn.Module:
        return architectures.build("mlp", SHAPE, CLASSES, widths=options.widths)

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
        some = {key: tensor[:count] for key, tensor in families.items()}
        settle(device)
        clock = time.perf_counter()
        loss = step(some, answers[:count], images, targets[:count])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        settle(device)
        return time.perf_counter() - clock

    rates = {}
    for count in options.families:
        if count % processes == 0:
            seconds(count // processes)
            rates[count] = count / min(seconds(count // processes) for _ in range(options.repeats))
    if rank == 0:
        (Path(folder) / "rates.json").write_text(json.dumps(rates))
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
