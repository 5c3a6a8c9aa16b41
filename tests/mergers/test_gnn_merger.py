"""The graph-network merger as a function of its members, whatever its parameters are."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metamerge.alignment import weight_matching
from metamerge.mergers.messages import MessageRound
from metamerge.mergers.probes import imagine
from metamerge.structure import OUTPUTS, Layout, discover_program, run, trace
from metamerge.weights import stack

SHAPE = (1, 8, 8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def align(case, members):
    return case.layout.spec.permute(members, weight_matching(members, case.layout.spec))


def logits(case, fused):
    return run(case.layout.program, fused, [case.inputs], stacked=True)


def gap(found, expected):
    """Largest deviation over families, relative to the size of what is expected."""
    distance = (found - expected).flatten(1).norm(dim=1)
    return float((distance / expected.flatten(1).norm(dim=1)).max())


def furthest(found, expected):
    assert found.keys() == expected.keys()
    return max(float((found[key] - expected[key]).abs().max()) for key in expected)


def average(members):
    return {key: tensor.mean(1) for key, tensor in members.items()}


# ---------------------------------------------------------------------------- what it starts from


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_fresh_merger_is_the_average_of_the_aligned_members(case, make_merger, count):
    members = align(case, {key: t[:, :count] for key, t in case.members.items()})
    # Numbers below 1 and four roundings of 6e-8 each; the strength of the refit is exactly zero.
    assert furthest(make_merger(0.0)(members, case.layout).weights, average(members)) < 1e-6


def test_a_merger_with_noise_on_its_parameters_is_not_the_average(case, make_merger):
    members = align(case, case.members)
    fused = make_merger()(members, case.layout).weights
    assert furthest(fused, average(members)) > 1e-2
    assert all(tensor.isfinite().all() for tensor in fused.values())


# ---------------------------------------------------------------------------- symmetries


def test_the_sparse_path_equals_the_dense_path(case, make_merger, monkeypatch):
    members, merger = align(case, case.members), make_merger()
    dense = merger(members, case.layout)
    monkeypatch.delattr(MessageRound, "_dense")
    sparse = merger(members, case.layout, sparse=True)
    assert furthest(sparse.weights, dense.weights) < 1e-5
    assert torch.allclose(sparse.trust, dense.trust, atol=1e-5)


def test_permuting_hidden_units_of_each_member_leaves_the_fused_network_as_it_is(case, make_merger):
    merger, spec = make_merger(), case.layout.spec
    expected = merger(align(case, case.members), case.layout)
    shuffled = spec.permute(case.members, spec.random(seeded(1), (2, 4)))
    assert furthest(shuffled, case.members) > 1e-2
    found = merger(align(case, shuffled), case.layout)
    assert gap(logits(case, found.weights), logits(case, expected.weights)) < 1e-4
    assert torch.allclose(found.trust, expected.trust, atol=1e-5)


def test_permuting_the_slots_of_all_members_permutes_the_fused_weights(case, make_merger):
    merger, spec = make_merger(), case.layout.spec
    members = align(case, case.members)
    perm = spec.random(seeded(2), (2,))
    everyone = {group: p[:, None].expand(-1, 4, -1) for group, p in perm.items()}
    found = merger(spec.permute(members, everyone), case.layout).weights
    assert furthest(found, spec.permute(merger(members, case.layout).weights, perm)) < 1e-4


@pytest.mark.parametrize("order", [[1, 0, 3, 2], [3, 1, 2, 0], [1, 2, 3, 0]])
def test_the_order_of_members_does_not_matter(case, make_merger, order):
    merger = make_merger()
    expected = merger(align(case, case.members), case.layout)
    turned = {key: t[:, order] for key, t in case.members.items()}
    found = merger(align(case, turned), case.layout)
    assert gap(logits(case, found.weights), logits(case, expected.weights)) < 1e-4
    assert torch.allclose(found.trust, expected.trust[:, order], atol=1e-5)
    assert not torch.allclose(found.trust, expected.trust, atol=1e-3)


def test_renaming_the_classes_of_all_members_renames_those_of_the_fused_network(case, make_merger):
    merger, members = make_merger(), align(case, case.members)
    names = torch.tensor([3, 0, 4, 1, 2])
    renamed = dict(members)
    for layer in case.layout.producers(OUTPUTS):
        for key in (layer.weight, layer.bias):
            renamed[key] = members[key][:, :, names]
    before, after = merger(members, case.layout), merger(renamed, case.layout)
    expected, found = logits(case, before.weights), logits(case, after.weights)
    assert gap(found, expected[..., names]) < 1e-4
    assert gap(found, expected) > 1e-2
    assert torch.allclose(after.trust, before.trust[:, :, names], atol=1e-5)


@pytest.mark.parametrize("count", [2, 5])
def test_copies_of_one_network_give_that_network(case, make_merger, count):
    spec = case.layout.spec
    copies = {key: t[:, :1].expand(-1, count, *t.shape[2:]) for key, t in case.members.items()}
    single = {key: t[:, 0] for key, t in case.members.items()}
    fused, trust = make_merger()(copies, case.layout)
    assert furthest(fused, single) < 1e-5
    assert float(trust.abs().max()) < 1e-12  # the square of a rounding of 6e-8, and less
    shuffled = spec.permute(copies, spec.random(seeded(3), (2, count)))
    found = logits(case, make_merger()(align(case, shuffled), case.layout).weights)
    assert gap(found, logits(case, single)) < 1e-4


def test_families_do_not_look_at_each_other(case, make_merger):
    merger, members = make_merger(), align(case, case.members)
    both = merger(members, case.layout)
    second = merger({key: t[1:] for key, t in members.items()}, case.layout)
    assert furthest(second.weights, {key: t[1:] for key, t in both.weights.items()}) < 1e-5
    assert torch.allclose(second.trust, both.trust[1:], atol=1e-5)


# ---------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16])
def test_one_merger_serves_any_number_of_members(make_case, make_merger, count):
    case = make_case("mlp", (24,), families=1, members=count)
    members, merger = align(case, case.members), make_merger()
    fused = merger(members, case.layout).weights
    assert all(tensor.isfinite().all() for tensor in fused.values())
    changed = furthest(fused, average(members))
    assert changed < 1e-5 if count == 1 else changed > 1e-3


@pytest.mark.parametrize(
    ("name", "widths", "classes"),
    [
        ("mlp", (7,), 5),
        ("mlp", (64,), 3),
        ("mlp", (9, 8, 7, 6), 12),
        ("mlp", (), 4),
        ("cnn", (4,), 2),
        ("cnn", (6, 5, 8), 10),
    ],
)
def test_one_merger_serves_any_width_depth_and_number_of_classes(
    make_case, make_merger, name, widths, classes
):
    case = make_case(name, widths, classes=classes)
    fused, trust = make_merger()(align(case, case.members), case.layout)
    assert {key: t.shape for key, t in fused.items()} == {
        key: t[:, 0].shape for key, t in case.members.items()
    }
    assert trust.shape == (2, 4, classes, 5)
    assert logits(case, fused).isfinite().all()
    assert furthest(fused, average(case.members)) > 1e-3


class Residual(nn.Module):
    """Two convolutions write one space of units, from maps of different sizes."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.block, self.head = nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 4)

    def forward(self, images):
        maps = F.max_pool2d(self.norm(self.stem(images)).relu(), 2)
        return self.head((maps + self.block(maps)).relu().mean((2, 3)))


OTHER_NETWORKS = {
    "residual, normalised": Residual,
    "no biases": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(64, 9, bias=False), nn.ReLU(), nn.Linear(9, 4, bias=False)
    ),
    "maps flattened into a linear layer": lambda: nn.Sequential(
        nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(180, 4)
    ),
}


@pytest.mark.parametrize("network", OTHER_NETWORKS)
def test_networks_of_other_shapes_keep_all_symmetries(make_merger, network):
    models = [OTHER_NETWORKS[network]().eval() for _ in range(3)]
    program = trace(models[0], torch.zeros(2, 1, 8, 8))
    layout = Layout(program, discover_program(program))
    generator = seeded()
    for key, tensor in [pair for model in models for pair in model.state_dict().items()]:
        if tensor.is_floating_point():  # in place; variances stay positive
            drawn = torch.rand(tensor.shape, generator=generator)
            tensor.copy_(drawn + 0.5 if "running_var" in key else drawn - 0.5)
    members = {key: t[None] for key, t in stack([m.state_dict() for m in models]).items()}
    images = torch.rand(20, 1, 8, 8, generator=seeded())
    merger = make_merger()

    def outcome(members):
        aligned = layout.spec.permute(members, weight_matching(members, layout.spec))
        return run(program, merger(aligned, layout).weights, [images], stacked=True)

    expected = outcome(members)
    assert expected.isfinite().all()
    shuffled = layout.spec.permute(members, layout.spec.random(seeded(4), (1, 3)))
    assert gap(outcome({key: t[:, [2, 0, 1]] for key, t in shuffled.items()}), expected) < 1e-4
    copies = {key: t[:, [1, 1]] for key, t in members.items()}
    single = {key: t[:, 1] for key, t in members.items()}
    assert gap(outcome(copies), run(program, single, [images], stacked=True)) < 1e-4
    aligned = layout.spec.permute(members, weight_matching(members, layout.spec))
    dense, sparse = merger(aligned, layout).weights, merger(aligned, layout, sparse=True).weights
    assert furthest(sparse, dense) < 1e-5 * max(float(t.abs().max()) for t in dense.values())


# ---------------------------------------------------------------------------- inputs


def test_each_shape_of_input_has_a_bank_of_its_own(make_case, make_merger):
    merger = make_merger(shapes=(SHAPE, (1, 9, 9)))
    for shape in (SHAPE, (1, 9, 9)):
        case = make_case("mlp", (6,), shape=shape)
        bank = merger.probes.for_members(case.members, case.layout)
        assert bank.shape == (48, *shape)
        found = merger(case.members, case.layout).weights
        assert furthest(merger(case.members, case.layout, bank).weights, found) == 0
        with torch.no_grad():
            bank.add_(1.0)  # it is the parameter itself that is learned
        assert furthest(merger(case.members, case.layout).weights, found) > 1e-3


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_a_network_of_other_inputs_is_watched_on_imagined_ones(make_case, make_merger, name):
    case = make_case(name, (6,), shape=(1, 9, 9))
    merger, members = make_merger(), align(case, case.members)
    imagined = imagine(members, case.layout, 48, seeded())
    found = merger(members, case.layout)
    again = merger(members, case.layout, imagined)
    assert furthest(found.weights, again.weights) == 0
    assert torch.equal(found.trust, again.trust)
    assert furthest(found.weights, average(members)) > 1e-2


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_on_imagined_inputs_symmetries_hold_as_well(make_case, make_merger, name):
    case = make_case(name, (6,), families=1, shape=(1, 9, 9))
    merger, spec = make_merger(), case.layout.spec
    expected = logits(case, merger(align(case, case.members), case.layout).weights)
    shuffled = spec.permute(case.members, spec.random(seeded(1), (1, 4)))
    for members in (shuffled, {key: t[:, [2, 0, 3, 1]] for key, t in case.members.items()}):
        found = logits(case, merger(align(case, members), case.layout).weights)
        assert gap(found, expected) < 1e-4


def test_calibration_inputs_take_the_place_of_the_probes(case, make_merger):
    merger = make_merger()
    found = merger(case.members, case.layout, case.inputs)
    assert furthest(found.weights, merger(case.members, case.layout).weights) > 1e-3
    with torch.no_grad():
        merger.probes(SHAPE).fill_(torch.nan)  # nothing of them is read
    again = merger(case.members, case.layout, case.inputs)
    assert furthest(again.weights, found.weights) == 0
    other = make_merger(probes=len(case.inputs))
    with torch.no_grad():
        for key, parameter in other.named_parameters():
            own = case.inputs if key.startswith("probes") else merger.get_parameter(key)
            parameter.copy_(own)
    assert furthest(other(case.members, case.layout).weights, found.weights) == 0


def test_members_are_not_changed(case, make_merger):
    before = {key: tensor.clone() for key, tensor in case.members.items()}
    make_merger()(case.members, case.layout)
    assert furthest(case.members, before) == 0


# ---------------------------------------------------------------------------- gradients

# A softmax over members does not see what is added to all of them alike.
INVISIBLE = {"mix.bias"}


def test_gradients_reach_every_parameter(case, make_merger):
    merger = make_merger(grad=True)
    classes = torch.arange(30) % 5
    found = logits(case, merger(align(case, case.members), case.layout).weights)
    F.cross_entropy(found.flatten(0, 1), classes.repeat(2)).backward()
    gradients = {name: p.grad for name, p in merger.named_parameters()}
    if not case.layout.layers[0].linear:
        assert gradients.pop("prior") is None  # it smooths rows that look at whole images
    assert None not in gradients.values()
    sizes = {name: float(gradient.abs().max()) for name, gradient in gradients.items()}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert {name for name, size in sizes.items() if size == 0} <= INVISIBLE
    for name in INVISIBLE:  # nothing but rounding
        assert sizes[name] < 1e-4 * sizes[name.replace("bias", "weight")]
    # Every probe takes part.
    assert (gradients["probes.banks.1x8x8"].flatten(1).abs().amax(1) > 0).all()


@pytest.mark.parametrize("value", [0.0, -100.0])
def test_dead_layers_give_finite_weights_and_gradients(case, make_merger, value):
    merger = make_merger(grad=True)
    for layer in case.layout.layers:  # what comes behind a dead layer is the same on every probe
        dead = dict(case.members)
        dead[layer.weight] = torch.zeros_like(dead[layer.weight])
        dead[layer.bias] = torch.full_like(dead[layer.bias], value)
        merger.zero_grad()
        fused = merger(dead, case.layout).weights
        assert all(tensor.isfinite().all() for tensor in fused.values())
        logits(case, fused).square().mean().backward()
        for name, parameter in merger.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), name
