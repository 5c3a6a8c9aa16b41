"""What every registered alignment must do. A new one is tested before its author writes a test."""

import json
from functools import cache

import pytest
import torch
from torch import nn

from metamerge import merge
from metamerge.alignment import align_members, matching_cost
from metamerge.errors import ConfigError
from metamerge.registry import get_alignment, list_alignments
from metamerge.structure import Layout, discover_program, run, trace
from metamerge.weights import stack

ALIGNMENTS = list_alignments()
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
COUNT = 4

# A change of scale rounds every weight once, and sums of permuted units come in another order:
# both by float32's 1e-7, times the few hundred terms that an output is a sum of.
ROUNDING = 1e-4

pytestmark = pytest.mark.parametrize("name", ALIGNMENTS)


class Residual(nn.Module):
    """One group that three layers write to, and a block with a group of its own."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(6, 8)
        self.up, self.down = nn.Linear(8, 10), nn.Linear(10, 8)
        self.leave = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.enter(x))
        return self.leave(x + self.down(torch.relu(self.up(x))))


def mlp():
    return nn.Sequential(
        nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3)
    )


def cnn():
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 6, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(54, 3),
    )


NETWORKS = {"mlp": (mlp, (6,)), "cnn": (cnn, (2, 6, 6)), "residual": (Residual, (6,))}
networks = pytest.mark.parametrize("network", NETWORKS)


def make_inputs(network, count=64):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(count, *NETWORKS[network][1], generator=generator)


@cache
def layout_of(network):
    program = trace(NETWORKS[network][0]().eval(), make_inputs(network, 2))
    return Layout(program, discover_program(program))


@cache
def state_of(network):
    with torch.random.fork_rng(devices=[]):
        return NETWORKS[network][0]().state_dict()


def make_members(network, count=COUNT, *, seed=0, dtype=torch.float32):
    generator, members = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        member = {}
        for key, tensor in state_of(network).items():
            noise = 0.5 * torch.randn(tensor.shape, generator=generator)
            if not tensor.is_floating_point():
                member[key] = torch.tensor(5)
            else:
                member[key] = (noise.abs() + 0.5 if "running_var" in key else noise).to(dtype)
        members.append(member)
    return members


def make_copies(network, count=COUNT):
    """One network, its hidden units stored in another order by every member."""
    spec, generator = layout_of(network).spec, torch.Generator().manual_seed(1)
    member = make_members(network, 1)[0]
    return [spec.permute(member, spec.random(generator)) for _ in range(count)]


def aligned(name, network, members, *, seed=0, then=()):
    resources = {
        "batches": make_inputs(network).to(next(iter(members[0].values())).dtype),
        "generator": torch.Generator().manual_seed(seed),
    }
    return align_members(members, layout_of(network), [name, *then], resources=resources)


def matched(name, network, members):
    """Members in common slots: what neither permutes nor fits widths needs a matching after it."""
    record = get_alignment(name)
    then = () if record.permutes or record.elastic else ("weight_matching",)
    return aligned(name, network, members, then=then)


def cost(members, layout):
    family = {key: tensor[None] for key, tensor in stack(members).items()}
    return float(matching_cost(family, layout.spec, layout.spec.identity()))


def outputs(members, network):
    with torch.no_grad():
        inputs = [make_inputs(network)]
        return run(layout_of(network).program, stack(members), inputs, stacked=True)


def assert_near(found, expected):
    error = float((found - expected).abs().max())
    assert error <= ROUNDING * max(1.0, float(expected.abs().max()))


@networks
def test_what_it_returns_are_permutations_of_every_group_or_members_like_those_given(name, network):
    record, layout = get_alignment(name), layout_of(network)
    members = make_members(network)
    found, _ = aligned(name, network, members)
    for own, given in zip(found, members, strict=True):
        assert list(own) == list(given)
        assert all(own[k].shape == t.shape and own[k].dtype == t.dtype for k, t in given.items())
        assert all(tensor.isfinite().all() for tensor in own.values())
    if record.permutes:
        at_hand = {"layout": layout, "batches": make_inputs(network), "report": {}}
        at_hand["generator"] = torch.Generator().manual_seed(0)
        asked = {key: at_hand[key] for key in record.resources & at_hand.keys()}
        family = {key: tensor[None] for key, tensor in stack(members).items()}
        perm = record.function(family, layout.spec, **asked)
        assert list(perm) == list(layout.spec.groups)
        for group, n in layout.spec.groups.items():
            assert perm[group].shape == (1, COUNT, n)
            assert torch.equal(perm[group].sort(-1).values, torch.arange(n).expand(1, COUNT, n))


@networks
def test_every_member_remains_the_same_function(name, network):
    members = make_members(network)
    found, _ = aligned(name, network, members)
    assert_near(outputs(found, network), outputs(members, network))


def test_inputs_stay_as_they_are(name):
    members, untouched = make_members("cnn"), make_members("cnn")
    aligned(name, "cnn", members)
    for member, before in zip(members, untouched, strict=True):
        assert all(torch.equal(member[key], before[key]) for key in before)


def test_same_seed_gives_the_same_result_and_global_randomness_is_left_alone(name):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, _ = aligned(name, "mlp", make_members("mlp"), seed=5)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    other, _ = aligned(name, "mlp", make_members("mlp"), seed=5)
    for first, second in zip(one, other, strict=True):
        assert all(torch.equal(first[key], second[key]) for key in first)


@networks
def test_the_order_of_members_does_not_matter(name, network):
    members = make_members(network)
    found, _ = matched(name, network, members)
    order = [2, 0, 3, 1]
    other, _ = matched(name, network, [members[k] for k in order])
    average = [{key: t.double().mean(0) for key, t in stack(own).items()} for own in (found, other)]
    # fused networks are compared: the common order of units may be another
    expected, moved = outputs([{k: t.float() for k, t in own.items()} for own in average], network)
    assert_near(moved, expected)


@networks
def test_units_that_copies_store_in_another_order_are_brought_back(name, network):
    copies, layout = make_copies(network), layout_of(network)
    found, _ = matched(name, network, copies)
    assert cost(copies, layout) > 0.3
    assert cost(found, layout) < 1e-12


def test_identical_members_stay_identical(name):
    member = make_members("cnn", 1)[0]
    found, _ = aligned(name, "cnn", [member, {k: t.clone() for k, t in member.items()}, member])
    assert all(torch.equal(own[key], found[0][key]) for own in found for key in member)


def test_one_member_remains_the_same_function(name):
    members = make_members("mlp", 1)
    found, _ = aligned(name, "mlp", members)
    assert len(found) == 1
    assert_near(outputs(found, "mlp"), outputs(members, "mlp"))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_members_of_every_dtype_keep_it_and_stay_finite(name, dtype):
    members = make_members("mlp", dtype=dtype)
    found, _ = aligned(name, "mlp", members)
    for own in found:
        assert {tensor.dtype for tensor in own.values()} == {dtype}
        assert all(tensor.isfinite().all() for tensor in own.values())


def test_members_of_zeros_stay_zeros(name):
    zeros = {key: torch.zeros_like(t) for key, t in make_members("mlp", 1)[0].items()}
    found, _ = aligned(name, "mlp", [zeros, dict(zeros), dict(zeros)])
    assert all(torch.equal(own[key], zeros[key]) for own in found for key in zeros)


def test_trained_members_come_closer_where_weights_are_what_it_looks_at(name, digits_zoo):
    record, layout = get_alignment(name), digits_zoo.layout
    resources = {
        "batches": digits_zoo.objective[0],
        "generator": torch.Generator().manual_seed(0),
    }
    then = () if record.permutes or record.elastic else ("weight_matching",)
    for family in range(2):
        members = [{k: t[family, m] for k, t in digits_zoo.train.items()} for m in range(4)]
        found, told = align_members(members, layout, [name, *then], resources=resources)
        after, before = told[-1]["matching_cost"], cost(members, layout)
        assert cost(found, layout) == pytest.approx(after, rel=1e-6)
        if "batches" not in record.required:
            assert after < 0.99 * before


def test_its_report_is_filled_and_can_be_written_as_json(name):
    record = get_alignment(name)
    _, (told,) = aligned(name, "mlp", make_members("mlp"))
    assert json.loads(json.dumps(told)) == told
    shared = {"name", "seconds", "matching_cost", "matching_cost_before"}
    assert told["name"] == name
    assert shared <= told.keys()
    assert ("report" in record.resources) == bool(told.keys() - shared)
    if record.permutes:
        assert len(told["objective"]) >= 1


def test_an_option_that_it_does_not_have_is_refused(name):
    with pytest.raises(ConfigError, match=f"'{name}' has no option 'no_such_option'"):
        align_members(make_members("mlp"), layout_of("mlp"), name, options={"no_such_option": 1})


@networks
def test_merge_uses_it_by_its_name(name, network):
    build, _ = NETWORKS[network]
    copies = make_copies(network, 3)
    record = get_alignment(name)
    then = [] if record.permutes or record.elastic else ["weight_matching"]
    given = {"model": build(), "method": "average", "batches": make_inputs(network)}
    merged = merge(copies, align=[name, *then], **given)
    assert [told["name"] for told in merged.report["alignment"]] == [name, *then]
    assert merged.report["matching_cost"] < 1e-12
    if network != "cnn":  # there the batch normalisation is measured anew
        fused, member = outputs([merged.weights, copies[0]], network)
        assert_near(fused, member)
