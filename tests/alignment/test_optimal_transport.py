"""Optimal transport: members of any widths come to the units of one of them."""

from importlib import import_module

import numpy as np
import ot
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from metamerge import merge
from metamerge.alignment import align_members, optimal_transport
from metamerge.errors import ConfigError, IncompatibleWeights, StructureError
from metamerge.structure import Layout, discover_program, run, trace
from zoo import architectures
from zoo.tasks import load_task
from zoo.training import init_networks, train_networks

MODULE = import_module("metamerge.alignment.optimal_transport")


def mlp(width=6, other=5, inputs=4, classes=3):
    return nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, other), nn.Tanh(),
        nn.Linear(other, classes),
    )  # fmt: skip


def cnn(width=4, other=3):
    return nn.Sequential(
        nn.Conv2d(2, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(4 * width, other), nn.ReLU(), nn.Linear(other, 3),
    )  # fmt: skip


class Residual(nn.Module):
    def __init__(self, stream=4, inner=3):
        super().__init__()
        self.enter, self.leave = nn.Conv2d(2, stream, 3, padding=1), nn.Linear(stream, 3)
        self.inner = nn.Conv2d(stream, inner, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(inner)
        self.outer = nn.Conv2d(inner, stream, 3, padding=1)

    def forward(self, x):
        x = torch.relu(self.enter(x))
        x = torch.relu(x + self.outer(torch.relu(self.norm(self.inner(x)))))
        return self.leave(x.mean((2, 3)))


MODELS = {"mlp": (mlp, (4,)), "cnn": (cnn, (2, 4, 4)), "residual": (Residual, (2, 4, 4))}


def layout_of(model, *inputs):
    program = trace(model.eval(), inputs)
    return Layout(program, discover_program(program))


def draw(model, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for key, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if key.endswith("running_var"):
            noise = noise.abs() + 0.5
        drawn[key] = noise.to(dtype) if tensor.is_floating_point() else tensor.clone()
    return drawn


def widened(weights, layout, times):
    """The same function with every unit split into copies that share its outgoing weights."""
    reads = {(layer.weight, 1) for layer in layout.layers}
    wide = {}
    for key, tensor in weights.items():
        for axis, factors in enumerate(layout.spec.axes.get(key, ())):
            group = next((f.group for f in factors if f.group), None)
            if group is None:
                continue
            units = tensor.unflatten(axis, (layout.spec.groups[group], -1))
            copied = units.repeat_interleave(times, axis).flatten(axis, axis + 1)
            tensor = copied / times if (key, axis) in reads else copied
        wide[key] = tensor
    return wide


class Setting:
    def __init__(self, name):
        self.build, self.shape = MODELS[name]
        self.layout = layout_of(self.build(), torch.zeros(2, *self.shape))
        self.spec = self.layout.spec

    def inputs(self):
        return torch.randn(50, *self.shape, generator=torch.Generator().manual_seed(0))

    def move(self, members, **options):
        return optimal_transport(members, self.spec, layout=self.layout, **options)

    def run(self, weights):
        return run(self.layout.program, weights, [self.inputs()])


@pytest.fixture(scope="module", params=MODELS)
def setting(request):
    return Setting(request.param)


@pytest.fixture(scope="module")
def plain():
    return Setting("mlp")


@pytest.fixture(scope="module")
def pair():
    """One hidden layer without biases: two inputs, two units, one output."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    layout = layout_of(model, torch.zeros(2, 2))

    def move(*members, **options):
        made = [
            {"0.weight": torch.tensor(rows), "2.weight": torch.tensor([reads])}
            for rows, reads in members
        ]
        return optimal_transport(made, layout.spec, layout=layout, **options)

    return move


def test_four_units_onto_two_by_hand(pair):
    # Units 0 and 3 lie around (1, 0), units 1 and 2 around (0, 2): each pair becomes its mean, and
    # their outgoing weights, 1 + 4 and 2 + 3, are summed up.
    small = [[1.0, 0.0], [0.0, 2.0]], [1.0, 1.0]
    large = [[1.5, 0.0], [0.0, 1.0], [0.0, 3.0], [0.5, 0.0]], [1.0, 2.0, 3.0, 4.0]
    kept, moved = pair(small, large)
    assert kept["0.weight"].tolist() == small[0]
    assert torch.allclose(moved["0.weight"], torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    assert torch.allclose(moved["2.weight"], torch.tensor([[5.0, 5.0]]))


def test_equal_widths_are_permuted_by_hand(pair):
    one = [[1.0, 0.0], [0.0, 2.0]], [3.0, 4.0]
    other = [[0.0, 2.5], [1.5, 0.0]], [5.0, 6.0]
    _, moved = pair(one, other, reference=0)
    assert moved["0.weight"].tolist() == [[1.5, 0.0], [0.0, 2.5]]
    assert moved["2.weight"].tolist() == [[6.0, 5.0]]


@pytest.mark.parametrize("passes", [1, 2])
def test_the_plans_are_those_of_a_slow_version_in_loops(monkeypatch, passes):
    monkeypatch.setattr(MODULE, "_PASSES", passes)
    layout = layout_of(mlp(3, 4), torch.zeros(2, 4))
    target, member = draw(mlp(3, 4), 0, torch.float64), draw(mlp(5, 7), 1, torch.float64)
    report = {}
    _, moved = optimal_transport(
        [target, member], layout.spec, layout=layout, reference=0, report=report
    )
    a, b = ({k: t.numpy() for k, t in w.items()} for w in (target, member))

    def solve(cost):
        n, m = cost.shape
        return ot.emd(np.full(n, 1 / n), np.full(m, 1 / m), cost)

    def cost(rows, others):
        return np.array([[((r - o) ** 2).sum() for o in others] for r in rows])

    ways = {}
    for _ in range(passes):
        share = {g: t / t.sum(1, keepdims=True) for g, t in ways.items()}  # of every unit
        mean = {g: t / t.sum(0, keepdims=True) for g, t in ways.items()}  # in every place
        first = cost(np.c_[b["0.weight"], b["0.bias"]], np.c_[a["0.weight"], a["0.bias"]])
        if ways:
            reads = (mean["2"].T @ b["2.weight"]) * 5 / 3
            first = first + cost(reads.T, a["2.weight"].T)
        ways["0"] = solve(first)
        share["0"] = ways["0"] / ways["0"].sum(1, keepdims=True)
        rows = b["2.weight"] @ share["0"]
        second = cost(np.c_[rows, b["2.bias"]], np.c_[a["2.weight"], a["2.bias"]])
        if "2" in mean:
            second = second + cost(b["4.weight"].T * 7 / 4, a["4.weight"].T)
        ways["2"] = solve(second)
    mean = {g: t / t.sum(0, keepdims=True) for g, t in ways.items()}
    share = {g: t / t.sum(1, keepdims=True) for g, t in ways.items()}
    expected = {
        "0.weight": mean["0"].T @ b["0.weight"],
        "0.bias": mean["0"].T @ b["0.bias"],
        "2.weight": mean["2"].T @ b["2.weight"] @ share["0"],
        "2.bias": mean["2"].T @ b["2.bias"],
        "4.weight": b["4.weight"] @ share["2"],
        "4.bias": b["4.bias"],
    }
    for key, value in expected.items():
        assert np.allclose(moved[key].numpy(), value, rtol=1e-10, atol=1e-12), key
    assert len(report["objective"]) == passes


def test_units_that_were_split_are_joined_and_the_function_stays(setting):
    small = draw(setting.build())
    large = widened(small, setting.layout, 3)
    _, moved = setting.move([small, large])
    for key in setting.spec.axes:
        assert torch.allclose(moved[key], small[key], rtol=1e-5, atol=1e-6), key


def test_units_are_split_where_the_reference_has_more_and_the_function_stays(setting):
    small, large = draw(setting.build()), widened(draw(setting.build(), 1), setting.layout, 2)
    sizes = {group: 2 * n for group, n in setting.spec.groups.items()}
    wide = layout_of(setting.build(*sizes.values()), torch.zeros(2, *setting.shape))
    moved, _ = optimal_transport([small, large], wide.spec, layout=wide)
    found = run(wide.program, moved, [setting.inputs()])
    assert torch.allclose(found, setting.run(small), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cost", ["weights", "activations"])
def test_permuted_copies_come_back_exactly(setting, cost):
    origin = draw(setting.build())
    generator = torch.Generator().manual_seed(1)
    members = [setting.spec.permute(origin, setting.spec.random(generator)) for _ in range(3)]
    moved = setting.move(members, cost=cost, batches=setting.inputs())
    if cost == "weights":
        for key in origin:
            assert all(torch.equal(own[key], moved[0][key]) for own in moved), key
    expected = setting.run(origin)  # units that are dead on the inputs are as good as each other
    average = {k: sum(own[k] for own in moved) / 3 for k in origin}
    assert torch.allclose(setting.run(average), expected, rtol=1e-4, atol=1e-4)


def test_with_equal_widths_every_member_is_permuted_and_stays_the_same_function(setting):
    members = [draw(setting.build(), seed) for seed in range(4)]
    for own, moved in zip(members, setting.move(members), strict=True):
        for key in setting.spec.axes:
            assert own[key].shape == moved[key].shape
            assert torch.equal(own[key].flatten().sort().values, moved[key].flatten().sort().values)
        assert torch.allclose(setting.run(own), setting.run(moved), rtol=1e-4, atol=1e-4)


def test_a_soft_transport_mixes_units_and_a_hardly_regularised_one_does_not(plain):
    members = [draw(mlp(), 0), draw(mlp(), 1)]
    hard, sharp, soft = (
        plain.move(members, reference=0, **options)[1]
        for options in ({}, {"hard": False, "regularisation": 1e-3}, {"hard": False})
    )
    assert torch.allclose(hard["0.weight"], sharp["0.weight"], atol=1e-2)
    assert not torch.allclose(hard["0.weight"], soft["0.weight"], atol=1e-1)
    # a mixture of units, and nothing more: what all units have in common is kept
    ones = {**members[1], "0.bias": torch.ones(6)}
    found = plain.move([members[0], ones], reference=0, hard=False)[1]
    assert torch.allclose(found["0.bias"], torch.ones(6), atol=1e-5)


def test_the_order_of_members_does_not_change_the_average(setting):
    members = [draw(setting.build(), seed) for seed in range(4)]
    large = widened(draw(setting.build(), 9), setting.layout, 2)

    def average(weights):
        moved = setting.move(weights)
        mean = {key: sum(own[key].double() for own in moved) / len(moved) for key in moved[0]}
        return setting.run({key: t.float() for key, t in mean.items()})

    expected = average([*members, large])
    other = average([large, *(members[i] for i in (2, 0, 3, 1))])
    assert torch.allclose(other, expected, rtol=1e-4, atol=1e-4)


def test_the_reference_stays_as_it_is_and_is_reported(plain):
    members = [draw(mlp(), seed) for seed in range(3)]
    for chosen in (0, 2):
        report = {}
        moved = plain.move(members, reference=chosen, report=report)
        assert report["reference"] == chosen
        assert all(torch.equal(moved[chosen][key], t) for key, t in members[chosen].items())
        assert report["widths"] == [{"0": 6, "2": 5}] * 3
        assert all(0 < share < 1 for share in report["objective"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_are_kept_and_no_memory_is_shared(dtype):
    setting = Setting("cnn")
    members = [draw(cnn(), 0, dtype), draw(cnn(6, 4), 1, dtype)]
    before = [{k: t.clone() for k, t in own.items()} for own in members]
    moved = setting.move(members)
    for own, untouched, new in zip(members, before, moved, strict=True):
        assert all(torch.equal(own[key], untouched[key]) for key in own)
        assert {k: t.dtype for k, t in new.items()} == {k: t.dtype for k, t in own.items()}
        assert {t.data_ptr() for t in own.values()}.isdisjoint(t.data_ptr() for t in new.values())
    assert {k: t.shape for k, t in moved[1].items()} == {k: t.shape for k, t in moved[0].items()}


def test_one_member_is_copied(plain):
    (moved,) = plain.move([draw(mlp())])
    assert all(torch.equal(moved[key], t) for key, t in draw(mlp()).items())


def test_networks_of_equal_units_are_transported_without_nan(plain):
    members = [{key: torch.zeros_like(t) for key, t in draw(mlp()).items()} for _ in range(2)]
    for hard in (True, False):
        report = {}
        moved = plain.move(members, hard=hard, report=report)
        assert all(torch.equal(t, torch.zeros_like(t)) for own in moved for t in own.values())
        assert report["objective"] == [0.0, 0.0]


@pytest.mark.parametrize("cost", ["weights", "activations"])
def test_merge_takes_models_and_files_of_different_widths(tmp_path, cost):
    torch.manual_seed(0)
    small, large = mlp(6, 5), mlp(9, 8)
    save_file(small.state_dict(), tmp_path / "small.safetensors")
    torch.save(large.state_dict(), tmp_path / "large.pt")
    files = [tmp_path / "small.safetensors", tmp_path / "large.pt"]
    given = {
        "method": "average",
        "align": "optimal_transport",
        "align_options": {"cost": cost},
        "batches": torch.randn(20, 4),
    }
    for model in (small, large):
        fused = merge([small, large], model=model, **given)
        shapes = {key: t.shape for key, t in model.state_dict().items()}
        assert {key: t.shape for key, t in fused.weights.items()} == shapes
        from_files = merge(files, model=model, **given)
        assert all(torch.equal(from_files.weights[key], t) for key, t in fused.weights.items())
    fused.save(tmp_path / "fused")
    again = merge([tmp_path / "fused", files[1]], **given)
    assert again.weights["0.weight"].shape == (9, 4)


def test_after_it_other_alignments_go_on():
    torch.manual_seed(0)
    nets = [mlp(6, 5), mlp(9, 8)]
    align = ["optimal_transport", "weight_matching"]
    found = merge(nets, method="average", align=align, batches=torch.randn(9, 4))
    assert [told["name"] for told in found.report["alignment"]] == align


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (mlp(classes=4), r"weights\[1\]: '4.weight' has shape \(4, 5\).*axis 0 carries no hidden"),
        (mlp(inputs=7), r"weights\[1\]: '0.weight' has shape \(6, 7\).*axis 1 carries no hidden"),
    ],
)
def test_what_are_no_hidden_widths_must_agree(plain, other, message):
    with pytest.raises(IncompatibleWeights, match=message):
        plain.move([draw(mlp()), draw(other)])


def test_widths_that_contradict_each_other_are_refused(plain):
    broken = draw(mlp(7, 5))
    broken["2.weight"] = torch.zeros(5, 8)
    with pytest.raises(IncompatibleWeights, match=r"'0' are 7 in '0.weight' and 8 in '2.weight'"):
        plain.move([draw(mlp()), broken])
    setting = Setting("cnn")
    broken = draw(cnn())
    broken["5.weight"] = torch.zeros(3, 18)
    with pytest.raises(IncompatibleWeights, match="axis 1 must hold 4 per unit"):
        setting.move([draw(cnn()), broken])
    broken["5.weight"] = torch.zeros(3, 16, 1)
    with pytest.raises(IncompatibleWeights, match=r"'5.weight' has shape \(3, 16, 1\)"):
        setting.move([draw(cnn()), broken])


def test_a_reference_has_the_networks_widths(plain):
    small, large = draw(mlp()), draw(mlp(9, 9))
    with pytest.raises(IncompatibleWeights, match="reference=1 has the widths"):
        plain.move([small, large], reference=1)
    with pytest.raises(IncompatibleWeights, match="no member has the network's widths"):
        plain.move([large, large])


@pytest.mark.parametrize(
    "options",
    [
        {"cost": "rows"},
        {"cost": None},
        {"hard": 1},
        {"regularisation": 0},
        {"regularisation": float("nan")},
        {"regularisation": True},
        {"regularisation": "small"},
        {"reference": 2},
        {"reference": -1},
        {"reference": True},
        {"cost": "activations"},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(plain, options):
    with pytest.raises(ConfigError, match=f"optimal_transport: {next(iter(options))}"):
        plain.move([draw(mlp()), draw(mlp(), 1)], **options)


def test_a_network_with_a_width_in_its_operators_is_refused_at_other_widths():
    def depthwise(width):
        return nn.Sequential(
            nn.Conv2d(2, width, 1), nn.Conv2d(width, width, 1, groups=width), nn.Flatten(),
            nn.Linear(4 * width, 2),
        )  # fmt: skip

    nets, inputs = [depthwise(3), depthwise(5)], torch.randn(6, 2, 2, 2)
    given = {"method": "average", "align": "optimal_transport", "batches": inputs}
    assert merge(nets, **given).weights["1.weight"].shape == (3, 1, 1, 1)
    with pytest.raises(StructureError, match=r"weights\[1\] cannot be run at its own widths"):
        merge(nets, **given, align_options={"cost": "activations"})


def test_attention_is_refused_with_the_way_out():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.leave = nn.Linear(3, 4), nn.Linear(4, 2)
            self.attend = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            x = self.enter(x)
            return self.leave(self.attend(x, x, x, need_weights=False)[0].mean(1))

    with pytest.raises(StructureError, match=r"optimal_transport: .*align='weight_matching'"):
        merge(
            [Attention(), Attention()],
            method="average",
            align="optimal_transport",
            batches=torch.randn(4, 5, 3),
        )


def test_trained_networks_of_two_widths_merge_into_one_as_good_as_they_are():
    task = load_task("digits")
    rows = torch.randperm(len(task.inputs), generator=torch.Generator().manual_seed(0))
    trained, layouts = [], []
    for width in (48, 64):
        net = architectures.build("mlp", (1, 8, 8), 10, widths=(width,))
        layouts.append(layout_of(net, task.inputs[:2]))
        weights = train_networks(
            layouts[-1].program,
            init_networks(lambda n=net: n, [width]),
            task.inputs,
            task.targets,
            [rows[:700] if width == 48 else rows[700:1400]],
            epochs=15,
        ).weights
        trained.append({key: t[0] for key, t in weights.items()})
    images, labels = task.inputs[rows[1400:]], task.targets[rows[1400:]]

    def accuracy(layout, weights):
        return float((run(layout.program, weights, [images]).argmax(-1) == labels).float().mean())

    alone = [accuracy(*own) for own in zip(layouts, trained, strict=True)]
    noise = (np.mean(alone) * (1 - np.mean(alone)) / len(labels)) ** 0.5
    for layout in layouts:
        moved, _ = align_members(trained, layout, "optimal_transport")
        fused = {key: (moved[0][key] + moved[1][key]) / 2 for key in moved[0]}
        assert accuracy(layout, fused) > np.mean(alone) - 2 * noise
