"""Processes that take their parts of a step have the gradient of the whole step in the end.

The processes that are launched run this file: ``main``.
"""

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import DistributedDataParallelKwargs

from metamerge.mergers import GNNConfig, GNNMerger, ThresholdObjective
from metamerge.mergers.gate import answers_of
from metamerge.structure import Layout, discover_program
from trainers import drawing
from trainers.drawing import Batch, in_parts
from trainers.launching import launched
from trainers.stepping import Step, take_gradients
from zoo import architectures
from zoo.training import init_networks

SCRIPT = str(Path(__file__))
SHAPE, CLASSES, FAMILIES, MEMBERS, PROBES = (1, 6, 6), 4, 6, 3, 16


def whole_step():
    """A step of random families."""

    def network():
        return architectures.build("mlp", SHAPE, CLASSES, widths=(8,))

    program = architectures.program_of(network(), SHAPE)
    layout = Layout(program, discover_program(program))
    drawn = init_networks(network, range(FAMILIES * MEMBERS))
    members = {key: t.unflatten(0, (FAMILIES, MEMBERS)) for key, t in drawn.items()}
    inputs, targets = torch.rand(20, *SHAPE), torch.randint(CLASSES, (FAMILIES, 20))
    answers = answers_of(members, layout, inputs)
    return Batch(layout, members, answers, inputs, targets, torch.ones(FAMILIES), None)


def made_step():
    """A merger that has parameters everywhere, and probes of a shape that is not asked for."""
    merger = GNNMerger(GNNConfig(probes=PROBES, shapes=(SHAPE, (1, 5, 5)), width=8))
    with torch.no_grad():
        for parameter in merger.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return Step(merger, ThresholdObjective("ensemble"), 1.0, "float32")


def main():
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    with launched("here", kwargs_handlers=[unused]) as accelerator:
        torch.manual_seed(0)
        batch, step = whole_step(), made_step()
        alone = copy.deepcopy(step)
        alone([batch]).backward()
        rank = accelerator.process_index
        own = batch.only(torch.arange(rank, FAMILIES, 2))
        own = replace(own, share=1.0)  # processes take the mean of theirs
        drawing.HELD = 1 if rank else 10**9
        parts = in_parts([own], PROBES)
        take_gradients(accelerator.prepare(step), parts, accelerator)
        pairs = {
            name: (parameter.grad, other.grad)
            for (name, parameter), other in zip(
                step.named_parameters(), alone.parameters(), strict=True
            )
        }
        none = [name for name, (_, expected) in pairs.items() if expected is None]
        apart = max(
            float((found - expected).abs().max()) / (float(expected.abs().max()) + 1e-4)
            for name, (found, expected) in pairs.items()
            if name not in none
        )
        told = {"parts": len(parts), "apart": apart, "unused": none}
        sys.stdout.write(f"told {rank} {json.dumps(told)}\n")  # at once: two processes write


def test_processes_with_other_numbers_of_parts_have_the_gradient_of_the_whole_step(
    launch, two_processes, tmp_path
):
    done = launch(tmp_path, **two_processes)
    assert done.code == 0, done.err
    lines = sorted(line.split(maxsplit=2) for line in done.out.splitlines() if "told" in line)
    assert [rank for _, rank, _ in lines] == ["0", "1"]
    first, second = (json.loads(told) for *_, told in lines)
    assert (first["parts"], second["parts"]) == (1, 3)
    for told in (first, second):
        assert told["apart"] == pytest.approx(0.0, abs=1e-4)
        assert told["unused"] == ["merger.probes.banks.1x5x5"]


if __name__ == "__main__":
    main()
