"""How long does a merge take, beside distilling the ensemble into one network?

``python -m evaluation.benchmarks.merge_latency`` needs the zoo and the merger of ``make demo``.
Both sides get the same families and run in one process. ``value`` is the seconds that distillation
takes per family (all families at once, as the comparison does it) over those of ``merge(...,
method="gnn")``, from files, alignment included, at the largest K.
"""

import json
import time
from dataclasses import dataclass

import torch
from rich.console import Console

from evaluation import controls
from evaluation.metrics import common_task
from metamerge import merge
from metamerge.mergers import load_merger, read_card
from zoo.build import build
from zoo.options import parse
from zoo.recipe import options_from


@dataclass(frozen=True)
class BenchmarkOptions:
    """Compare the time of a merge with that of distillation."""

    merger: str = "runs/merger"  # folder of a trained merger
    families: int = 8  # families to merge
    repeats: int = 3  # measurements; the fastest counts


def main() -> None:
    """Entry point of ``python -m evaluation.benchmarks.merge_latency``."""
    options = parse(BenchmarkOptions, prog="python -m evaluation.benchmarks.merge_latency")
    console = Console()
    zoo = build(options_from(read_card(options.merger)["zoo"]["options"]))
    merger, split = load_merger(options.merger), common_task(zoo)
    budget = controls.Budget(split.images("objective"), split.images("validation"))
    seconds = {}
    for members in zoo.sizes:
        families = {k: t[: options.families] for k, t in zoo.families("test", members).items()}
        count = len(next(iter(families.values())))
        addresses = [zoo.address("test", members, f) for f in range(count)]
        merged, distilled = [], []
        for _ in range(options.repeats):
            clock = time.perf_counter()
            for address in addresses:
                merge(address, method="gnn", merger=merger)
            merged.append((time.perf_counter() - clock) / count)
            clock = time.perf_counter()
            best = controls.best_members(families, zoo.layout, budget)
            controls.distilled(best, families, zoo.layout, budget)
            distilled.append((time.perf_counter() - clock) / count)
        seconds[members] = (min(merged), min(distilled))
        ours, theirs = (1000 * s for s in seconds[members])
        console.print(f"K={members}: merge {ours:.1f} ms, distillation {theirs:.1f} ms")
    ours, theirs = seconds[max(seconds)]
    print(
        json.dumps(
            {
                "name": "merge_latency",
                "value": round(theirs / ours, 2),
                "unit": "x",
                "against": "distilling the soft vote into the best member, all families at once",
                "details": {
                    "milliseconds": {
                        k: [round(1000 * s, 2) for s in v] for k, v in seconds.items()
                    },
                    "threads": torch.get_num_threads(),
                },
            }
        )
    )


if __name__ == "__main__":
    main()
