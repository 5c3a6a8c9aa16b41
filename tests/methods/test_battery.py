"""What every registered method must do. A new method is tested before its author writes a test."""

from functools import cache

import pytest
import torch
from torch import nn

from metamerge.declaration import REQUIRED, RESOURCES, bind
from metamerge.mergers import AutoencoderConfig, AutoencoderMerger, GNNConfig, GNNMerger
from metamerge.registry import get_method, list_methods
from metamerge.structure import Layout, discover_program, run, trace
from metamerge.weights import stack

METHODS = list_methods()
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
BUFFER = "1.num_batches_tracked"

# Sums in another order differ by float32's 1e-7; a least-squares solution behind them by that times
# the condition number, which a ridge of exp(-5) keeps below a few hundred.
REORDERED = 1e-4
# base + (member - base) rounds once in float32 and once more in the members' dtype
ROUNDING = {d: 4 * max(torch.finfo(d).eps, torch.finfo(torch.float32).eps) for d in FLOATS}

# What options are called with that have no default, or that make an order of members visible.
VALUES = {
    "coefficients": lambda members: [1.0 + i for i in range(members)],
    "t": lambda members: 0.3,
}

pytestmark = pytest.mark.parametrize("name", METHODS)


def network():
    return nn.Sequential(
        nn.Linear(6, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Linear(8, 7),
        nn.ReLU(),
        nn.Linear(7, 3),
    )


def make_layout():
    program = trace(network(), torch.zeros(2, 6))
    return Layout(program, discover_program(program))


LAYOUT = make_layout()
SHAPES = {key: tensor.shape for key, tensor in network().state_dict().items()}


def make_members(count=4, dtypes=(torch.float32,), seed=0):
    generator = torch.Generator().manual_seed(seed)
    members = []
    for index in range(count):
        dtype = dtypes[index % len(dtypes)]
        member = {}
        for key, shape in SHAPES.items():
            noise = torch.rand(shape, generator=generator)
            member[key] = (noise + 0.5 if "running_var" in key else noise - 0.4).to(dtype)
        member[BUFFER] = torch.tensor([5, 8, 6, 7][index % 4])
        members.append(member)
    return members


@cache
def make_merger(name):
    """Untrained, but with noise on all parameters: no head is zero."""
    fixed = {"probes": 64, "width": 8, "shapes": ((6,),)}
    if name == "autoencoder":
        config, kind = AutoencoderConfig(**fixed, size=4), AutoencoderMerger
    else:
        config, kind = GNNConfig(**fixed), GNNMerger
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        merger = kind(config, {(6,): torch.randn(64, 6)})
        for parameter in merger.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        merger.strength.add_(0.8)  # the refit takes part in full
    return merger.requires_grad_(False)


def make_resources(seed=0):
    generator = torch.Generator().manual_seed(3)
    made = {
        "base": make_members(1, seed=9)[0],
        "layout": LAYOUT,
        "batches": (torch.randn(40, 6, generator=generator), torch.arange(40) % 3),
        "labels": torch.arange(40) % 3,
        "report": {},
        "generator": torch.Generator().manual_seed(seed),
        "merger": make_merger("gnn"),
    }
    assert made.keys() == RESOURCES.keys()
    return made


def fuse(name, weights, resources=None, *, neutral=False):
    method = get_method(name)
    weights = weights[: method.most]
    options = {
        o: VALUES[o](len(weights))
        for o, default in method.options.items()
        if default is REQUIRED or (method.ordered and o in VALUES)
    }
    options |= method.neutral if neutral else {}
    resources = (resources or make_resources()) | {"merger": make_merger(name)}
    return method.function(weights, **bind(method, resources, options))


def assert_close(found, expected, tolerance):
    """Compare tensor by tensor, relative to the tensor's largest entry."""
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        error = float((found[key].double() - tensor.double()).abs().max())
        assert error <= tolerance * max(1.0, float(tensor.double().abs().max())), key


def storages(weights):
    return {tensor.untyped_storage().data_ptr() for tensor in weights.values()}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_keys_shapes_and_dtypes_are_kept(name, dtype):
    members = make_members(dtypes=[dtype])
    fused = fuse(name, members)
    assert list(fused) == list(members[0])
    assert {k: (t.shape, t.dtype) for k, t in fused.items()} == {
        k: (t.shape, t.dtype) for k, t in members[0].items()
    }
    assert all(tensor.isfinite().all() for tensor in fused.values())


@pytest.mark.parametrize(
    ("dtypes", "common"),
    [
        ([torch.float16, torch.float32], torch.float32),
        ([torch.float32, torch.float64], torch.float64),
        ([torch.float16, torch.bfloat16], torch.float32),
    ],
    ids=str,
)
def test_different_floating_dtypes_are_promoted(name, dtypes, common):
    for order in (dtypes, dtypes[::-1]):
        fused = fuse(name, make_members(dtypes=order))
        assert {t.dtype for k, t in fused.items() if k != BUFFER} == {common}


def test_of_integer_buffers_the_maximum_is_taken(name):
    fused = fuse(name, make_members())[BUFFER]
    assert fused.dtype == torch.int64
    assert int(fused) == 8


@pytest.mark.parametrize("count", [1, 4])
def test_inputs_stay_as_they_are_and_no_memory_is_shared(name, count):
    members, untouched = make_members(count), make_members(count)
    resources = make_resources()
    fused = fuse(name, members, resources)
    for member, before in zip(members, untouched, strict=True):
        assert all(torch.equal(member[key], before[key]) for key in before)
        assert storages(member).isdisjoint(storages(fused))
    assert storages(resources["base"]).isdisjoint(storages(fused))
    again = make_resources()
    assert all(torch.equal(resources["base"][k], t) for k, t in again["base"].items())
    assert all(map(torch.equal, resources["batches"], again["batches"]))
    state = again["merger"].state_dict()
    assert all(torch.equal(t, state[k]) for k, t in resources["merger"].state_dict().items())


def test_same_seed_gives_the_same_result_and_global_randomness_is_left_alone(name):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = fuse(name, make_members(), make_resources(seed=5))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    other = fuse(name, make_members(), make_resources(seed=5))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_order_of_members_does_not_matter_unless_the_record_says_so(name):
    members = make_members()[: get_method(name).most]
    order = [i for i in (2, 1, 3, 0) if i < len(members)]
    one, other = fuse(name, members), fuse(name, [members[i] for i in order])
    if get_method(name).ordered:
        assert not torch.allclose(one["0.weight"], other["0.weight"], atol=1e-3)
    else:
        assert_close(other, one, REORDERED)


def test_one_hidden_permutation_of_all_inputs_permutes_the_output(name):
    members = make_members()
    perm = LAYOUT.spec.random(torch.Generator().manual_seed(4))
    resources, other = make_resources(), make_resources()
    other["base"] = LAYOUT.spec.permute(other["base"], perm)
    fused = fuse(name, members, resources)
    expected = LAYOUT.spec.permute(fused, perm)
    moved = fuse(name, [LAYOUT.spec.permute(member, perm) for member in members], other)
    assert not torch.allclose(expected["3.weight"], fused["3.weight"], atol=1e-3)
    if get_method(name).elementwise:  # drawn entry by entry: equal in distribution only
        assert not torch.allclose(moved["3.weight"], expected["3.weight"], atol=1e-3)
    else:
        assert_close(moved, expected, REORDERED)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_one_member_comes_back_equal(name, dtype):
    members = make_members(1, dtypes=[dtype])
    fused = fuse(name, members, neutral=True)
    assert all(
        torch.equal(fused[key], tensor)
        if get_method(name).resources.isdisjoint({"base"})
        else torch.allclose(fused[key], tensor, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
        for key, tensor in members[0].items()
    )


def test_identical_members_come_back_as_that_member(name):
    member = make_members(1)[0]
    copies = [member, {k: t.clone() for k, t in member.items()}, member]
    fused = fuse(name, copies, neutral=True)
    assert_close(fused, member, 1e-5)


def test_identical_members_come_back_with_the_same_predictions(name):
    member = make_members(1)[0]
    fused = fuse(name, [member] * 3, neutral=True)
    inputs = torch.randn(50, 6, generator=torch.Generator().manual_seed(6))
    logits = run(LAYOUT.program, stack([member, fused]), [inputs], stacked=True)
    before, after = logits.softmax(-1)
    assert float((before - after).abs().max()) < 1e-5


def test_different_members_do_not_come_back_as_one_of_them(name):
    members = make_members()
    fused = fuse(name, members)
    for member in members:
        assert not torch.allclose(fused["3.weight"], member["3.weight"], atol=1e-3)


def test_gradients_reach_every_kind_of_tensor_of_the_members(name):
    members = make_members()
    leaves = [member["3.weight"].requires_grad_() for member in members]
    fused = fuse(name, members, neutral=True)  # fine-tuning to labels would end all gradients
    fused["3.weight"].square().sum().backward()
    assert any(leaf.grad is not None and float(leaf.grad.abs().sum()) > 0 for leaf in leaves)
