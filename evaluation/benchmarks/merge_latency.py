"""How long does a merge take, beside distilling the ensemble until it is as good?

``python -m evaluation.benchmarks.merge_latency --merger runs/merger`` takes families of the zoo
that the merger was validated on. Merging goes from files, alignment and refining included, with
nothing but weights. Distillation starts at the best member and imitates the soft vote on all
objective images, with ever more steps until it is as accurate on validation images; one network on
both sides. ``value`` is the median over families of its seconds over those of the merge, at the
largest K; where the longest distillation is not as good, its seconds count, and ``reached`` says in
how many families it was.
"""

import json
import time
from dataclasses import dataclass
from statistics import median

import torch
from rich.console import Console
from torch import Tensor

from evaluation.metrics import accuracy, common_task, family_logits
from metamerge import merge
from metamerge.calibration import divergence
from metamerge.mergers import load_merger, read_card
from metamerge.mergers.refining import descend
from metamerge.structure import Layout, run
from metamerge.weights import Weights
from zoo.build import build
from zoo.options import command
from zoo.recipe import options_from
from zoo.variants import Variants

STEPS = tuple(25 * 2**i for i in range(10))  # of distillation, 25 to 12,800, one after the other
RATES = (1e-3, 3e-3)
BATCH = 256


@dataclass(frozen=True)
class BenchmarkOptions:
    """Compare the time of a merge with that of distillation to the same accuracy."""

    merger: str = "runs/merger"  # folder of a trained merger
    families: int = 4  # families to merge
    repeats: int = 3  # merges of each; the fastest counts


def distil(
    members: Weights, layout: Layout, inputs: Tensor, best: int, steps: int, lr: float
) -> Weights:
    """Distil the soft vote of one family, ``[m, ...]``, into its best member; ``[1, ...]``."""
    family = {key: tensor[None] for key, tensor in members.items()}
    with torch.no_grad():
        wanted = family_logits(layout.program, family, inputs).softmax(-1).mean(1)  # [1, b, c]
    generator = torch.Generator().manual_seed(0)

    def loss(weights: Weights) -> Tensor:
        rows = torch.randperm(len(inputs), generator=generator)[:BATCH]
        return divergence(
            run(layout.program, weights, [inputs[rows]], stacked=True), wanted[:, rows]
        )

    start = {key: tensor[best : best + 1] for key, tensor in members.items()}
    return descend(start, layout, loss, steps=steps, lr=lr)


def measure(options: BenchmarkOptions) -> None:
    """Time both on families of every size, and end with a line of JSON.

    Args:
        options: What is measured.
    """
    console, merger = Console(), load_merger(options.merger)
    zoo = build(options_from(read_card(options.merger)["zoos"][0]["options"]))
    split, layout = common_task(zoo), zoo.layout
    inputs, (seen, classes) = split.images("objective")[0], split.images("validation")
    rows = {}
    for members in zoo.sizes:
        stacked = zoo.families("validation", members)
        names = Variants.from_records(zoo.records("validation", members)).classes
        for family in range(min(options.families, len(next(iter(stacked.values()))))):
            own = {key: tensor[family] for key, tensor in stacked.items()}
            targets = classes if names is None else names[family][classes]

            def score(weights: Weights, targets: Tensor = targets) -> float:
                return float(accuracy(run(layout.program, weights, [seen], stacked=True), targets))

            merged = []
            for _ in range(options.repeats):
                clock = time.perf_counter()
                fused = merge(
                    zoo.address("validation", members, family), method="gnn", merger=merger
                )
                merged.append(time.perf_counter() - clock)
            wanted = score({key: tensor[None] for key, tensor in fused.weights.items()})
            singles = accuracy(run(layout.program, own, [seen], stacked=True), targets)
            best, reached = int(singles.argmax()), False
            for steps in STEPS:
                for lr in RATES:
                    clock = time.perf_counter()
                    student = distil(own, layout, inputs, best, steps, lr)
                    seconds = time.perf_counter() - clock
                    reached = reached or score(student) >= wanted
                if reached:
                    break
            rows.setdefault(members, []).append((min(merged), seconds, reached, wanted))
        ours = 1000 * median(row[0] for row in rows[members])
        theirs = 1000 * median(row[1] for row in rows[members])
        times = sum(row[2] for row in rows[members])
        console.print(
            f"K={members}: merge {ours:.0f} ms, distillation {theirs:.0f} ms, which was as "
            f"accurate for {times} of {len(rows[members])} families"
        )
    last = rows[max(rows)]
    print(
        json.dumps(
            {
                "name": "merge_latency",
                "value": round(median(row[1] / row[0] for row in last), 2),
                "unit": "x",
                "against": "distilling the soft vote into the best member, to the same accuracy",
                "details": {
                    "families": {
                        k: [
                            {"merge": m, "distil": d, "reached": r, "accuracy": a}
                            for m, d, r, a in own
                        ]
                        for k, own in rows.items()
                    },
                    "threads": torch.get_num_threads(),
                },
            }
        )
    )


def main() -> None:
    """Entry point of ``python -m evaluation.benchmarks.merge_latency``."""
    command(BenchmarkOptions, measure, prog="python -m evaluation.benchmarks.merge_latency")


if __name__ == "__main__":
    main()
