"""Both sides of the benchmark of metrics find the same."""

import pytest
import torch

from evaluation.benchmarks.metrics import PARTS, AtOnce, OneByOne, gap, made
from evaluation.metrics import lines


@pytest.mark.parametrize("part", PARTS)
def test_both_sides_measure_the_same(part):
    layout, networks = made(6)
    families = {key: tensor.unflatten(0, (2, 3)) for key, tensor in networks.items()}
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(30, 1, 8, 8, generator=generator), torch.arange(30) % 10
    given = (layout, families, images, lines(3, 3)[1].flatten(0, 1))
    ours, theirs = (getattr(side(*given), part)() for side in (AtOnce, OneByOne))
    assert gap(ours, theirs) < 2e-6
