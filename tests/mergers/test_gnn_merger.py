"""The graph-network merger as a function of its members, whatever its parameters are."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metamerge.alignment import weight_matching
from metamerge.errors import IncompatibleWeights
from metamerge.mergers import probe_start
from metamerge.mergers.gnn import disagreement, mix
from metamerge.mergers.messages import MessageRound
from metamerge.structure import OUTPUTS, Layout, discover_program, run, trace
from metamerge.weights import stack


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
    assert furthest(make_merger(0.0)(members, case.layout), average(members)) < 1e-6


def test_a_merger_with_noise_on_its_parameters_is_not_the_average(case, make_merger):
    members = align(case, case.members)
    fused = make_merger()(members, case.layout)
    assert furthest(fused, average(members)) > 1e-2
    assert all(tensor.isfinite().all() for tensor in fused.values())


# ---------------------------------------------------------------------------- symmetries


def test_the_sparse_path_equals_the_dense_path(case, make_merger, monkeypatch):
    members, merger = align(case, case.members), make_merger()
    dense = merger(members, case.layout)
    monkeypatch.delattr(MessageRound, "_dense")
    assert furthest(merger(members, case.layout, sparse=True), dense) < 1e-5


def test_permuting_hidden_units_of_each_member_leaves_the_fused_network_as_it_is(case, make_merger):
    merger, spec = make_merger(), case.layout.spec
    expected = logits(case, merger(align(case, case.members), case.layout))
    shuffled = spec.permute(case.members, spec.random(seeded(1), (2, 4)))
    assert furthest(shuffled, case.members) > 1e-2
    found = logits(case, merger(align(case, shuffled), case.layout))
    assert gap(found, expected) < 1e-4


def test_permuting_the_slots_of_all_members_permutes_the_fused_weights(case, make_merger):
    merger, spec = make_merger(), case.layout.spec
    members = align(case, case.members)
    perm = spec.random(seeded(2), (2,))
    everyone = {group: p[:, None].expand(-1, 4, -1) for group, p in perm.items()}
    found = merger(spec.permute(members, everyone), case.layout)
    assert furthest(found, spec.permute(merger(members, case.layout), perm)) < 1e-4


@pytest.mark.parametrize("order", [[1, 0, 3, 2], [3, 1, 2, 0], [1, 2, 3, 0]])
def test_the_order_of_members_does_not_matter(case, make_merger, order):
    merger = make_merger()
    expected = logits(case, merger(align(case, case.members), case.layout))
    turned = {key: t[:, order] for key, t in case.members.items()}
    assert gap(logits(case, merger(align(case, turned), case.layout)), expected) < 1e-4


def test_renaming_the_classes_of_all_members_renames_those_of_the_fused_network(case, make_merger):
    merger, members = make_merger(), align(case, case.members)
    names = torch.tensor([3, 0, 4, 1, 2])
    renamed = dict(members)
    for layer in case.layout.producers(OUTPUTS):
        for key in (layer.weight, layer.bias):
            renamed[key] = members[key][:, :, names]
    expected = logits(case, merger(members, case.layout))
    found = logits(case, merger(renamed, case.layout))
    assert gap(found, expected[..., names]) < 1e-4
    assert gap(found, expected) > 1e-2


@pytest.mark.parametrize("count", [2, 5])
def test_copies_of_one_network_give_that_network(case, make_merger, count):
    spec = case.layout.spec
    copies = {key: t[:, :1].expand(-1, count, *t.shape[2:]) for key, t in case.members.items()}
    single = {key: t[:, 0] for key, t in case.members.items()}
    assert furthest(make_merger()(copies, case.layout), single) < 1e-5
    shuffled = spec.permute(copies, spec.random(seeded(3), (2, count)))
    found = logits(case, make_merger()(align(case, shuffled), case.layout))
    assert gap(found, logits(case, single)) < 1e-4


def test_families_do_not_look_at_each_other(case, make_merger):
    merger, members = make_merger(), align(case, case.members)
    both = merger(members, case.layout)
    second = merger({key: t[1:] for key, t in members.items()}, case.layout)
    assert furthest(second, {key: t[1:] for key, t in both.items()}) < 1e-5


# ---------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16])
def test_one_merger_serves_any_number_of_members(make_case, make_merger, count):
    case = make_case("mlp", (24,), families=1, members=count)
    members, merger = align(case, case.members), make_merger()
    fused = merger(members, case.layout)
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
    fused = make_merger()(align(case, case.members), case.layout)
    assert {key: t.shape for key, t in fused.items()} == {
        key: t[:, 0].shape for key, t in case.members.items()
    }
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
        return run(program, merger(aligned, layout), [images], stacked=True)

    expected = outcome(members)
    assert expected.isfinite().all()
    shuffled = layout.spec.permute(members, layout.spec.random(seeded(4), (1, 3)))
    assert gap(outcome({key: t[:, [2, 0, 1]] for key, t in shuffled.items()}), expected) < 1e-4
    copies = {key: t[:, [1, 1]] for key, t in members.items()}
    single = {key: t[:, 1] for key, t in members.items()}
    assert gap(outcome(copies), run(program, single, [images], stacked=True)) < 1e-4
    aligned = layout.spec.permute(members, weight_matching(members, layout.spec))
    dense, sparse = merger(aligned, layout), merger(aligned, layout, sparse=True)
    assert furthest(sparse, dense) < 1e-5 * max(float(t.abs().max()) for t in dense.values())


# ---------------------------------------------------------------------------- inputs


def test_a_network_of_other_inputs_is_refused(make_case, make_merger):
    case = make_case("mlp", (6,), shape=(1, 9, 9))
    with pytest.raises(IncompatibleWeights, match=r"\(1, 9, 9\), the merger's probes have \(1, 8"):
        make_merger()(case.members, case.layout)


def test_calibration_inputs_of_another_shape_are_refused(mlp_case, make_merger):
    with pytest.raises(IncompatibleWeights, match="Pass batches= with inputs"):
        make_merger()(mlp_case.members, mlp_case.layout, torch.rand(5, 3, 8, 8))


def test_calibration_inputs_take_the_place_of_the_probes(case, make_merger):
    merger = make_merger()
    found = merger(case.members, case.layout, case.inputs)
    assert furthest(found, merger(case.members, case.layout)) > 1e-3
    with torch.no_grad():
        merger.probes.fill_(torch.nan)  # nothing of them is read
    assert furthest(merger(case.members, case.layout, case.inputs), found) == 0
    other = make_merger(probes=len(case.inputs))
    with torch.no_grad():
        for key, parameter in other.named_parameters():
            own = case.inputs if key == "probes" else merger.get_parameter(key)
            parameter.copy_(own)
    assert furthest(other(case.members, case.layout), found) == 0


def test_members_are_not_changed(case, make_merger):
    before = {key: tensor.clone() for key, tensor in case.members.items()}
    make_merger()(case.members, case.layout)
    assert furthest(case.members, before) == 0


# ---------------------------------------------------------------------------- its parts


def only_mixing(make_merger, **config):
    """A merger that does nothing but mix: no residual, no prior, no refit."""
    merger = make_merger(0.3, rank=0, prior=0, **config)
    with torch.no_grad():
        merger.strength.zero_()
    return merger


def test_mixing_stays_between_the_members(case, make_merger):
    fused = only_mixing(make_merger)(case.members, case.layout)
    for key, tensor in case.members.items():
        low, high = tensor.aminmax(dim=1)
        assert (fused[key] >= low - 1e-6).all(), key
        assert (fused[key] <= high + 1e-6).all(), key
    assert furthest(fused, average(case.members)) > 1e-2


def test_every_unit_has_one_coefficient_per_member_and_they_sum_to_one(case, make_merger):
    first, second = ({key: t[:, i] for key, t in case.members.items()} for i in (0, 1))
    fused = only_mixing(make_merger)({k: t[:, :2] for k, t in case.members.items()}, case.layout)
    found = set()
    for layer in case.layout.layers:
        difference = (first[layer.weight] - second[layer.weight]).flatten(2)
        moved = (fused[layer.weight] - second[layer.weight]).flatten(2)
        share = (moved * difference).sum(-1) / difference.square().sum(-1)  # [f, units]
        assert (share >= 0).all()
        assert (share <= 1).all()
        # The same share carries the whole row and its bias: nothing is left over.
        assert torch.allclose(moved, share[..., None] * difference, atol=1e-6)
        expected = second[layer.bias] + share * (first[layer.bias] - second[layer.bias])
        assert torch.allclose(fused[layer.bias], expected, atol=1e-5)
        found |= {round(float(s), 3) for s in share.flatten()}
    assert len(found) > 10  # units, layers and families have coefficients of their own


def scalar_layout():
    model = nn.Sequential(nn.Linear(1, 2, bias=False))
    program = trace(model, torch.zeros(2, 1))
    return Layout(program, discover_program(program))


def test_a_mixture_of_four_numbers():
    members = {"0.weight": torch.tensor([[[[1.0], [2.0]], [[5.0], [4.0]]]])}  # [1, 2, 2, 1]
    shares = torch.tensor([[[0.75, 0.5], [0.25, 0.5]]])
    fused = mix(members, scalar_layout(), {OUTPUTS: shares})
    assert fused["0.weight"].flatten().tolist() == [2.0, 3.0]


def test_integer_tensors_are_those_of_the_first_member():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).eval()
    program = trace(model, torch.zeros(2, 3))
    layout = Layout(program, discover_program(program))
    members = {key: t[None] for key, t in stack([model.state_dict()] * 2).items()}
    members["1.num_batches_tracked"] = torch.tensor([[7, 9]])
    shares = {space: torch.full((1, 2, n), 0.5) for space, n in layout.spaces.items()}
    fused = mix(members, layout, shares)
    assert fused["1.num_batches_tracked"].tolist() == [7]
    assert torch.equal(fused["1.running_var"], members["1.running_var"][:, 0])


def test_the_disagreement_of_one_and_three_is_a_fifth():
    members = {"0.weight": torch.tensor([[[[1.0], [1.0]], [[3.0], [3.0]]]])}
    assert disagreement(members, scalar_layout())["0.weight"].tolist() == pytest.approx([0.2])


def test_copies_do_not_disagree(case):
    for count in (1, 2, 3, 8):
        copies = {key: t[:, :1].expand(-1, count, *t.shape[2:]) for key, t in case.members.items()}
        for spread in disagreement(copies, case.layout).values():
            assert spread.tolist() == [0.0, 0.0]


def test_members_of_zeros_do_not_disagree(case):
    zeros = {key: torch.zeros_like(t) for key, t in case.members.items()}
    for spread in disagreement(zeros, case.layout).values():
        assert spread.tolist() == [0.0, 0.0]


def test_disagreement_is_below_one_and_grows_with_the_distance(case):
    near = {k: t + 0.1 * (t - t.mean(1, keepdim=True)) for k, t in case.members.items()}
    spread, further = disagreement(case.members, case.layout), disagreement(near, case.layout)
    for key in spread:
        assert (spread[key] < further[key]).all()
        assert (further[key] < 1).all()


def test_the_residual_stays_within_the_members_deviation(case, make_merger):
    merger = make_merger(0.3, prior=0)
    with torch.no_grad():
        merger.strength.zero_()
    without = copy.deepcopy(merger)
    with torch.no_grad():
        without.row_factor.weight.zero_()
        without.row_factor.bias.zero_()
    fused, plain = merger(case.members, case.layout), without(case.members, case.layout)
    for layer in case.layout.layers:
        change = (fused[layer.weight] - plain[layer.weight]).abs()
        deviation = case.members[layer.weight].std(1, correction=0)
        assert (change <= deviation + 1e-6).all()
        assert change.max() > 1e-3
    biases = [layer.bias for layer in case.layout.layers]
    # No bias has a residual; the first layer's passes through `mean + (bias - mean)`.
    assert max(float((fused[key] - plain[key]).abs().max()) for key in biases) < 1e-5


def test_the_input_prior_looks_at_first_layers_that_read_whole_images(case, make_merger):
    merger = make_merger()
    without = copy.deepcopy(merger)
    with torch.no_grad():
        without.prior.zero_()
    changed = furthest(merger(case.members, case.layout), without(case.members, case.layout))
    linear = case.layout.layers[0].linear
    assert changed > 1e-3 if linear else changed == 0


def test_parts_that_are_switched_off_have_no_parameters(make_merger):
    names = {name.split(".")[0] for name, _ in make_merger().named_parameters()}
    bare = make_merger(gate=False, rank=0, prior=0)
    left = {name.split(".")[0] for name, _ in bare.named_parameters()}
    assert names - left == {"gate", "row_factor", "column_factor", "prior"}


def test_a_merger_without_its_optional_parts_still_merges(case, make_merger):
    bare = make_merger(gate=False, rank=0, prior=0, rounds=0)
    members = align(case, case.members)
    fused = bare(members, case.layout)
    assert logits(case, fused).isfinite().all()
    assert furthest(fused, average(members)) > 1e-2


def gate_case():
    """States, rows, biases, logits and disagreement of two families of three members."""
    generator = seeded(7)
    shapes = ((2, 3, 5, 12), (2, 3, 5, 6), (2, 3, 5), (2, 3, 20, 5))
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    return [*drawn, torch.tensor([0.3, 0.8])]


def test_a_fresh_gate_takes_the_mean_of_the_logits(make_merger):
    states, rows, bias, logits, spread = gate_case()
    found = make_merger(0.0).gate(states, rows, bias, logits, spread)
    assert torch.allclose(found, logits.mean(1), atol=1e-6)


def test_the_gate_weighs_logits_and_not_what_a_member_adds_to_all_of_them(make_merger):
    states, rows, bias, logits, spread = gate_case()
    gate = make_merger(0.5).gate

    def centred(logits):
        found = gate(states, rows, bias, logits, spread)
        return found - found.mean(-1, keepdim=True)

    louder = logits + torch.tensor([0.0, 3.0, -5.0])[:, None, None]
    assert torch.allclose(centred(louder), centred(logits), atol=1e-4)
    plain = logits.mean(1)
    assert not torch.allclose(centred(logits), plain - plain.mean(-1, keepdim=True), atol=0.1)


def test_the_gate_listens_to_the_member_whose_token_scores_highest(make_merger):
    states, rows, bias, logits, _ = gate_case()
    gate = make_merger(0.0).gate
    with torch.no_grad():  # one hidden unit that is 1 for the second member alone, as its level
        gate.embed[0].weight.zero_()
        gate.embed[0].bias.zero_()
        gate.embed[0].weight[0, -12] = 1.0
        for layer, unit in ((gate.mixer[0], 0), (gate.mixer[2], 0)):
            layer.weight.zero_()
            layer.bias.zero_()
            layer.weight[0, unit] = 1.0
        gate.head.weight[0, 0] = 1.0
    states = torch.zeros_like(states)
    states[:, 1, :, 0] = 1000.0
    found = gate(states, rows, bias, logits, torch.ones(2))
    own = logits[:, 1] - logits[:, 1].mean(-1, keepdim=True)
    assert torch.allclose(found - found.mean(-1, keepdim=True), own, atol=1e-4)


# ---------------------------------------------------------------------------- gradients

# A softmax over members does not see what is added to all of them alike.
INVISIBLE = {"mix.unit.bias", "mix.layer.bias", "mix.model.bias"}


def test_gradients_reach_every_parameter(case, make_merger):
    merger = make_merger(grad=True)
    classes = torch.arange(30) % 5
    found = logits(case, merger(align(case, case.members), case.layout))
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
    assert (gradients["probes"].flatten(1).abs().amax(1) > 0).all()


@pytest.mark.parametrize("value", [0.0, -100.0])
def test_dead_layers_give_finite_weights_and_gradients(case, make_merger, value):
    merger = make_merger(grad=True)
    for layer in case.layout.layers:  # what comes behind a dead layer is the same on every probe
        dead = dict(case.members)
        dead[layer.weight] = torch.zeros_like(dead[layer.weight])
        dead[layer.bias] = torch.full_like(dead[layer.bias], value)
        merger.zero_grad()
        fused = merger(dead, case.layout)
        assert all(tensor.isfinite().all() for tensor in fused.values())
        logits(case, fused).square().mean().backward()
        for name, parameter in merger.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), name


# ---------------------------------------------------------------------------- probes


def test_probes_start_as_different_images():
    images = torch.arange(10.0)[:, None]
    start = probe_start(images, 6, seeded())
    assert len(set(start.flatten().tolist())) == 6
    assert torch.equal(start, probe_start(images, 6, seeded()))
    assert not torch.equal(start, probe_start(images, 6, seeded(1)))


def test_too_few_images_for_the_probes_are_repeated_evenly():
    start = probe_start(torch.arange(4.0)[:, None], 10, seeded())
    counts = torch.bincount(start.flatten().long(), minlength=4)
    assert len(start) == 10
    assert counts.min() >= 2
    assert counts.max() <= 3
