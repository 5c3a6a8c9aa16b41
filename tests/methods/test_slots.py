"""What ZipIt, unit clusters and PLeaS share: slots, fused weights, and what units do on inputs."""

import pytest
import torch
from torch import nn

from metamerge.errors import StructureError
from metamerge.methods import pleas, unit_clusters, zipit
from metamerge.methods._slots import assemble, entries, grouped, mixed, spread
from metamerge.methods._units import correlations, ranked, unit_activations, voted
from metamerge.structure import Layout, discover_program, run, trace
from metamerge.weights import stack


class Stream(nn.Module):
    """A stem and two residual blocks with batch normalisation; the stream has three producers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(6, 5, 3, padding=1, bias=False),
                nn.BatchNorm2d(5),
                nn.ReLU(),
                nn.Conv2d(5, 6, 3, padding=1, bias=False),
                nn.BatchNorm2d(6),
            )
            for _ in range(2)
        )
        self.leave = nn.Linear(6, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return self.leave(x.mean((2, 3)))


NETWORKS = {
    "mlp": (
        lambda: nn.Sequential(
            nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3)
        ),
        (6,),
    ),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.GELU(), nn.Linear(9, 3)),
        (6,),
    ),
    "flattened cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 5, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(5, 6, 3, dilation=2, padding=2, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(6 * 9, 4),
            nn.ReLU(),
            nn.Linear(4, 3),
        ),
        (2, 6, 6),
    ),
    "depthwise": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 3),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, groups=6),
            nn.ReLU(),
            nn.Conv2d(6, 4, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16, 3),
        ),
        (2, 6, 6),
    ),
    "residual": (Stream, (2, 6, 6)),
}


class Setting:
    """A network with random members and calibration inputs, in float64 where it is asked for."""

    def __init__(self, name, members=3, rows=60):
        make, shape = NETWORKS[name]
        self.make = make
        program = trace(make().eval(), torch.zeros(2, *shape))
        self.layout = Layout(program, discover_program(program))
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(rows, *shape, generator=generator)
        self.members = [self.draw(generator) for _ in range(members)]

    def draw(self, generator):
        made = {}
        for key, tensor in self.make().state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            scale = max(1, tensor[0].numel()) ** 0.5 if tensor.ndim > 1 else 1.0
            made[key] = noise / scale if tensor.is_floating_point() else tensor
            if key.endswith("running_var") or (tensor.ndim == 1 and key.endswith("weight")):
                made[key] = noise.abs() + 0.5
        return made

    def outputs(self, *members):
        return run(self.layout.program, stack(members), [self.inputs], stacked=True)


@pytest.fixture(scope="module", params=list(NETWORKS))
def setting(request):
    return Setting(request.param)


@pytest.mark.parametrize("method", [zipit, unit_clusters])
def test_permuted_copies_come_back_as_the_same_function(setting, method):
    one, spec = setting.members[0], setting.layout.spec
    generator = torch.Generator().manual_seed(5)
    copies = [one, *(spec.permute(one, spec.random(generator)) for _ in range(2))]
    fused = method(copies, layout=setting.layout, batches=setting.inputs)
    before, after = setting.outputs(one, fused)
    assert torch.allclose(before, after, atol=1e-4)


@pytest.mark.parametrize("method", [zipit, unit_clusters, pleas])
def test_different_members_give_a_finite_network_of_their_shapes(setting, method):
    fused = method(setting.members, layout=setting.layout, batches=setting.inputs)
    assert {k: t.shape for k, t in fused.items()} == {
        k: t.shape for k, t in setting.members[0].items()
    }
    assert setting.outputs(fused).isfinite().all()


def dense(grouping):
    """The matrices M, ``[width, m * n]``, and U, ``[m * n, width]``, in float64."""
    undo = nn.functional.one_hot(grouping.slot.flatten(), grouping.width).double()
    return undo.mT * grouping.share.flatten(), undo


def test_fused_weights_are_those_of_merge_and_unmerge_matrices():
    setting = Setting("mlp")
    generator = torch.Generator().manual_seed(2)
    groupings = {}
    for group, n in setting.layout.spec.groups.items():
        slot = torch.cat(
            [torch.arange(n), torch.randint(n, (2 * n,), generator=generator)]
        ).reshape(3, n)
        groupings[group] = grouped(slot, n, torch.rand(3, n, generator=generator).double())
    members = stack(setting.members)
    fused = assemble({k: t.double() for k, t in members.items()}, setting.layout, groupings)
    (m1, u1), (m2, u2) = (dense(grouping) for grouping in groupings.values())
    first = m1 @ members["0.weight"].flatten(0, 1).double()
    second = m2 @ torch.block_diag(*members["2.weight"]).double() @ u1
    third = torch.cat(list(members["4.weight"]), 1).double() @ u2 / 3
    bias = m2 @ members["2.bias"].flatten().double()
    for key, expected in {
        "0.weight": first,
        "2.weight": second,
        "4.weight": third,
        "2.bias": bias,
        "4.bias": members["4.bias"].double().mean(0),
    }.items():
        assert torch.allclose(fused[key], expected, atol=1e-12), key


def test_slots_of_a_flattened_map_keep_positions_together():
    # two channels by two positions each: channel 0 goes to slot 2 and channel 1 to slot 0 of three
    setting = Setting("flattened cnn")
    group = setting.layout.by_node[setting.layout.layers[2].node].source
    spec = setting.layout.spec
    slot = torch.tensor([[2, 0, 1, 3, 4, 6]])
    at = entries(spec, "6.weight", 1, {group: grouped(slot, 7)})
    assert at.size == 7 * 9
    values = torch.arange(54.0)[None]
    placed = spread(values, 1, at).reshape(7, 9)
    assert torch.equal(placed[[2, 0, 1, 3, 4, 6]], values.reshape(6, 9))
    assert not placed[5].any()


def test_units_without_importance_share_their_slot_alike():
    slot, importance = torch.tensor([[0, 0], [1, 1]]), torch.tensor([[0.0, 0.0], [1.0, 3.0]])
    assert grouped(slot, 2, importance).share.tolist() == [[0.5, 0.5], [0.25, 0.75]]


def test_axes_without_units_are_averaged():
    assert mixed(torch.tensor([[1.0, 2.0], [3.0, 6.0]]), 1, None).tolist() == [2.0, 4.0]


def test_activations_are_those_of_the_modules():
    setting = Setting("mlp")
    stacked = stack(setting.members)
    read = unit_activations(stacked, setting.layout, setting.inputs, read=True)
    made = unit_activations(stacked, setting.layout, setting.inputs, read=False)
    model = setting.make().eval()
    for index, member in enumerate(setting.members):
        model.load_state_dict(member)
        for group, before, after in (("0", 1, 2), ("2", 3, 4)):
            assert torch.allclose(made[group][index], model[:before](setting.inputs).T, atol=1e-5)
            assert torch.allclose(read[group][index], model[:after](setting.inputs).T, atol=1e-5)


def test_a_stream_is_seen_behind_the_normalisation_of_all_that_make_it():
    setting = Setting("residual")
    stream = setting.layout.spec.row_group("stem.0.weight")
    stacked = stack(setting.members)
    made = unit_activations(stacked, setting.layout, setting.inputs[:4], read=False)[stream]
    read = unit_activations(stacked, setting.layout, setting.inputs[:4], read=True)[stream]
    assert made.shape == (3, 6, 3 * 4 * 36)
    assert read.shape == (3, 6, 2 * 4 * 36 + 4)
    model = setting.make().eval()
    model.load_state_dict(setting.members[1])
    stem = model.stem(setting.inputs[:4]).transpose(0, 1).flatten(1)
    assert torch.allclose(made[1, :, : 4 * 36], stem, atol=1e-5)


def test_correlations_are_those_of_torch_and_0_for_constant_units():
    values = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0))
    values[1, 2] = 7.3
    found = correlations(values)
    expected = torch.corrcoef(values.flatten(0, 1)[:5].double())
    assert torch.allclose(found[:5, :5], expected, atol=1e-12)
    assert not found[5].any()


@pytest.mark.parametrize("count", [2, 4])
def test_members_are_ranked_by_content(count):
    setting = Setting("mlp", members=4)
    members = setting.members[:count]
    order = ranked(stack(members), setting.layout)
    back = ranked(stack(members[::-1]), setting.layout)
    assert order == [count - 1 - index for index in back]


def test_the_vote_is_the_logarithm_of_mean_probabilities():
    logits = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(voted(logits).softmax(-1), logits.softmax(-1).mean(0), atol=1e-6)
    assert torch.allclose(voted(logits).mean(-1), torch.zeros(5), atol=1e-6)


def test_networks_that_use_a_layer_twice_are_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.leave = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.leave(torch.relu(self.inner(torch.relu(self.inner(x)))))

    model = Twice()
    program = trace(model, torch.zeros(2, 4))
    layout = Layout(program, discover_program(program))
    for method in (zipit, unit_clusters, pleas):
        with pytest.raises(StructureError, match="used by several layers"):
            method([model.state_dict()] * 2, layout=layout, batches=torch.zeros(4, 4))


def test_networks_with_more_than_one_group_per_axis_are_refused_before_anything_is_computed(wired):
    weights = [{key: t[0, m] for key, t in wired.members.items()} for m in range(2)]
    for method in (zipit, unit_clusters, pleas):
        with pytest.raises(
            StructureError, match=r"Align and average such networks|Give each a copy"
        ):
            method(weights, layout=wired.layout, batches=wired.inputs)
