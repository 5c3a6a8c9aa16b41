"""Random weights and inputs that the proof of a permutation spec runs a network on."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from zlib import crc32

import torch
from torch import Tensor

from metamerge.structure.program import Node, Program

NORMS = {"batch_norm.default", "instance_norm.default"}


class Drawn(Mapping[str, Tensor]):
    """Random weights that are drawn when they are asked for, the same for the same key.

    Normalised by fan-in, or positive with small biases, negative where they are subtracted.
    """

    def __init__(self, program: Program, seed: int, *, positive: bool) -> None:
        self.shapes = {key: program.shape(value) for value, key in program.parameters.items()}
        self.indices = program.indices
        self.statistics = _statistics(program)
        self.seed = seed
        self.positive = positive
        self.kept: dict[str, Tensor] = {}  # those that the running operator reads

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.kept:
            self.kept[key] = self._draw(key)
        return self.kept[key]

    def _draw(self, key: str) -> Tensor:
        if key in self.indices:
            return self.indices[key]
        shape = self.shapes[key]
        generator = torch.Generator().manual_seed(crc32(f"{self.seed} {key}".encode()))
        tensor = torch.empty(shape, dtype=torch.float64).uniform_(-1.7, 1.7, generator=generator)
        kind = self.statistics.get(key)
        if kind == "var":
            return tensor.abs_().add_(0.5)
        if tensor.ndim > 1:
            fan_in = max(1, tensor.shape[1:].numel())
            return tensor.abs_().div_(fan_in) if self.positive else tensor.div_(fan_in**0.5)
        if not self.positive:
            return tensor
        if kind == "mean":
            return tensor.abs_().div_(-10)
        return tensor.abs_().div_(10) if key.endswith("bias") else tensor.abs_().add_(0.5)


def random_inputs(program: Program, generator: torch.Generator) -> list[Tensor]:
    """Random rows, the first half positive; twice as many as were traced where that is free."""
    return [_input(program, name, generator) for name in program.inputs]


def _input(program: Program, name: str, generator: torch.Generator) -> Tensor:
    sizes = program.sizes[name]
    repeats = [2 if size < 0 else 1 for size in sizes]
    if name in program.examples:
        return program.examples[name].repeat(repeats)
    shape = [abs(size) * times for size, times in zip(sizes, repeats, strict=True)]
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if x.ndim:
        x[: (shape[0] + 1) // 2].abs_()
    return x


def _statistics(program: Program) -> dict[str, str]:
    """State-dict keys of running means and variances."""
    found = {}
    for node in program.nodes:
        if node.op in NORMS:
            for name, kind in (("running_mean", "mean"), ("running_var", "var")):
                value = node.arguments[name]
                if value is not None and value.name in program.parameters:
                    found[program.parameters[value.name]] = kind
    return found


def on_batch_statistics(program: Program) -> Program:
    """The network in training mode: normalisations use the statistics of the batch."""
    nodes = []
    for node in program.nodes:
        if node.op in NORMS:
            x, weight, bias, _, _, _, *rest = node.args
            node = Node(node.name, node.op, (x, weight, bias, None, None, True, *rest))
        nodes.append(node)
    return replace(program, nodes=tuple(nodes))
