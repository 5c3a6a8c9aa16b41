"""Refining: Adam beside torch's own, and what steps towards a consensus do and leave alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metamerge.alignment import weight_matching
from metamerge.calibration import divergence, predict
from metamerge.errors import ConfigError
from metamerge.mergers import consensus, fuse, fuse_beside, refine, refining
from metamerge.mergers.gate import answers_of
from metamerge.mergers.ordering import in_canonical_order, member_order
from metamerge.mergers.probes import filled_up, mixtures
from metamerge.mergers.refining import AGREED, descend, nearest_members
from metamerge.mergers.watching import watched_inputs
from metamerge.structure import Layout, discover_program, run, trace
from metamerge.weights import stack


def furthest(found, expected):
    assert found.keys() == expected.keys()
    return max(float((found[key] - expected[key]).abs().max()) for key in expected)


def average(members):
    return {key: tensor.mean(1) for key, tensor in members.items()}


def families_in(members):
    return len(next(iter(members.values())))


def drawn_trust(families, members=4, classes=5):
    return torch.randn(families, members, classes, 5, generator=torch.Generator().manual_seed(5))


# ---------------------------------------------------------------------------- Adam


def test_descending_is_adam_with_falling_rates_and_floors_relative_to_first_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    layout = Layout(program := trace(model, torch.zeros(2, 3).double()), discover_program(program))
    inputs, wanted = torch.randn(12, 3).double(), torch.arange(12) % 2
    before = {key: tensor[None].clone() for key, tensor in model.state_dict().items()}

    def loss(weights):
        logits = run(program, weights, [inputs], stacked=True)
        return F.cross_entropy(logits[0], wanted)[None]

    found = descend(before, layout, loss, steps=20, lr=0.05)
    F.cross_entropy(model(inputs), wanted).backward()
    groups = [
        {"params": [parameter], "eps": 0.03 * float(parameter.grad.square().mean().sqrt())}
        for parameter in model.parameters()
    ]
    optimizer = torch.optim.Adam(groups, lr=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 20)
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), wanted).backward()
        optimizer.step()
        schedule.step()
    for key, tensor in model.state_dict().items():
        assert not torch.allclose(before[key][0], tensor, atol=0.1)
        # Rates are float32: 20 steps of 0.05 with a relative error of 6e-8.
        assert torch.allclose(found[key][0], tensor, atol=1e-6), key


def squares(layout, inputs):
    """Mean square of the logits, which every step lowers."""
    return lambda weights: (
        run(layout.program, weights, [inputs], stacked=True).square().mean((1, 2))
    )


def test_networks_descend_side_by_side_as_they_do_alone(mlp_case):
    start, loss = average(mlp_case.members), squares(mlp_case.layout, mlp_case.inputs)
    both = descend(start, mlp_case.layout, loss, steps=5, lr=torch.tensor([0.1, 0.02]))
    for family, lr in enumerate((0.1, 0.02)):
        own = {key: tensor[family : family + 1] for key, tensor in start.items()}
        alone = descend(own, mlp_case.layout, loss, steps=5, lr=lr)
        assert furthest(alone, {key: t[family : family + 1] for key, t in both.items()}) < 1e-5


def test_a_rate_of_zero_leaves_a_network_to_the_bit(mlp_case):
    start, loss = average(mlp_case.members), squares(mlp_case.layout, mlp_case.inputs)
    found = descend(start, mlp_case.layout, loss, steps=3, lr=torch.tensor([0.0, 0.1]))
    assert furthest({k: t[:1] for k, t in found.items()}, {k: t[:1] for k, t in start.items()}) == 0
    assert furthest({k: t[1:] for k, t in found.items()}, {k: t[1:] for k, t in start.items()}) > 0


def test_long_descents_say_how_far_they_are(mlp_case, monkeypatch, caplog):
    start, loss = average(mlp_case.members), squares(mlp_case.layout, mlp_case.inputs)
    with caplog.at_level("INFO", logger="metamerge"):
        descend(start, mlp_case.layout, loss, steps=3, lr=0.1)
        assert not caplog.messages  # short ones say nothing
        monkeypatch.setattr(refining, "PAUSE", 0.0)
        descend(start, mlp_case.layout, loss, steps=3, lr=0.1)
    assert caplog.messages == [f"step {n} of 3, networks: 2" for n in (1, 2, 3)]


def test_descending_changes_nothing_in_place_and_shares_no_memory(mlp_case):
    start = average(mlp_case.members)
    before = {key: tensor.clone() for key, tensor in start.items()}
    loss = squares(mlp_case.layout, mlp_case.inputs)
    for lr in (0.0, 0.1):
        found = descend(start, mlp_case.layout, loss, steps=2, lr=lr)
        assert furthest(start, before) == 0
        for key, tensor in found.items():
            assert tensor.data_ptr() != start[key].data_ptr()
            assert not tensor.requires_grad


def test_steps_along_a_steady_gradient_are_as_long_as_their_rates(mlp_case):
    # A gradient that stays the same: every step of Adam is as long as its rate, 0.4 0.3 0.2 0.1,
    # but for the floor, which adds 3 % to the divisor.
    start = average(mlp_case.members)
    layer = mlp_case.layout.layers[0]
    found = descend(start, mlp_case.layout, lambda w: 1000 * w[layer.bias].sum(1), steps=4, lr=0.4)
    moved = start[layer.bias] - found[layer.bias]
    assert torch.allclose(moved, torch.full_like(moved, 1 / 1.03), atol=1e-5)
    assert torch.equal(found[layer.weight], start[layer.weight])


def test_what_belongs_to_no_layer_stays():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).eval()
    program = trace(model, torch.zeros(2, 3))
    layout = Layout(program, discover_program(program))
    start = {key: tensor.clone() for key, tensor in stack([model.state_dict()] * 2).items()}
    inputs = torch.rand(5, 3)
    found = descend(start, layout, squares(layout, inputs), steps=3, lr=0.1)
    changed = {key for key in start if not torch.equal(found[key], start[key])}
    assert changed == {"0.weight", "0.bias", "3.weight", "3.bias"}


def test_tied_weights_stay_tied(wired_network):
    wired = wired_network("tied")
    start = average(wired.members)
    ((alias, key),) = wired.layout.program.tied.items()
    start[alias] = start[key]
    found = descend(start, wired.layout, squares(wired.layout, wired.inputs), steps=2, lr=0.1)
    assert torch.equal(found[alias], found[key])
    assert not torch.equal(found[key], start[key])


# ---------------------------------------------------------------------------- refining


@pytest.mark.parametrize("lr", [1e-3, 3e-3])
def test_refining_comes_nearer_to_the_consensus(case, lr):
    start, trust = average(case.members), drawn_trust(2)
    wanted = consensus(trust, answers_of(case.members, case.layout, case.inputs)).softmax(-1)

    def apart(weights):
        return divergence(predict(weights, case.layout, case.inputs), wanted)

    given = (case.members, case.layout, case.inputs, trust)
    few, many = (refine(start, *given, steps=steps, lr=lr) for steps in (10, 40))
    assert (apart(few) < apart(start)).all()
    assert (apart(many) < apart(few)).all()


def test_who_trusts_all_alike_learns_the_mean_of_their_logits(case):
    start, layout = average(case.members), case.layout
    found = refine(start, case.members, layout, case.inputs, None, steps=200)
    wanted = answers_of(case.members, layout, case.inputs).mean(1).softmax(-1)
    before, after = (
        divergence(predict(w, layout, case.inputs), wanted).mean() for w in (start, found)
    )
    assert after < before / 2


def test_members_that_agree_stay_as_they_are(case):
    single = {key: tensor[:, 0] for key, tensor in case.members.items()}
    copies = {key: tensor[:, :1].expand_as(tensor) for key, tensor in case.members.items()}
    trust = torch.zeros(2, 4, 5, 5)
    found = refine(single, copies, case.layout, case.inputs, trust, steps=20, lr=0.1)
    assert furthest(found, single) == 0


def test_a_family_that_agrees_stays_beside_one_that_does_not(mlp_case):
    members = {key: tensor.clone() for key, tensor in mlp_case.members.items()}
    for tensor in members.values():
        tensor[0] = tensor[0, :1]
    start = {key: tensor[:, 0] for key, tensor in members.items()}
    trust = torch.zeros(2, 4, 5, 5)
    apart = divergence(
        predict(start, mlp_case.layout, mlp_case.inputs),
        answers_of(members, mlp_case.layout, mlp_case.inputs).mean(1).softmax(-1),
    )
    assert (apart > AGREED).tolist() == [False, True]
    found = refine(start, members, mlp_case.layout, mlp_case.inputs, trust, steps=5)
    for key, tensor in found.items():
        assert torch.equal(tensor[0], start[key][0])
        assert not torch.equal(tensor[1], start[key][1])


def test_families_do_not_depend_on_their_neighbours(case):
    start, trust = average(case.members), drawn_trust(2)
    both = refine(start, case.members, case.layout, case.inputs, trust, steps=10)
    for family in (0, 1):
        own = slice(family, family + 1)
        alone = refine(
            {key: tensor[own] for key, tensor in start.items()},
            {key: tensor[own] for key, tensor in case.members.items()},
            case.layout,
            case.inputs,
            trust[own],
            steps=10,
        )
        # Ten steps of 1e-3 at most, whose directions differ by rounding where gradients are small.
        assert furthest(alone, {key: tensor[own] for key, tensor in both.items()}) < 1e-4


def test_more_inputs_than_a_step_takes_are_drawn_by_the_generator(mlp_case):
    start, trust = average(mlp_case.members), drawn_trust(2)
    inputs = torch.rand(300, 1, 8, 8, generator=torch.Generator().manual_seed(2))

    def refined(seed):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        given = (mlp_case.members, mlp_case.layout, inputs, trust)
        return refine(start, *given, steps=3, generator=generator)

    assert furthest(refined(None), refined(0)) == 0
    assert furthest(refined(1), refined(0)) > 0


def test_refining_needs_no_gradient_to_be_switched_on(mlp_case):
    start, trust = average(mlp_case.members), drawn_trust(2)
    given = (start, mlp_case.members, mlp_case.layout, mlp_case.inputs, trust)
    with torch.no_grad():
        found = refine(*given, steps=3)
    assert furthest(found, refine(*given, steps=3)) == 0
    assert furthest(found, start) > 0


# ---------------------------------------------------------------------------- fusing


def test_answers_are_those_of_every_member(case):
    found = answers_of(case.members, case.layout, case.inputs)
    for family, member in ((0, 0), (1, 2)):
        single = {key: tensor[family, member] for key, tensor in case.members.items()}
        expected = run(case.layout.program, single, [case.inputs])
        assert torch.allclose(found[family, member], expected, atol=1e-5)


def align(case):
    return case.layout.spec.permute(case.members, weight_matching(case.members, case.layout.spec))


def test_without_steps_fusing_is_the_merger_itself(case, make_merger):
    merger, members = make_merger(), align(case)
    for inputs in (None, case.inputs):
        expected = merger(members, case.layout, inputs).weights
        # Members and units in another order: sums are rounded in another way.
        assert furthest(fuse(merger, members, case.layout, inputs), expected) < 1e-5


@pytest.mark.parametrize("mixed", [0, 64])
def test_steps_refine_on_what_members_were_watched_on_and_mixtures(case, make_merger, mixed):
    merger = make_merger(refine=4, mixtures=mixed)
    members, perm = in_canonical_order(align(case), case.layout)
    for inputs in (None, case.inputs):
        watched = merger.probes.for_members(members, case.layout) if inputs is None else inputs
        more = mixtures(watched, max(0, mixed - len(watched)), torch.Generator().manual_seed(0))
        shown = torch.cat([watched, more])
        fused, trust = merger(members, case.layout, shown)
        expected = refine(fused, members, case.layout, shown, trust, steps=4)
        found = fuse(merger, align(case), case.layout, inputs)
        assert furthest(found, case.layout.spec.unpermute(expected, perm)) < 1e-6
        assert furthest(expected, fused) > 1e-4


def test_spare_probes_are_refined_on_and_not_watched(case, make_merger):
    merger = make_merger(probes=12, refine=6, spare=36, shapes=((1, 8, 8),))
    members, perm = in_canonical_order(align(case), case.layout)
    watched = merger.probes.for_members(members, case.layout)
    spare = merger.probes.spare(watched.shape[1:])
    assert [len(watched), len(spare)] == [12, 36]
    fused, trust = merger(members, case.layout, watched)
    shown = torch.cat([watched, spare])
    expected = refine(fused, members, case.layout, shown, trust, steps=6)
    report = {}
    found = fuse(merger, align(case), case.layout, report=report)
    assert furthest(found, case.layout.spec.unpermute(expected, perm)) < 1e-6
    alone = refine(fused, members, case.layout, watched, trust, steps=6)
    assert furthest(expected, alone) > 1e-4
    assert report["watched_on"] == "12 learned probes (and 36 spare ones to refine on)"
    fuse(merger, align(case), case.layout, steps=0, report=report)
    assert report["watched_on"] == "12 learned probes"
    # given inputs take the place of all probes
    own, trust = merger(members, case.layout, case.inputs)
    expected = refine(own, members, case.layout, case.inputs, trust, steps=6)
    found = fuse(merger, align(case), case.layout, case.inputs)
    assert furthest(found, case.layout.spec.unpermute(expected, perm)) < 1e-6


def test_refining_does_not_depend_on_the_order_of_members_and_units(case, make_merger):
    merger, members, spec = make_merger(refine=20, mixtures=64), align(case), case.layout.spec
    expected = fuse(merger, members, case.layout)
    turned = {key: tensor[:, [2, 0, 3, 1]] for key, tensor in members.items()}
    assert furthest(fuse(merger, turned, case.layout), expected) == 0
    perm = spec.random(torch.Generator().manual_seed(1), (2,))
    everyone = {group: p[:, None].expand(-1, 4, -1) for group, p in perm.items()}
    found = fuse(merger, spec.permute(members, everyone), case.layout)
    assert furthest(found, spec.permute(expected, perm)) == 0


# ---------------------------------------------------------------------------- from a member


def test_the_nearest_member_is_the_one_whose_answers_are_the_consensus_by_hand():
    answers = torch.tensor([[[[2.0, 0.0]], [[0.0, 1.0]], [[1.0, 0.0]]]])  # one family of three
    first = torch.zeros(1, 3, 2, 5)
    members = {"weight": torch.arange(3.0)[None]}
    # all trusted alike: the consensus is (1, 1/3), which the last is nearest to
    for trust, expected in ((first, 2), (first.clone(), 1)):
        if expected == 1:
            trust[:, 1, :, 0] = 50.0  # the second alone is listened to
        weights, numbers = nearest_members(members, answers, trust)
        assert numbers.tolist() == [expected]
        assert weights["weight"].tolist() == [float(expected)]


@pytest.mark.parametrize("given", [False, True])
def test_steps_start_from_the_nearest_member_and_the_report_says_which(case, make_merger, given):
    merger = make_merger(refine=4, mixtures=64, start="member")
    inputs, aligned, report = case.inputs if given else None, align(case), {}
    members, perm = in_canonical_order(aligned, case.layout)
    watched = case.inputs if given else merger.probes.for_members(members, case.layout)
    shown = filled_up(watched, case.layout, 64)
    _, trust = merger(members, case.layout, shown)
    start, numbers = nearest_members(members, answers_of(members, case.layout, shown), trust)
    expected = refine(start, members, case.layout, shown, trust, steps=4)
    found = fuse(merger, aligned, case.layout, inputs, report=report)
    assert furthest(found, case.layout.spec.unpermute(expected, perm)) < 1e-6
    assert furthest(expected, start) > 1e-4
    assert report["started_from"] == int(member_order(aligned)[0][numbers[0]])
    assert "validation families preferred it" in report["note"]
    # without steps it is the merger itself, and nothing is started from a member
    report = {}
    none = fuse(merger, aligned, case.layout, inputs, steps=0, report=report)
    assert furthest(none, fuse(make_merger(mixtures=64), aligned, case.layout, inputs)) == 0
    assert "started_from" not in report


def test_inputs_beside_probes_start_from_a_member_as_well(mlp_case, make_merger):
    merger, report = make_merger(refine=4, start="member"), {}
    one = {key: tensor[:1] for key, tensor in align(mlp_case).items()}
    found = fuse_beside(merger, one, mlp_case.layout, mlp_case.inputs, report=report)
    plain = fuse_beside(make_merger(refine=4), one, mlp_case.layout, mlp_case.inputs)
    assert 0 <= report["started_from"] < 4
    assert furthest(found, plain) > 1e-4


# ---------------------------------------------------------------------------- a few at a time


def test_families_are_merged_a_few_at_a_time_where_their_maps_are_many(
    case, make_merger, monkeypatch
):
    merger, members = make_merger(refine=4, mixtures=64), align(case)
    expected, merged = fuse(merger, members, case.layout), []
    merger.register_forward_hook(lambda _, given, __: merged.append(families_in(given[0])))
    monkeypatch.setattr(refining, "WATCHED", 4 * 64 * case.layout.program.widest)  # one family's
    found = fuse(merger, members, case.layout)
    assert merged == [1, 1]
    assert furthest(found, expected) < 1e-5


def test_asked_for_steps_come_before_those_of_the_merger(mlp_case, make_merger):
    merger, members = make_merger(refine=4), align(mlp_case)
    none, two, four, own = (
        fuse(merger, members, mlp_case.layout, steps=steps) for steps in (0, 2, 4, None)
    )
    assert furthest(none, merger(members, mlp_case.layout).weights) < 1e-5
    assert furthest(four, own) == 0
    assert furthest(four, two) > 1e-4


def test_a_network_of_other_inputs_is_refined_on_imagined_ones(make_case, make_merger):
    case = make_case("mlp", (6,), families=1, shape=(1, 9, 9))
    merger, members = make_merger(), align(case)
    fused = fuse(merger, members, case.layout, steps=3)
    (watched,) = watched_inputs(merger, in_canonical_order(members, case.layout)[0], case.layout)
    given = fuse(merger, members, case.layout, watched.inputs, steps=3)
    assert furthest(fused, given) < 1e-5
    assert furthest(fused, fuse(merger, members, case.layout, steps=0)) > 1e-4


def test_calibration_inputs_of_another_shape_are_refused(mlp_case, make_merger):
    with pytest.raises(ConfigError, match=r"\(5, 3, 8, 8\), the network takes \(b, 1, 8, 8\)"):
        fuse(make_merger(), mlp_case.members, mlp_case.layout, torch.rand(5, 3, 8, 8))
