"""The autoencoder merger as a function of its members, and what its bottleneck loses."""

import pytest
import torch
import torch.nn.functional as F

from evaluation.gates import collapse_gates
from metamerge.alignment import weight_matching
from metamerge.mergers import (
    AutoencoderConfig,
    AutoencoderMerger,
    probe_start,
    reconstruction_loss,
)
from metamerge.mergers.latents import place_codes
from metamerge.mergers.reconstruction import reconstruct
from metamerge.structure import OUTPUTS, Layout, run


@pytest.fixture(scope="module", params=["vision", "dense", "blocks"])
def some_wired(request, wired_network):
    """Attention, concatenations, blocks: what columns can carry."""
    return wired_network(request.param)


def make(case, noise=0.1, *, grad=False, **config):
    """A merger; with noise on every parameter no head is zero, and each part has its say."""
    floating = case.inputs.is_floating_point()
    config = {"probes": 24, "width": 12, "size": 16, **config}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        shapes = (tuple(case.inputs.shape[1:]),) if floating else ()
        merger = AutoencoderMerger(AutoencoderConfig(shapes=shapes, **config))
        for parameter in merger.parameters():
            parameter.add_(noise * torch.randn(parameter.shape))
    return merger.requires_grad_(grad)


def exact(case):
    """Members and layout in float64: what is left is no rounding of an ill-conditioned system."""
    members = {k: t.double() if t.is_floating_point() else t for k, t in case.members.items()}
    return members, Layout(case.layout.program.in_float64(), case.layout.spec)


def probes(case):
    """Tokens cannot be learned: calibration inputs stand in for them."""
    return None if case.inputs.is_floating_point() else case.inputs[:24]


def align(members, layout):
    return layout.spec.permute(members, weight_matching(members, layout.spec))


def furthest(found, expected):
    assert found.keys() == expected.keys()
    return max(float((found[k].double() - expected[k].double()).abs().max()) for k in expected)


def average(members):
    return {k: t.mean(1) if t.is_floating_point() else t[:, 0] for k, t in members.items()}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------- what it starts from


def test_a_fresh_merger_is_the_average_of_the_aligned_members(some_wired):
    members = align(some_wired.members, some_wired.layout)
    fused = make(some_wired, 0.0)(members, some_wired.layout, probes(some_wired)).weights
    # Numbers of a few units, summed over three members: some roundings of 6e-8 each.
    assert furthest(fused, average(members)) < 1e-6


@pytest.mark.parametrize("count", [1, 2, 4])
def test_it_starts_there_with_any_number_of_members(case, count):
    members = align({k: t[:, :count] for k, t in case.members.items()}, case.layout)
    assert furthest(make(case, 0.0)(members, case.layout).weights, average(members)) < 1e-6
    moved = furthest(make(case)(members, case.layout).weights, average(members))
    assert moved < 1e-6 if count == 1 else moved > 1e-2


# ---------------------------------------------------------------------------- symmetries


@pytest.mark.parametrize("skip", [True, False])
def test_permuting_the_slots_of_all_members_permutes_the_fused_weights(some_wired, skip):
    members, layout = exact(some_wired)
    merger = make(some_wired, skip=skip).double()
    perm = layout.spec.random(seeded(2), (2,))
    everyone = {g: p[:, None].expand(-1, 3, *p.shape[1:]) for g, p in perm.items()}
    found = merger(layout.spec.permute(members, everyone), layout, probes(some_wired)).weights
    fused = merger(members, layout, probes(some_wired)).weights
    assert furthest(found, layout.spec.permute(fused, perm)) < 1e-8


@pytest.mark.parametrize("skip", [True, False])
def test_the_order_of_members_and_of_their_units_does_not_matter(case, skip):
    members, layout = exact(case)
    merger = make(case, skip=skip).double()
    shuffled = layout.spec.permute(members, layout.spec.random(seeded(1), (2, 4)))
    turned = {key: t[:, [3, 1, 0, 2]] for key, t in shuffled.items()}
    outputs = [
        run(
            layout.program,
            merger(align(w, layout), layout).weights,
            [case.inputs.double()],
            stacked=True,
        )
        for w in (members, turned)
    ]
    assert furthest({"": outputs[1]}, {"": outputs[0]}) < 1e-8


@pytest.mark.parametrize("skip", [True, False])
def test_renaming_the_classes_of_all_members_renames_those_of_the_fused_network(case, skip):
    members, layout = exact(case)
    merger, names = make(case, skip=skip).double(), torch.tensor([3, 0, 4, 1, 2])
    renamed = dict(members)
    for layer in layout.producers(OUTPUTS):
        for key in (layer.weight, layer.bias):
            renamed[key] = members[key][:, :, names]
    expected, found = (
        run(layout.program, merger(w, layout).weights, [case.inputs.double()], stacked=True)
        for w in (members, renamed)
    )
    assert float((found - expected[..., names]).abs().max()) < 1e-8
    assert float((found - expected).abs().max()) > 1e-2


def test_copies_of_one_network_give_that_network(some_wired):
    copies = {key: t[:, :1].expand(-1, 3, *t.shape[2:]) for key, t in some_wired.members.items()}
    single = {key: t[:, 0] for key, t in some_wired.members.items()}
    fused = make(some_wired)(copies, some_wired.layout, probes(some_wired)).weights
    assert furthest(fused, single) < 1e-5


def test_the_sparse_path_equals_the_dense_path(case):
    members, layout = exact(case)
    merger = make(case).double()
    dense = merger(members, layout).weights
    assert furthest(merger(members, layout, sparse=True).weights, dense) < 1e-8


# ---------------------------------------------------------------------------- its parts


def test_what_is_decoded_stays_within_the_members_deviation(case):
    merger = make(case, 0.3)
    with torch.no_grad():  # equal mixing and no refit: what is left is what the decoder adds
        merger.strength.zero_()
        merger.mix.weight.zero_()
    fused, plain = merger(case.members, case.layout).weights, average(case.members)
    for layer in case.layout.layers:
        change = (fused[layer.weight] - plain[layer.weight]).abs()
        assert (change <= case.members[layer.weight].std(1, correction=0) + 1e-6).all()
        assert change.max() > 1e-3


# A softmax over members does not see what is added to all of them alike.
INVISIBLE = {"mix.bias"}


def test_gradients_reach_every_parameter(case):
    for skip in (True, False):
        merger = make(case, grad=True, skip=skip)
        fused = merger(align(case.members, case.layout), case.layout).weights
        logits = run(case.layout.program, fused, [case.inputs], stacked=True)
        F.cross_entropy(logits.flatten(0, 1), torch.arange(60) % 5).backward()
        first = case.layout.layers[0]
        unread = set() if first.linear else {"coder.tables.1x8x8"}
        if all(layer.linear for layer in case.layout.layers):
            unread |= {"coder.taps.weight", "coder.taps.bias"}  # no unit has more than one column
        for name, parameter in merger.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), name
            if name in INVISIBLE:
                continue
            reached = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
            assert reached == (name not in unread), name


def test_codes_of_places_are_orthonormal_and_smooth():
    codes = place_codes((1, 6, 6), 20)
    assert torch.allclose(codes.T @ codes, torch.eye(20), atol=1e-5)
    assert torch.allclose(codes[:, 0], torch.full((36,), 1 / 6))
    maps = codes.unflatten(0, (6, 6))
    rough = maps.diff(dim=0).square().sum((0, 1)) + maps.diff(dim=1).square().sum((0, 1))
    assert rough[0] < 1e-10
    assert rough[1:3].max() < rough[-3:].min()


def test_codes_beyond_the_number_of_places_are_zero():
    codes = place_codes((7,), 10)
    assert torch.allclose(codes[:, :7].T @ codes[:, :7], torch.eye(7), atol=1e-5)
    assert (codes[:, 7:] == 0).all()
    assert torch.equal(codes, place_codes((7,), 10))


def test_rows_that_fit_into_a_latent_come_back(make_case):
    case = make_case("mlp", (24,))
    decoded = reconstruct(make(case, 0.0, size=64), case.members, case.layout)
    # 64 functions span all of 8 x 8 places; the ridge takes a thousandth of what they hold.
    first, last = case.layout.layers
    for layer, lost in ((first, 2e-3), (last, 0.2)):
        error = (decoded[layer.weight] - case.members[layer.weight]).norm()
        assert error < lost * case.members[layer.weight].norm()
        assert torch.allclose(decoded[layer.bias], case.members[layer.bias], atol=1e-6)


# ---------------------------------------------------------------------------- learning


def descend(merger, loss, steps, lr=3e-3):
    optimizer = torch.optim.AdamW(merger.parameters(), lr=lr, weight_decay=0.0)
    values = []
    for step in range(steps):
        value = loss(step)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(merger.parameters(), 1.0)
        optimizer.step()
        values.append(float(value.detach()))
    return values


def fresh(zoo, **config):
    images = zoo.objective[0]
    shape = tuple(images.shape[1:])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoencoderConfig(probes=64, shapes=(shape,), width=16, size=32, **config)
        return AutoencoderMerger(config, {shape: probe_start(images, 64, seeded())})


def batches(zoo):
    """Aligned training families and objective images of a step."""
    members, (inputs, targets) = align(zoo.train, zoo.layout), zoo.objective

    def pick(step):
        rows = torch.randperm(36, generator=seeded(step))[:12]
        images = torch.randperm(len(targets), generator=seeded(step))[:150]
        return {k: t[rows] for k, t in members.items()}, inputs[images], targets[images]

    return pick


def test_pre_training_lowers_the_reconstruction_loss_of_unseen_families(digits_zoo):
    merger, pick, layout = fresh(digits_zoo), batches(digits_zoo), digits_zoo.layout
    unseen, images = align(digits_zoo.unseen, layout), digits_zoo.validation[0]
    with torch.no_grad():
        before = float(reconstruction_loss(merger, unseen, layout, images))
        rows = float(reconstruction_loss(merger, unseen, layout, images, behaviour=0.0))
    descend(merger, lambda s: reconstruction_loss(merger, pick(s)[0], layout, pick(s)[1]), 30)
    with torch.no_grad():
        after = float(reconstruction_loss(merger, unseen, layout, images))
    assert rows < before  # behaviour is a part of it
    assert after < 0.8 * before


@pytest.fixture(scope="module")
def bottleneck(digits_zoo):
    """Trained to merge for 60 steps, without the skip; some seconds."""
    merger, pick, layout = fresh(digits_zoo, skip=False), batches(digits_zoo), digits_zoo.layout

    def loss(step):
        members, images, targets = pick(step)
        logits = run(layout.program, merger(members, layout).weights, [images], stacked=True)
        return F.cross_entropy(logits.movedim(-1, 1), targets.expand(len(logits), -1))

    descend(merger, loss, 60, 1e-2)
    return merger.requires_grad_(False)


def test_the_bottleneck_scores_above_the_average_and_fails_to_give_a_network_back(
    digits_zoo, bottleneck
):
    layout, (inputs, targets) = digits_zoo.layout, digits_zoo.validation
    members = align(digits_zoo.unseen, layout)

    def score(weights):
        logits = run(layout.program, weights, [inputs], stacked=True)
        return float((logits.argmax(-1) == targets).float().mean())

    assert score(bottleneck(members, layout).weights) > score(average(members)) + 0.1
    gates = {
        gate.name: gate
        for gate in collapse_gates(
            lambda w: bottleneck(w, layout).weights, digits_zoo.unseen, layout, inputs, targets
        )
    }
    assert not gates["identical_members"].passed
    assert gates["identical_members"].value > 0.3
    assert gates["hidden_permutation"].passed
    assert gates["member_order"].passed
    # It has no idea of a class beyond its row in the members, so garbage does not become digits.
    assert gates["garbage_gaussian"].passed
