"""A small real zoo, and a merger trained on it, that several rooms are tested on."""

from types import SimpleNamespace

import pytest
import torch

from evaluation.metrics import family_logits, references
from metamerge.alignment import weight_matching
from metamerge.mergers import GNNConfig, GNNMerger, ThresholdObjective, probe_start
from metamerge.structure import Layout, discover_program, run
from zoo import architectures
from zoo.parts import split_task
from zoo.splits import dirichlet
from zoo.tasks import load_task
from zoo.training import init_networks, train_networks

FAMILIES, MEMBERS, TRAINED_ON = 48, 4, 36


@pytest.fixture(scope="session")
def digits_zoo():
    """48 families of four networks 64-32-10, each trained on 200 skewed digits; half a second.

    ``train`` and ``unseen`` share no member; nobody has seen the images of any other part.
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
    ).weights
    families = {key: t.unflatten(0, (FAMILIES, MEMBERS)) for key, t in weights.items()}
    return SimpleNamespace(
        network=network,
        layout=Layout(program, discover_program(program)),
        train={key: t[:TRAINED_ON] for key, t in families.items()},
        unseen={key: t[TRAINED_ON:] for key, t in families.items()},
        segments=segments,
        split=split,
        objective=split.images("objective"),
        validation=split.images("validation"),
    )


@pytest.fixture(scope="session")
def trained_merger(digits_zoo):
    """A merger after 40 steps on training families and objective images; a second or two."""
    layout, (inputs, targets) = digits_zoo.layout, digits_zoo.objective
    members = layout.spec.permute(digits_zoo.train, weight_matching(digits_zoo.train, layout.spec))
    known = references(family_logits(layout.program, members, inputs), targets)
    objective = ThresholdObjective("ensemble", headroom=0.05)
    thresholds = objective.thresholds(known["best_member"], known["ensemble"])
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GNNConfig(input_shape=tuple(inputs.shape[1:]), probes=64, width=16)
        merger = GNNMerger(config, probe_start(inputs, 64, generator))
    fast = [merger.strength, merger.log_ridge]
    named = {id(parameter) for parameter in (*fast, merger.probes)}
    groups = [
        {"params": fast, "lr": 3e-2},
        {"params": [merger.probes], "lr": 1e-2},
        {"params": [p for p in merger.parameters() if id(p) not in named], "lr": 3e-3},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for _ in range(40):
        rows = torch.randperm(TRAINED_ON, generator=generator)[:12]
        images = torch.randperm(len(targets), generator=generator)[:150]
        fused = merger({key: t[rows] for key, t in members.items()}, layout)
        logits = run(layout.program, fused, [inputs[images]], stacked=True)
        loss, _ = objective.loss(logits, targets[images], thresholds[rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(merger.parameters(), 1.0)
        optimizer.step()
    return merger.requires_grad_(False).eval()
