"""How much faster is a mutant once it is pruned to the width of one member?

``python -m evaluation.benchmarks.pruning`` fuses K=8 freshly initialised networks, prunes the wide
one to one member's width, and times all of them in one run: passes over a batch, and whole training
steps (loss, gradients, AdamW). Removed units are gone from the tensors; the same units masked by
zeros stand beside them, which saves nothing. ``value`` is the ratio of training steps.
"""

import json
from dataclasses import dataclass
from typing import NamedTuple

import torch
from rich.console import Console

from evaluation.side_by_side import fastest
from metamerge.ensembles import Mutant, fused, magnitude, pruned
from metamerge.structure import Layout, discover_program, run
from metamerge.weights import stack, unstack
from zoo import architectures
from zoo.options import command
from zoo.training import init_networks, train_networks


@dataclass(frozen=True)
class BenchmarkOptions:
    """Measure what pruning saves."""

    architecture: str = "convnet"  # of the members
    widths: tuple[int, ...] = (16, 32, 32)  # their units or channels per hidden layer
    norm: str | None = None  # layer or batch, for ResNets
    members: int = 8  # members that are fused
    batch: int = 32  # inputs per pass and step
    repeats: int = 5  # measurements of each, after one that does not count; the fastest counts


class Times(NamedTuple):
    """Seconds of a pass and of a training step, and the number of parameters."""

    forward: float
    step: float
    parameters: int


def measure(options: BenchmarkOptions) -> None:
    """Measure it, and end with a line of JSON.

    Args:
        options: What is measured.
    """
    console, shape = Console(), (1, 28, 28)

    def network() -> torch.nn.Module:
        widths, norm = options.widths, options.norm
        return architectures.build(options.architecture, shape, 10, widths=widths, norm=norm)

    program = architectures.program_of(network(), shape)
    layout = Layout(program, discover_program(program))
    members = unstack(init_networks(network, range(options.members)))
    wide = fused(members, layout)
    saliency = magnitude(wide.weights, wide.layout)
    networks = {
        "wide": wide,
        "masked": _masked(wide, layout, saliency),
        "pruned": pruned(wide, layout.spec.groups, saliency),
        "member": Mutant(members[0], layout),
    }
    found = {}
    for name, one in networks.items():
        found[name] = _timed(one, torch.rand(options.batch, *shape), options.repeats)
        forward, step, parameters = found[name]
        console.print(
            f"{name}: {parameters:,} parameters, {1000 * forward:.1f} ms a pass, "
            f"{1000 * step:.1f} ms a training step",
            highlight=False,
        )
    ratios = {name: round(found["wide"].step / times.step, 2) for name, times in found.items()}
    forward = {name: round(found["wide"].forward / t.forward, 2) for name, t in found.items()}
    print(
        json.dumps(
            {
                "name": "pruning",
                "value": ratios["pruned"],
                "unit": "times as fast",
                "against": "training steps of the wide network",
                "details": {
                    "training": ratios,
                    "inference": forward,
                    "parameters": {name: times.parameters for name, times in found.items()},
                    "members": options.members,
                    "threads": torch.get_num_threads(),
                },
            }
        )
    )


def _masked(wide: Mutant, layout: Layout, saliency: dict[str, torch.Tensor]) -> Mutant:
    """Zeros in place of what pruning removes: same function, same size."""
    weights = {key: tensor.clone() for key, tensor in wide.weights.items()}
    for group, width in layout.spec.groups.items():
        gone = saliency[group].argsort(descending=True)[width:]
        for layer in wide.layout.consumers(group):
            columns = wide.layout.columns(layer).index
            weights[layer.weight][:, torch.isin(columns, gone)] = 0
    return Mutant(weights, wide.layout)


def _timed(network: Mutant, inputs: torch.Tensor, repeats: int) -> Times:
    program, weights = network.layout.program, stack([network.weights])
    labels = torch.arange(len(inputs)) % 10

    def forward() -> None:
        with torch.no_grad():
            run(program, weights, [inputs], stacked=True)

    def step() -> None:
        rows = [torch.arange(len(inputs))]
        train_networks(program, weights, inputs, labels, rows, epochs=1, batch_size=len(inputs))

    parameters = sum(t.numel() for t in network.weights.values() if t.is_floating_point())
    seconds = fastest({"forward": forward, "step": step}, repeats)
    return Times(seconds["forward"], seconds["step"], parameters)


def main() -> None:
    """Entry point of ``python -m evaluation.benchmarks.pruning``."""
    command(BenchmarkOptions, measure, prog="python -m evaluation.benchmarks.pruning")


if __name__ == "__main__":
    main()
