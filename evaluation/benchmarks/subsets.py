"""How much time does a training step save when a part of the weights is fixed?

``python -m evaluation.benchmarks.subsets`` times steps (loss, gradients of what is live, AdamW) of
one network with each mask, by turns and in one run, beside steps of all weights. Gradients of fixed
kernels are not computed; with single weights, the gradients of all are. ``value`` is the ratio for
half of the kernels of every layer.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console

from evaluation.side_by_side import fastest
from metamerge.structure import Layout, discover_program
from metamerge.subsets import find_kernels, live_weights
from zoo import architectures
from zoo.masks import FULL, Masks, Recipe
from zoo.options import command
from zoo.partial import Data, Descent, PartialTraining
from zoo.training import init_networks

HALF = "random"


@dataclass(frozen=True)
class BenchmarkOptions:
    """Measure what fixing a part of the weights saves."""

    architecture: str = "convnet"  # of the network
    widths: tuple[int, ...] = (16, 32, 32)  # its units or channels per hidden layer
    shape: tuple[int, ...] = (1, 28, 28)  # of its inputs
    batch: int = 64  # inputs per step
    masks: tuple[str, ...] = (  # see docs/subsets.md; none that needs the Hessian
        *("first", "random", "random@0.25", "random@0.125", "first-conv", "first-conv+dense"),
        *("upper", "lower", "random-weights"),
    )
    repeats: int = 30  # steps of each, after one that does not count; the fastest counts


def measure(options: BenchmarkOptions) -> None:
    """Measure it, and end with a line of JSON.

    Args:
        options: What is measured.
    """
    network = partial(
        architectures.build, options.architecture, options.shape, 10, widths=options.widths
    )
    program = architectures.program_of(network(), options.shape)
    kernels = find_kernels(Layout(program, discover_program(program)))
    masks = Masks(kernels, init_networks(network, [0]), [0])
    rows = torch.arange(8 * options.batch)
    data = Data(torch.rand(len(rows), *options.shape), rows % 10, [rows], [0])
    descent = Descent(steps=options.repeats + 1, batch_size=options.batch)

    def training(name: str) -> PartialTraining:
        draws: Callable = partial(masks.draw, Recipe.parse(name))
        return PartialTraining(program, masks.weights, data, draws, descent)

    trainings = {name: training(name) for name in dict.fromkeys((FULL, *options.masks))}
    seconds = fastest({name: own.step for name, own in trainings.items()}, options.repeats)
    ratios = {name: round(seconds[FULL] / own, 3) for name, own in seconds.items()}
    console, whole = Console(), live_weights(masks.weights, masks.everything)
    shares = {}
    for name, own in trainings.items():
        shares[name] = round(live_weights(masks.weights, own.subset) / whole, 3)
        console.print(
            f"{name}: {100 * shares[name]:.0f} % of the weights, {1000 * seconds[name]:.2f} ms a "
            f"step, {ratios[name]:.2f} times as fast",
            highlight=False,
        )
    print(
        json.dumps(
            {
                "name": "subsets",
                "value": ratios.get(HALF),
                "unit": "times as fast",
                "against": "training steps of all weights",
                "details": {
                    "ratios": ratios,
                    "shares": shares,
                    "milliseconds": {name: round(1000 * s, 3) for name, s in seconds.items()},
                    "widths": options.widths,
                    "batch": options.batch,
                    "threads": torch.get_num_threads(),
                },
            }
        )
    )


def main() -> None:
    """Entry point of ``python -m evaluation.benchmarks.subsets``."""
    command(BenchmarkOptions, measure, prog="python -m evaluation.benchmarks.subsets")


if __name__ == "__main__":
    main()
