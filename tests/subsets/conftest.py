"""A network small enough for a dense Hessian."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from metamerge.structure import Layout, discover_program, run
from metamerge.subsets import find_kernels
from zoo.architectures import build, program_of
from zoo.training import init_networks


@pytest.fixture(scope="session")
def tiny():
    """Two networks of two convolutions (2 and 3 kernels) and a dense layer, in float64."""

    def network():
        return build("convnet", (1, 8, 8), 4, widths=(2, 3))

    program = program_of(network(), (1, 8, 8))
    weights = {k: t.double() for k, t in init_networks(network, [0, 1]).items()}
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(24, 1, 8, 8, generator=generator, dtype=torch.float64)
    targets = torch.randint(4, (24,), generator=generator)

    def loss(one):
        return F.cross_entropy(run(program, one, [inputs]), targets)

    layout = Layout(program, discover_program(program))
    return SimpleNamespace(
        program=program,
        layout=layout,
        weights=weights,
        first={key: tensor[0] for key, tensor in weights.items()},
        inputs=inputs,
        targets=targets,
        loss=loss,
        kernels=find_kernels(layout),
    )
