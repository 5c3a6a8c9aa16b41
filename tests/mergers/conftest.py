from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from metamerge.mergers import GNNConfig, GNNMerger
from metamerge.structure import Layout, discover_program
from zoo import architectures
from zoo.training import init_networks

SHAPE, CLASSES = (1, 8, 8), 5
NETWORKS = {
    "MLP with 1 hidden layer": ("mlp", (24,)),
    "MLP with 3 hidden layers": ("mlp", (20, 16, 12)),
    "CNN": ("cnn", (16, 32)),
}


def build_case(name, widths, families=2, members=4, shape=SHAPE, classes=CLASSES):
    """Layout of an architecture and random members of it; biases too are far from zero."""

    def network():
        return architectures.build(name, shape, classes, widths=widths)

    program = architectures.program_of(network(), shape)
    layout = Layout(program, discover_program(program))
    weights = init_networks(network, range(families * members))
    stacked = {key: t.unflatten(0, (families, members)) for key, t in weights.items()}
    inputs = torch.rand(30, *shape, generator=torch.Generator().manual_seed(1))
    return SimpleNamespace(layout=layout, members=stacked, inputs=inputs)


@pytest.fixture(scope="session")
def make_case():
    return build_case


@pytest.fixture(scope="session", params=NETWORKS)
def case(request):
    return build_case(*NETWORKS[request.param])


@pytest.fixture(scope="session")
def mlp_case():
    return build_case(*NETWORKS["MLP with 1 hidden layer"])


@pytest.fixture(scope="session")
def make_merger():
    """Make a merger; with noise on every parameter no head is zero, and each part has its say."""

    def make(noise=0.1, *, shapes=(SHAPE,), grad=False, **config):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            merger = GNNMerger(GNNConfig(**{"probes": 48, "shapes": shapes, "width": 12, **config}))
            for parameter in merger.parameters():
                parameter.add_(noise * torch.randn(parameter.shape))
        return merger.requires_grad_(grad)

    return make


@pytest.fixture(scope="session")
def only():
    """One family of several."""

    def only(members, family):
        return {key: tensor[family : family + 1] for key, tensor in members.items()}

    return only


@pytest.fixture(scope="session")
def familiar():
    """Tell a merger how much members have to tell apart."""

    def familiar(merger, least):
        merger.config = replace(merger.config, familiar=least)
        return merger

    return familiar


@pytest.fixture(scope="session")
def knowing():
    """Members whose output layers say more than an init does, so that answers are not all alike."""

    def knowing(case, *, of=3.0):
        last = list(case.members)[-2:]
        return {key: of * t if key in last else t for key, t in case.members.items()}

    return knowing
