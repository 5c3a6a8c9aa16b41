"""A small real zoo that several rooms are tested on."""

from types import SimpleNamespace

import pytest
import torch

from metamerge.structure import Layout, discover_program
from zoo import architectures
from zoo.parts import split_task
from zoo.splits import dirichlet
from zoo.tasks import load_task
from zoo.training import init_networks, train_networks

FAMILIES, MEMBERS, TRAINED_ON = 48, 4, 36


@pytest.fixture(scope="session")
def digits_zoo():
    """48 families of four networks 64-32-10, each trained on 200 skewed digits; half a second.

    ``train`` and ``unseen`` share no member; nobody has seen the objective, validation or test images.
    """
    split = split_task(load_task("digits"), objective=400)
    task, shape = split.task, tuple(split.task.inputs.shape[1:])

    def network():
        return architectures.build("mlp", shape, task.classes, widths=(32,))

    program = architectures.program_of(network(), shape)
    generator = torch.Generator().manual_seed(0)
    skew = {"alpha": 0.4, "size": 200, "overlap": True}
    segments = [
        segment
        for _ in range(FAMILIES)
        for segment in dirichlet(task.targets, split.segments, MEMBERS, generator=generator, **skew)
    ]
    weights = train_networks(
        program,
        init_networks(network, range(FAMILIES * MEMBERS)),
        task.inputs,
        task.targets,
        segments,
        epochs=15,
    )
    families = {key: t.unflatten(0, (FAMILIES, MEMBERS)) for key, t in weights.items()}
    return SimpleNamespace(
        network=network,
        layout=Layout.of(program, discover_program(program)),
        train={key: t[:TRAINED_ON] for key, t in families.items()},
        unseen={key: t[TRAINED_ON:] for key, t in families.items()},
        segments=segments,
        split=split,
        objective=split.images("objective"),
        validation=split.images("validation"),
    )
