"""How many merge sets does the training of a merger take per second?

``python -m evaluation.benchmarks.merger_training`` runs whole training steps (merge, functional
loss of the fused networks, loss of the consensus, gradients, AdamW) on families of K=10 networks
784-128-128-10. Nothing depends on what the members have learned, so they are freshly initialised.
``value`` is sets per second at the largest number of families per step; the curve over smaller
ones, and the same families one after the other (``--families 1``), stand beside it.
"""

import json
import time
from dataclasses import dataclass

import torch
from rich.console import Console
from torch.nn import functional as F

from metamerge.mergers import GNNConfig, GNNMerger, consensus
from metamerge.structure import Layout, discover_program, run
from zoo import architectures
from zoo.options import parse
from zoo.training import init_networks


@dataclass(frozen=True)
class BenchmarkOptions:
    """Measure training steps of a merger."""

    members: int = 10  # members per family
    widths: tuple[int, ...] = (128, 128)  # units per hidden layer
    families: tuple[int, ...] = (1, 2, 4, 8, 16)  # families per step
    probes: int = 256  # learned probes
    images: int = 256  # objective images per step
    repeats: int = 3  # steps of each size, after one that does not count; the fastest counts


def main() -> None:
    """Entry point of ``python -m evaluation.benchmarks.merger_training``."""
    options = parse(BenchmarkOptions, prog="python -m evaluation.benchmarks.merger_training")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape, classes = (1, 28, 28), 10

    def network() -> torch.nn.Module:
        return architectures.build("mlp", shape, classes, widths=options.widths)

    program = architectures.program_of(network(), shape)
    layout = Layout(program, discover_program(program))
    most = max(options.families)
    stacked = init_networks(network, range(most * options.members))
    members = {
        key: t.unflatten(0, (most, options.members)).to(device) for key, t in stacked.items()
    }
    torch.manual_seed(0)
    merger = GNNMerger(GNNConfig(probes=options.probes, shapes=(shape,))).to(device)
    optimizer = torch.optim.AdamW(merger.parameters(), lr=1e-3)
    images = torch.rand(options.images, *shape, device=device)
    answers = torch.randn(most, options.members, options.images, classes, device=device)
    targets = torch.randint(classes, (most, options.images), device=device)

    def step(count: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        clock = time.perf_counter()
        fused, trust = merger({key: t[:count] for key, t in members.items()}, layout)
        logits = run(layout.program, fused, [images], stacked=True)
        said = consensus(trust, answers[:count])
        loss = sum(F.cross_entropy(x.movedim(-1, 1), targets[:count]) for x in (logits, said))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - clock

    rates = {}
    console = Console()
    for count in options.families:
        step(count)
        rates[count] = count / min(step(count) for _ in range(options.repeats))
        console.print(f"{count} families per step: {rates[count]:.1f} sets per second")
    print(
        json.dumps(
            {
                "name": "merger_training",
                "value": round(rates[max(rates)], 1),
                "unit": "sets/s",
                "against": f"{rates[min(rates)]:.1f} with {min(rates)} per step",
                "details": {
                    "sets_per_second": {k: round(v, 2) for k, v in rates.items()},
                    "members": options.members,
                    "device": str(device),
                    "threads": torch.get_num_threads(),
                },
            }
        )
    )


if __name__ == "__main__":
    main()
