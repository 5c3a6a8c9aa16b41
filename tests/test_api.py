"""merge() from end to end: every kind of source, what comes out, and what is refused."""

import json
import os
import pickle
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from metamerge import merge, registry
from metamerge.alignment import weight_matching
from metamerge.checkpoints import Checkpoint, save_checkpoint
from metamerge.corrections.refit import refit
from metamerge.corrections.repair import repair
from metamerge.errors import (
    ConfigError,
    IncompatibleWeights,
    NonFinite,
    StructureError,
    Truncated,
    Unreadable,
    Unsafe,
)
from metamerge.mergers.files import bundled_merger, save_merger
from metamerge.mergers.gnn import GNNConfig, GNNMerger
from metamerge.registry import merge_method
from metamerge.structure import (
    Factor,
    Layout,
    PermutationSpec,
    discover,
    discover_program,
    trace,
)
from metamerge.weights import stack
from zoo.writing import Building

# A mean of K equal float32 numbers is off by at most K roundings of 2**-24, relative; sums in
# another order by as many roundings of the largest partial sum.
EQUAL = {"rtol": 1e-6, "atol": 1e-6}
REORDERED = {"rtol": 1e-4, "atol": 1e-5}

AVERAGE = {"method": "average", "align": None}


def network(seed=0, widths=(6, 8, 3)):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Flatten()]
        for fan_in, width in pairwise(widths):
            layers += [nn.Linear(fan_in, width), nn.ReLU()]
        return nn.Sequential(*layers[:-1])


def normed(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


class Tied(nn.Module):
    """An output layer that goes by two names."""

    def __init__(self, seed):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.hidden = nn.Linear(6, 8)
            self.head = nn.Linear(8, 3)
        self.alias = self.head

    def forward(self, x):
        return self.head(torch.relu(self.hidden(x)))


def weights_of(seed=0, **kwargs):
    return {key: t.clone() for key, t in network(seed, **kwargs).state_dict().items()}


def inputs(count=40, seed=5):
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        torch.testing.assert_close(found[key], tensor, **(tolerance or {"rtol": 0, "atol": 0}))


def memory(weights):
    return {t.untyped_storage().data_ptr() for t in weights.values() if t.numel()}


def tree(folder):
    """Every file below a folder with its bytes."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    """An empty working folder, so that whatever is written by accident is seen."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def zoo(tmp_path):
    """A zoo of two families of two, untrained."""
    nets = [weights_of(seed) for seed in range(4)]
    families = {key: t.unflatten(0, (2, 2)) for key, t in stack(nets).items()}
    records = {"init_seed": torch.arange(4).reshape(2, 2), "segment": torch.zeros(2, 2, 1).int()}
    building = Building(tmp_path / "zoo", "0")
    building.open()
    building.add("a", {"weights": families, "records": records}, members=2)
    program = trace(network(), torch.zeros(2, 6)).to_json()
    manifest = {"digest": "0", "options": {}, "task": {}, "program": program, "source": None}
    return building.finish({"test-k2": ["a"]}, manifest)


@pytest.fixture(scope="module")
def learned():
    """A merger none of whose heads is zero."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        made = GNNMerger(GNNConfig(shapes=((6,),), probes=32, width=8))
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        made.strength.fill_(0.8)
    return made.requires_grad_(False)


@pytest.fixture
def merger(learned, tmp_path):
    return save_merger(learned, tmp_path / "merger", {"note": "made by hand"})


@pytest.fixture
def register():
    """Register merge methods for one test."""
    before = dict(registry._METHODS.records)
    yield merge_method
    registry._METHODS.records.clear()
    registry._METHODS.records.update(before)


@contextmanager
def refused(error, *told):
    """The body raises an error that tells all of this, and writes nothing."""
    folder = Path.cwd().parent
    before = tree(folder)
    with pytest.raises(error) as caught:
        yield
    assert type(caught.value) is error
    message = str(caught.value)
    assert [piece for piece in told if piece not in message] == [], message
    assert tree(folder) == before


# ------------------------------------------------------------------------------- what goes in


def in_safetensors(folder, weights):
    save_file(weights, folder / "a.safetensors")
    return folder / "a.safetensors"


def in_torch_file(folder, weights):
    torch.save(weights, folder / "a.pt")
    return str(folder / "a.pt")


def in_folder(folder, weights):
    return save_checkpoint(weights, folder / "a")


def in_module(folder, weights):
    module = network()
    module.load_state_dict(weights)
    return module


def in_mapping(folder, weights):
    return weights


SOURCES = [in_safetensors, in_torch_file, in_folder, in_module, in_mapping]


@pytest.mark.parametrize("given_as", SOURCES)
def test_a_source_of_any_kind_counts_as_its_tensors(given_as, tmp_path):
    one, other = weights_of(0), weights_of(1)
    merged = merge([given_as(tmp_path, one), other], **AVERAGE)
    assert_same(merged.weights, {key: (one[key] + other[key]) / 2 for key in one}, **EQUAL)


def test_sources_of_all_kinds_mix(tmp_path, zoo):
    kinds = [make(tmp_path, weights_of(10 + i)) for i, make in enumerate(SOURCES)]
    merged = merge([*kinds, zoo.address("test", 2, 1)], method="average")  # the zoo gives two
    plain = [weights_of(seed) for seed in (10, 11, 12, 13, 14, 2, 3)]
    expected = merge(plain, method="average", model=network())
    assert_same(merged.weights, expected.weights)
    assert len(merged.report["members"]) == 7


def test_sources_may_come_from_a_generator():
    merged = merge((weights_of(seed) for seed in range(2)), **AVERAGE)
    assert_same(merged.weights, merge([weights_of(0), weights_of(1)], **AVERAGE).weights)


def test_a_zoo_address_alone_stands_for_all_members_of_its_family(zoo):
    merged = merge(zoo.address("test", 2, 1), **AVERAGE)
    assert merged.report["members"] == [f"{zoo.folder}#test-k2/1/{m}" for m in range(2)]
    assert_same(merged.weights, merge([weights_of(2), weights_of(3)], **AVERAGE).weights)


def test_members_of_a_zoo_need_no_model(zoo):
    merged = merge(zoo.address("test", 2, 0), method="average")
    expected = merge([weights_of(0), weights_of(1)], method="average", model=network())
    assert merged.report["align"] == "weight_matching"
    assert_same(merged.weights, expected.weights)


def test_a_member_that_is_a_module_stands_in_for_the_model():
    merged = merge([weights_of(0), network(1)], method="average")
    expected = merge([weights_of(0), weights_of(1)], method="average", model=network())
    assert_same(merged.weights, expected.weights)


def test_names_that_a_wrapper_prefixed_are_those_of_the_model():
    wrapped = [{f"module.{k}": t for k, t in weights_of(seed).items()} for seed in range(2)]
    merged = merge(wrapped, method="average", model=network())
    expected = merge([weights_of(0), weights_of(1)], method="average", model=network())
    assert_same(merged.weights, expected.weights)


def test_one_wrapped_member_among_plain_ones_is_unwrapped():
    wrapped = {f"_orig_mod.{key}": t for key, t in weights_of(1).items()}
    merged = merge([weights_of(0), wrapped], **AVERAGE)
    assert_same(merged.weights, merge([weights_of(0), weights_of(1)], **AVERAGE).weights)


def test_one_checkpoint_is_returned_as_it_is():
    own = weights_of()
    merged = merge(own)  # the default method would need a model and a merger
    assert_same(merged.weights, own)
    assert memory(merged.weights).isdisjoint(memory(own))
    assert "returned as it is" in merged.report["note"]


# ------------------------------------------------------------------------------- what comes out


@pytest.mark.parametrize("align", [None, "weight_matching"])
@pytest.mark.parametrize("correct", [None, "repair", "refit"])
def test_the_result_shares_no_memory_and_inputs_stay_as_they_were(align, correct):
    plain, module = normed(0).state_dict(), normed(1)
    given_ = {"state dict": plain, "module": module.state_dict()}
    before = {name: {k: t.clone() for k, t in own.items()} for name, own in given_.items()}
    batches = inputs()
    calibration = batches.clone()
    merged = merge(
        [plain, module],
        method="average",
        align=align,
        correct=correct,
        model=normed(2),
        batches=batches,
    )
    assert memory(merged.weights).isdisjoint(memory(plain) | memory(module.state_dict()))
    assert len(memory(merged.weights)) == len(merged.weights)
    for tensor in merged.weights.values():
        tensor.zero_()
    for name, own in given_.items():
        assert_same(own, before[name])
    assert torch.equal(batches, calibration)
    assert all(part.training for part in module.modules())
    assert all(p.requires_grad and p.grad is None for p in module.parameters())


def test_files_stay_as_they_were(tmp_path):
    paths = [in_safetensors(tmp_path, weights_of(0)), in_torch_file(tmp_path, weights_of(1))]
    before = tree(tmp_path)
    merge(paths, method="average", model=network())
    assert tree(tmp_path) == before


def test_results_need_no_gradient():
    assert not any(
        t.requires_grad for t in merge([network(0), network(1)], method="average").weights.values()
    )


def test_the_report_says_what_was_done(zoo):
    batches = inputs(), torch.arange(40) % 3
    report = merge(
        [zoo.address("test", 2, 0), network(4)],
        method="average",
        correct="refit",
        batches=batches,
        seed=7,
    ).report
    names = [f"{zoo.folder}#test-k2/0/0", f"{zoo.folder}#test-k2/0/1", "Sequential"]
    assert report["members"] == names
    assert report["verified"] == [True, True, False]
    assert [report[key] for key in ("method", "align", "correct", "seed")] == [
        "average",
        "weight_matching",
        "refit",
        7,
    ]
    assert 0 < report["matching_cost"] < report["matching_cost_before"]
    assert report["variance_ratio"].keys() == {"1.weight", "3.weight"}
    assert report["parameters"] == 6 * 8 + 8 + 8 * 3 + 3
    assert report["seconds"] >= 0
    assert json.loads(json.dumps(report)) == report


def test_a_report_without_alignment_tells_no_cost():
    report = merge([weights_of(0), weights_of(1)], **AVERAGE).report
    assert report["align"] is None
    assert report.keys().isdisjoint({"matching_cost", "matching_cost_before", "variance_ratio"})


def test_equal_members_keep_their_variance():
    report = merge([network(0), network(0)], method="average", batches=inputs()).report
    assert report["matching_cost"] == 0
    assert report["variance_ratio"] == pytest.approx({"1.weight": 1, "3.weight": 1}, rel=1e-5)


def test_a_single_calibration_input_leaves_a_report_that_can_be_saved(tmp_path):
    merged = merge([network(0), network(1)], method="average", batches=inputs(1))
    assert "variance_ratio" not in merged.report
    merged.save(tmp_path / "merged")


def test_to_module_gives_a_copy_that_computes_with_the_fused_weights():
    nets = [network(0), network(1)]
    merged = merge(nets, **AVERAGE)
    before = weights_of(0)
    module = merged.to_module(nets[0])
    assert_same(module.state_dict(), merged.weights)
    assert_same(nets[0].state_dict(), before)
    assert memory(module.state_dict()).isdisjoint(memory(nets[0].state_dict()))
    hidden = inputs() @ merged.weights["1.weight"].T + merged.weights["1.bias"]
    expected = hidden.relu() @ merged.weights["3.weight"].T + merged.weights["3.bias"]
    torch.testing.assert_close(module(inputs()), expected, **REORDERED)


def test_to_module_refuses_a_module_of_another_shape():
    merged = merge([network(0), network(1)], **AVERAGE)
    with refused(IncompatibleWeights, "Sequential", "1.weight", "[8, 6]", "[7, 6]"):
        merged.to_module(network(widths=(6, 7, 3)))


def test_a_saved_result_is_a_checkpoint_that_needs_no_model(tmp_path, zoo):
    first = merge(zoo.address("test", 2, 0), method="average")
    folder = first.save(tmp_path / "merged")
    again = merge([folder, weights_of(2)], method="average")
    assert again.report["verified"] == [True, False]
    expected = merge([first.weights, weights_of(2)], method="average", model=network())
    assert_same(again.weights, expected.weights)
    with refused(ConfigError, "not empty", "overwrite"):
        first.save(folder)
    again.save(folder, overwrite=True)
    assert_same(merge(folder).weights, again.weights)


@pytest.mark.parametrize("address", ["/0", "/0/1"], ids=["not aligned", "one member"])
def test_a_result_that_needed_no_program_hands_it_on(address, tmp_path, zoo):
    folder = merge(f"{zoo.folder}#test-k2{address}", **AVERAGE).save(tmp_path / "merged")
    assert merge([folder, weights_of(2)], method="average").report["align"] == "weight_matching"


@pytest.mark.parametrize("align", [None, "weight_matching"])
@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (("float16", "float16"), "float16"),
        (("bfloat16", "bfloat16"), "bfloat16"),
        (("float64", "float64"), "float64"),
        (("float16", "bfloat16"), "float32"),
        (("bfloat16", "float32"), "float32"),
        (("float16", "float64"), "float64"),
    ],
)
def test_members_dtypes_are_kept_or_promoted(dtypes, expected, align):
    kinds = [getattr(torch, dtype) for dtype in dtypes]
    members = [
        {key: t.to(kind) for key, t in weights_of(seed).items()} for seed, kind in enumerate(kinds)
    ]
    merged = merge(members, method="average", align=align, model=network())
    assert {t.dtype for t in merged.weights.values()} == {getattr(torch, expected)}


def test_averages_are_computed_wider_than_the_members_are():
    members = [{"w": torch.tensor([60000.0, 1.0], dtype=torch.float16)} for _ in range(3)]
    assert_same(merge(members, **AVERAGE).weights, members[0])


def test_float64_members_lose_no_digit():
    one = {"w": torch.tensor([1.0, 1 + 2**-50], dtype=torch.float64)}
    assert_same(merge([one, one], **AVERAGE).weights, one)


@pytest.mark.parametrize("align", [None, "weight_matching"])
def test_of_integer_buffers_the_largest_is_taken(align):
    members = [normed(seed).state_dict() for seed in range(3)]
    for member, count in zip(members, (5, 8, 6), strict=True):
        member["1.num_batches_tracked"] = torch.tensor(count)
    merged = merge(members, method="average", align=align, model=normed())
    assert merged.weights["1.num_batches_tracked"].dtype == torch.int64
    assert merged.weights["1.num_batches_tracked"] == 8
    merged.to_module(normed())


# ------------------------------------------------------------------------------- ties


def test_tied_weights_stay_tied():
    merged = merge([Tied(0), Tied(1)], method="average")
    assert torch.equal(merged.weights["head.weight"], merged.weights["alias.weight"])
    module = merged.to_module(Tied(2))
    assert module.alias.weight is module.head.weight
    assert torch.equal(module.head.weight, merged.weights["head.weight"])


def test_ties_hold_whatever_a_method_does(register):
    @register()
    def by_name(weights):
        """Give every tensor a value that depends on its name."""
        return {key: torch.full_like(t, float(len(key))) for key, t in weights[0].items()}

    merged = merge([Tied(0), Tied(1)], method="by_name").weights
    assert torch.equal(merged["head.weight"], merged["alias.weight"])
    assert merged["hidden.weight"].unique().tolist() == [len("hidden.weight")]


@pytest.mark.parametrize("kept", ["head", "alias"])
def test_tied_weights_may_be_stored_once(kept):
    dropped = "alias" if kept == "head" else "head"
    once = [
        {key: t for key, t in Tied(seed).state_dict().items() if not key.startswith(dropped)}
        for seed in range(2)
    ]
    merged = merge(once, method="average", model=Tied(2))
    expected = merge([Tied(0), Tied(1)], method="average")
    assert merged.weights.keys() == expected.weights.keys()
    assert_same({key: merged.weights[key] for key in expected.weights}, expected.weights)


def test_weights_that_the_model_ties_and_the_checkpoint_does_not_are_refused():
    loose = {key: t.clone() for key, t in Tied(0).state_dict().items()}
    loose["alias.weight"][0, 0] += 1
    with refused(StructureError, "checkpoints[1]", "'alias.weight'", "'head.weight'", "differ"):
        merge([Tied(1).state_dict(), loose], method="average", model=Tied(2))


# ------------------------------------------------------------------------------- a user's spec


def test_a_users_spec_that_holds_does_what_discovery_does():
    nets = [network(0), network(1)]
    spec = discover(nets[0], torch.zeros(2, 6))
    again = PermutationSpec.from_json(spec.to_json())
    merged = merge(nets, method="average", spec=again)
    assert_same(merged.weights, merge(nets, method="average").weights)


def test_a_users_spec_decides_what_may_move():
    fixed = PermutationSpec(
        {},
        {key: tuple((Factor(None, n),) for n in t.shape) for key, t in weights_of().items()},
        {},
    )
    merged = merge([network(0), network(1)], method="average", spec=fixed)
    assert_same(merged.weights, merge([network(0), network(1)], **AVERAGE).weights)


def with_axes(changes):
    spec = discover(network(), torch.zeros(2, 6))
    axes = {key: own for key, own in {**spec.axes, **changes}.items() if own is not None}
    return PermutationSpec({**spec.groups, "extra": 3}, axes, {})


def free(group, size):
    return (Factor(group, size),)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"3.bias": (free("extra", 3),)}, ("permuting extra changes the output", "3.bias")),
        ({"1.bias": (free(None, 8),)}, ("permuting 1 changes the output", "1.weight")),
        ({"3.bias": None}, ("says nothing of ['3.bias']",)),
    ],
    ids=["moves outputs", "leaves the bias behind", "misses a tensor"],
)
def test_a_users_spec_that_does_not_hold_is_refused(changes, told):
    with refused(StructureError, *told):
        merge([network(0), network(1)], method="average", spec=with_axes(changes))


def test_a_spec_of_another_width_is_refused():
    spec = discover(network(widths=(6, 9, 3)), torch.zeros(2, 6))
    with refused(IncompatibleWeights, "'1.weight'", "(8, 6)", "(9, 6)"):
        merge([network(0), network(1)], method="average", spec=spec)


# ------------------------------------------------------------------------------- corrections


@pytest.mark.parametrize("correct", ["repair", "refit"])
def test_a_correction_brings_the_variance_back(correct):
    nets = [network(seed) for seed in range(4)]
    batches = inputs(400)
    plain = merge(nets, method="average", batches=batches).report["variance_ratio"]["1.weight"]
    done = merge(nets, method="average", correct=correct, batches=batches).report
    assert plain < 0.8
    # what is restored is the mean standard deviation, at most the root of the mean variance
    assert 0.8 < done["variance_ratio"]["1.weight"] <= 1.001


@pytest.mark.parametrize("align", [None, "weight_matching"])
@pytest.mark.parametrize("correct", [repair, refit])
def test_members_are_corrected_towards_as_they_were_averaged(correct, align):
    nets = [network(seed) for seed in range(3)]
    program = trace(nets[0], inputs(2))
    layout = Layout(program, discover_program(program))
    members = {key: t[None] for key, t in stack([net.state_dict() for net in nets]).items()}
    if align:
        members = layout.spec.permute(members, weight_matching(members, layout.spec))
    mean = {key: t.mean(1) for key, t in members.items()}
    expected = {key: t[0] for key, t in correct(mean, members, layout, inputs()).items()}
    options = {"align": align, "correct": correct.__name__, "batches": inputs()}
    assert_same(merge(nets, method="average", **options).weights, expected, **REORDERED)


@pytest.mark.parametrize("correct", ["repair", "refit"])
def test_a_correction_without_inputs_is_refused(correct):
    with refused(ConfigError, f"correct={correct!r}", "batches=", "[b, ...]"):
        merge([network(0), network(1)], method="average", correct=correct)


LABELS = torch.arange(40) % 3
BATCHES = {
    "tensor": inputs,
    "pair": lambda: (inputs(), LABELS),
    "list": lambda: list(inputs().split(15)),
    "generator": lambda: (batch for batch in inputs().split(15)),
    "loader of inputs": lambda: DataLoader(inputs(), batch_size=15),
    "loader of pairs": lambda: DataLoader(TensorDataset(inputs(), LABELS), batch_size=15),
}


@pytest.mark.parametrize("form", BATCHES)
def test_calibration_data_come_in_any_form(form):
    nets = [network(0), network(1)]
    merged = merge(nets, method="average", correct="repair", batches=BATCHES[form]())
    expected = merge(nets, method="average", correct="repair", batches=inputs())
    assert_same(merged.weights, expected.weights)


def test_calibration_data_of_another_shape_are_refused(zoo):
    with refused(ConfigError, "batches", "(5, 7)", "(b, 6)"):
        merge(zoo.address("test", 2, 0), method="average", batches=torch.zeros(5, 7))


# ------------------------------------------------------------------------------- randomness


@pytest.fixture
def seeded(register):
    @register(align=None)
    def one_of_them(weights, *, generator):
        """Take one member."""
        chosen = int(torch.randint(len(weights), (), generator=generator))
        return {key: t.clone() for key, t in weights[chosen].items()}


@pytest.mark.usefixtures("seeded")
def test_the_same_seed_gives_the_same_result_and_touches_no_global_state():
    members = [weights_of(seed) for seed in range(20)]
    state = torch.get_rng_state()
    runs = [merge(members, method="one_of_them", seed=seed).weights for seed in (3, 3, 4, 5)]
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(runs[0], runs[1])
    assert any(not torch.equal(runs[0]["1.weight"], run["1.weight"]) for run in runs[2:])


# ------------------------------------------------------------------------------- learned mergers


def test_the_default_method_takes_a_merger_or_its_folder(zoo, merger, learned):
    merged = merge(zoo.address("test", 2, 0), merger=merger)
    assert merged.report["method"] == "gnn"
    assert_same(merged.weights, merge(zoo.address("test", 2, 0), merger=learned).weights)
    plain = merge(zoo.address("test", 2, 0), method="average").weights
    assert not torch.allclose(merged.weights["3.weight"], plain["3.weight"])


def test_images_are_traced_in_the_shape_of_the_mergers_probes():
    config = GNNConfig(shapes=((1, 2, 3),), probes=16, width=8, prior=0)
    nets = [network(0), network(1)]  # Flatten, then 6 inputs
    merged = merge(nets, merger=GNNMerger(config))
    assert merged.program.input_shape()[1:] == (1, 2, 3)


def test_a_convolution_needs_no_batches_beside_a_merger():
    def convolution():
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
        )

    config = GNNConfig(shapes=((1, 5, 5),), probes=16, width=8)
    nets = [convolution(), convolution()]
    merge(nets, merger=GNNMerger(config)).to_module(nets[0])
    with refused(ConfigError, "batches", "shape"):
        merge(nets, method="average")


# ------------------------------------------------------------------------------- what is refused


@pytest.fixture
def plain():
    """Two members that fit, and a check that they stay as they are."""
    members = [weights_of(0), weights_of(1)]
    before = [{key: t.clone() for key, t in member.items()} for member in members]
    yield members
    for member, own in zip(members, before, strict=True):
        assert_same(member, own)


def test_no_checkpoint_is_refused():
    with refused(ConfigError, "checkpoints", "none", "at least one"):
        merge([])


@pytest.mark.parametrize("thing", [5, None, 0.5])
def test_what_holds_no_checkpoints_is_refused(thing):
    with refused(ConfigError, f"got {thing!r}", "at least one"):
        merge(thing)


def test_a_member_that_is_no_checkpoint_is_refused(plain):
    with refused(ConfigError, "int", "path"):
        merge([*plain, 5], **AVERAGE)


def test_other_names_are_refused(plain):
    other = weights_of(2)
    other["4.weight"] = other.pop("3.weight")
    with refused(
        IncompatibleWeights, "checkpoints[2]", "misses '3.weight'", "adds '4.weight'", "rename"
    ):
        merge([*plain, other], **AVERAGE)


def test_other_shapes_are_refused(plain, tmp_path):
    path = in_safetensors(tmp_path, weights_of(2, widths=(6, 9, 3)))
    told = (str(path), "'1.bias'", "(9,)", "(8,)", "of one width")
    with refused(IncompatibleWeights, "checkpoints[2]", *told):
        merge([*plain, path], **AVERAGE)


@pytest.mark.parametrize(("value", "kind"), [("nan", "1 NaN"), ("-inf", "1 infinite")])
def test_values_that_are_not_finite_are_refused(plain, tmp_path, value, kind):
    broken = weights_of(2)
    broken["3.bias"][1] = float(value)
    path = in_safetensors(tmp_path, broken)
    told = (str(path), "'3.bias'", "1 values of 3", kind, "Leave this checkpoint out")
    with refused(NonFinite, "checkpoints[2]", *told):
        merge([*plain, path], **AVERAGE)


def test_one_checkpoint_alone_is_looked_at_too():
    broken = weights_of()
    broken["1.weight"][0, 0] = float("nan")
    with refused(NonFinite, "'1.weight'"):
        merge(broken)


class Planted:
    def __reduce__(self):
        return os.system, ("touch planted",)


@pytest.mark.parametrize("name", ["evil.pt", "evil.safetensors"])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(plain, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(pickle.dumps({"1.weight": Planted()}))
    with refused(Unsafe, str(path), "safetensors"):
        merge([*plain, path], **AVERAGE)
    torch.save({"1.weight": Planted()}, path)
    with refused(Unsafe, str(path), "safetensors"):
        merge([*plain, path], **AVERAGE)
    assert not Path("planted").exists()


def test_a_file_that_ends_early_is_refused(plain, tmp_path):
    path = in_safetensors(tmp_path, weights_of(2))
    path.write_bytes(path.read_bytes()[:-20])
    with refused(Truncated, str(path)):
        merge([*plain, path], **AVERAGE)


def test_a_path_that_does_not_exist_is_refused(plain):
    with refused(Unreadable, "nowhere/a.safetensors", "Check the path"):
        merge([*plain, "nowhere/a.safetensors"], **AVERAGE)


def test_an_empty_folder_is_refused(plain, tmp_path):
    (tmp_path / "empty").mkdir()
    with refused(Unreadable, str(tmp_path / "empty")):
        merge([*plain, tmp_path / "empty"], **AVERAGE)


def test_a_family_that_the_zoo_does_not_have_is_refused(zoo):
    with refused(ConfigError, "family 2 does not exist", "0 to 1"):
        merge(zoo.address("test", 2, 2), **AVERAGE)


def test_an_unknown_method_is_refused_with_a_suggestion(plain):
    with refused(ConfigError, "'avergae'", "Did you mean 'average'?", "weighted_average"):
        merge(plain, method="avergae")


def test_an_unknown_option_is_refused_with_a_suggestion(plain):
    with refused(ConfigError, "'coeficients'", "Did you mean 'coefficients'?"):
        merge(plain, method="weighted_average", coeficients=[1, 2])
    with refused(ConfigError, "'correction'", "no options"):
        merge(plain, method="average", correction="repair")


def test_a_missing_option_is_named(plain):
    with refused(ConfigError, "weighted_average needs the option 'coefficients'"):
        merge(plain, method="weighted_average")


@pytest.mark.parametrize(
    ("argument", "value", "told"),
    [
        ("align", "git_rebasin", ("'git_rebasin'", "None", "'weight_matching'")),
        ("align", 5, ("5", "'weight_matching'")),
        ("align", ["weight_matching", "x"], ("'x'", "None", "'weight_matching'")),
        ("correct", "retrain", ("'retrain'", "'refit'", "'repair'")),
        ("device", "gpu", ("'gpu'", "'cuda'", "'cpu'")),
        ("model", nn.Linear, ("expected Module",)),
        ("spec", "spec.json", ("'spec.json'", "expected PermutationSpec")),
        ("seed", "one", ("'one'", "expected int")),
    ],
)
def test_a_value_of_an_argument_that_makes_no_sense_is_refused(plain, argument, value, told):
    with refused(ConfigError, f"{argument}: got", *told):
        merge(plain, **{"method": "average", argument: value})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(plain):
    with refused(ConfigError, "'cuda'", "no GPU", "'cpu'"):
        merge(plain, **AVERAGE, device="cuda")


def test_alignment_without_a_model_is_refused(plain, tmp_path):
    path = in_safetensors(tmp_path, plain[0])
    with refused(ConfigError, "model=", "align=None"):
        merge([path, plain[1]], method="average")


def test_weights_of_another_network_than_the_model_are_refused(plain):
    for model, told in (
        (network(widths=(6, 8, 3, 2)), ("'5.weight' is missing",)),
        (network(widths=(6, 9, 3)), ("'1.weight'", "(8, 6)", "(9, 6)")),
        (network(widths=(6, 8)), ("no tensor '3.bias'", "['1.bias', '1.weight']")),
    ):
        with refused(StructureError, "checkpoints[0] (state dict)", *told):
            merge(plain, method="average", model=model)


def test_a_base_of_another_network_is_refused(plain):
    with refused(IncompatibleWeights, "base, state dict", "'1.weight'", "(9, 6)"):
        merge(plain, **AVERAGE, base=weights_of(widths=(6, 9, 3)))


def test_a_merger_folder_that_is_not_there_is_refused(zoo):
    told = ("'runs/nothing'", "accelerate launch trainers/merger.py", "average")
    with refused(ConfigError, *told):
        merge(zoo.address("test", 2, 0), merger="runs/nothing")


def test_the_learned_method_without_a_merger_takes_the_one_of_the_package(zoo):
    family = zoo.address("test", 2, 0)
    assert_same(merge(family).weights, merge(family, merger=bundled_merger()).weights)


def test_a_checkpoint_is_no_merger(zoo, tmp_path):
    folder = in_folder(tmp_path, weights_of())
    with refused(Unreadable, str(folder), "no merger", "trainers/merger.py"):
        merge(zoo.address("test", 2, 0), merger=folder)


def test_a_merger_without_probes_of_the_inputs_shape_imagines_some(zoo):
    other = GNNMerger(GNNConfig(shapes=((1, 4, 4),), probes=8, width=8))
    merged = merge(zoo.address("test", 2, 0), merger=other)
    assert all(tensor.isfinite().all() for tensor in merged.weights.values())


def test_networks_that_can_read_several_of_a_mergers_shapes_need_to_be_told():
    config = GNNConfig(shapes=((1, 5, 5), (1, 9, 9)), probes=16, width=8)
    nets = [
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        for _ in range(2)
    ]
    with refused(ConfigError, "example_inputs", "batches"):
        merge(nets, merger=GNNMerger(config))
    merge(nets, merger=GNNMerger(config), example_inputs=torch.zeros(2, 1, 9, 9))


# ------------------------------------------------------------------------------- properties


@lru_cache
def program_of(widths):
    return trace(network(widths=widths), torch.zeros(2, widths[0]))


@lru_cache
def discovered(widths):
    return discover_program(program_of(widths))


def random_members(widths, count, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = {key: t.shape for key, t in weights_of(widths=widths).items()}
    return [
        {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        for _ in range(count)
    ]


def average(widths, members):
    program = program_of(widths).to_json()
    return merge([Checkpoint("random", own, program) for own in members], method="average")


def outputs(widths, members):
    probes = torch.randn(9, widths[0], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return average(widths, members).to_module(network(widths=widths))(probes)


networks = st.sampled_from(
    [(1, 1, 1), (6, 1, 3), (3, 6, 2), (2, 4, 1), (5, 1, 6, 4), (4, 3, 2, 2), (1, 6, 5, 1)]
)
seeds = st.integers(0, 2**31)
some = settings(max_examples=30, deadline=None)


@some
@given(networks, st.integers(2, 5), seeds)
def test_copies_of_one_network_merge_into_it(widths, count, seed):
    (member,) = random_members(widths, 1, seed)
    assert_same(average(widths, [member] * count).weights, member, **EQUAL)


@some
@given(networks, st.integers(2, 5), seeds, st.randoms(use_true_random=False))
def test_the_order_of_members_does_not_change_the_merged_function(widths, count, seed, random):
    members = random_members(widths, count, seed)
    shuffled = random.sample(members, count)
    torch.testing.assert_close(outputs(widths, shuffled), outputs(widths, members), **REORDERED)


@some
@given(networks, st.integers(2, 5), seeds)
def test_the_order_of_hidden_units_does_not_change_the_merged_function(widths, count, seed):
    members = random_members(widths, count, seed)
    spec, generator = discovered(widths), torch.Generator().manual_seed(seed)
    moved = [spec.permute(member, spec.random(generator)) for member in members]
    torch.testing.assert_close(outputs(widths, moved), outputs(widths, members), **REORDERED)
