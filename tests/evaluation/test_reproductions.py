"""Papers run again: the protocols by hand and against modules, and the commands end to end."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from evaluation.methods import entries as entries_module
from evaluation.reproductions import ma_echo as ma_echo_module
from evaluation.reproductions import repair_depth as depth_module
from evaluation.reproductions import repair_width as width_module
from evaluation.reproductions.ma_echo import MaEchoOptions, ma_echo
from evaluation.reproductions.pairs import merged_scores
from evaluation.reproductions.repair_depth import DepthOptions, fused, normalised_mlp, repair_depth
from evaluation.reproductions.repair_width import WidthOptions, repair_width
from evaluation.reproductions.sizes import scored_row
from evaluation.reproductions.skewed import known_classes, network, shares, trained
from metamerge.structure import Layout, discover_program, run
from metamerge.weights import stack
from zoo.architectures import mlp, program_of
from zoo.tasks import Task

SHAPE = (1, 28, 28)


def quiet():
    return Console(quiet=True)


@pytest.fixture(scope="module")
def task():
    """Ten classes that a network tells apart in a few steps: a bright row each, in noise."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(1300) % 10
    inputs = 0.3 * torch.rand(1300, *SHAPE, generator=generator)
    inputs[torch.arange(1300), 0, 2 * targets + 4] += 0.7
    return Task("mnist", inputs, targets, 10, test_rows=range(1000, 1300))


def test_folding_batch_normalisation_keeps_the_function():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        nets = [normalised_mlp(SHAPE, 2).double() for _ in range(2)]
        for net in nets:
            net(torch.rand(64, *SHAPE, dtype=torch.float64))  # moves the running statistics
            for layer in net:
                if isinstance(layer, torch.nn.BatchNorm1d):
                    torch.nn.init.normal_(layer.weight)
                    torch.nn.init.normal_(layer.bias)
        images = torch.rand(5, *SHAPE, dtype=torch.float64)
    plain = mlp(SHAPE, 10, widths=(128,) * 3)
    folded = fused(stack([net.state_dict() for net in nets]), nets[0])
    assert folded.keys() == plain.state_dict().keys()
    found = run(program_of(plain, SHAPE), folded, [images], stacked=True)
    expected = torch.stack([net.eval()(images) for net in nets])
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-10)


def test_folding_one_unit_by_hand():
    net = normalised_mlp((1,), 0)
    weights = {key: t[None].double() for key, t in net.state_dict().items() if t.ndim}
    weights["1.weight"][:] = 2.0  # linear
    weights["1.bias"][:] = 3.0
    weights["2.weight"][:] = 0.5  # normalisation: 0.5 (x - 1) / sqrt(4) + 7
    weights["2.bias"][:] = 7.0
    weights["2.running_mean"][:] = 1.0
    weights["2.running_var"][:] = 4.0 - net[2].eps
    folded = fused(weights, net)
    assert torch.allclose(folded["1.weight"], torch.full((1, 128, 1), 0.5, dtype=torch.float64))
    assert torch.allclose(folded["1.bias"], torch.full((1, 128), 7.5, dtype=torch.float64))


def test_a_network_and_its_permuted_copy_merge_into_themselves(task):
    factory = mlp(SHAPE, 10, widths=(16, 16))
    program = program_of(factory, SHAPE)
    layout = Layout(program, discover_program(program))
    one = factory.state_dict()
    generator = torch.Generator().manual_seed(0)
    shuffled = {g: torch.randperm(n, generator=generator) for g, n in layout.spec.groups.items()}
    pairs = {k: t[None] for k, t in stack([one, layout.spec.permute(one, shuffled)]).items()}
    test = (task.inputs[1000:], task.targets[1000:])
    scores = merged_scores(pairs, layout, task.inputs[:100], test)
    assert scores["matched"] == scores["repaired"] == scores["members"]
    assert scores["matched_activations"] == scores["members"]


def test_spread_over_pairs_is_that_of_a_sample():
    row = scored_row(lambda: {"members": torch.tensor([0.2, 0.4])})
    assert row["mean"] == {"members": 0.3}
    assert row["std"] == {"members": 0.1414}
    assert row["pairs"] == 2


@pytest.mark.parametrize(
    ("module", "reproduce", "options"),
    [
        (depth_module, repair_depth, DepthOptions(depths=(0, 1), pairs=2, epochs=3, batch_size=50)),
        (width_module, repair_width, WidthOptions(widths=(8, 16), pairs=2, epochs=3, depth=1)),
    ],
)
def test_repair_runs_from_end_to_end_and_goes_on(
    module, reproduce, options, task, tmp_path, monkeypatch
):
    monkeypatch.setattr(module, "load_task", lambda name, data: task)
    options = options.__class__(**{**vars(options), "out": str(tmp_path)})
    rows = reproduce(options, quiet())
    assert len(rows) == 2
    for row in rows.values():
        assert {"members", "plain", "matched", "repaired", "refitted"} <= row["mean"].keys()
        assert row["pairs"] == 2
    name = reproduce.__name__
    written = json.loads((tmp_path / f"{name}.json").read_text())
    assert written["rows"] == json.loads(json.dumps(rows))
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    monkeypatch.setattr(module, "train_pairs", None)  # nothing is trained again
    assert reproduce(options, quiet()) == rows


def test_members_trained_with_normalisation_learn(task):
    options = DepthOptions(pairs=1, epochs=3, batch_size=50, lr=1e-2)
    scores = depth_module.depth_scores(options, task, 1)
    assert float(scores["members"]) > 0.9
    assert float(scores["repaired"]) > 0.9


def test_every_row_is_dealt_out_once_and_no_class_to_who_holds_enough():
    targets = torch.arange(2000) % 10
    options = MaEchoOptions(members=5, alpha=0.01)
    for seed in range(5):
        dealt = shares(targets, torch.arange(1500), options, seed)
        assert torch.cat(dealt).sort().values.tolist() == list(range(1500))
        assert all(len(own) >= 10 for own in dealt)
        # who holds less than an even share of 300 may get one more class of 150, never two
        assert max(len(own) for own in dealt) < 300 + 150


def test_equal_seeds_deal_alike():
    targets = torch.arange(500) % 10
    one, other, third = (
        shares(targets, torch.arange(500), MaEchoOptions(), seed) for seed in (3, 3, 4)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, third, strict=True))


def test_a_class_seen_once_is_not_known():
    targets = torch.tensor([0, 0, 1, 2, 2])
    known = known_classes(targets, [torch.tensor([0, 1, 2]), torch.tensor([3, 4])])
    assert known[:, :3].tolist() == [[1, 0, 0], [0, 0, 1]]
    assert known.shape == (2, 10)


def test_coefficients_are_equal_over_members_that_know_a_class():
    shared = ma_echo_module._shared(torch.tensor([[1.0, 1, 0], [1, 0, 0]]))
    assert shared.tolist() == [[0.5, 1, 0.5], [0.5, 0, 0.5]]


def test_a_member_makes_plain_gradient_steps(task):
    images, rows = (task.inputs, task.targets), torch.arange(40)
    options = MaEchoOptions(epochs=2, batch_size=64, lr=0.1, momentum=0.5)
    found = trained(images, rows, options, seed=7)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        member = network()
    velocity = [torch.zeros_like(p) for p in member.parameters()]
    for _ in range(2):  # one batch an epoch: the order of rows does not matter
        loss = F.cross_entropy(member(images[0][rows]), images[1][rows])
        grads = torch.autograd.grad(loss, list(member.parameters()))
        with torch.no_grad():
            for place, (parameter, grad) in enumerate(zip(member.parameters(), grads, strict=True)):
                velocity[place] = 0.5 * velocity[place] + grad
                parameter -= 0.1 * velocity[place]
    for key, tensor in member.state_dict().items():
        assert torch.allclose(found[key], tensor, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def echoed(tmp_path_factory, task):
    """Two small families, and the command run a second time."""
    out = str(tmp_path_factory.mktemp("ma_echo"))
    options = MaEchoOptions(out=out, seeds=2, epochs=2, images=1000, controls=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ma_echo_module, "load_task", lambda name, data: task)
        for module in (ma_echo_module, entries_module):
            patch.setattr(module, "list_alignments", lambda: ["weight_matching"])
        patch.setattr(entries_module, "list_corrections", lambda: ["refit"])
        patch.setattr(entries_module, "list_methods", lambda: ["average", "rank_average"])
        rows = ma_echo(options, quiet())
        patch.setattr(ma_echo_module, "family", None)  # nothing is trained again
        again = ma_echo(options, quiet())
    return SimpleNamespace(rows=rows, again=again)


def test_ma_echo_goes_on_where_it_was(echoed):
    assert echoed.again == echoed.rows


def test_ma_echo_has_rows_with_and_without_knowledge_of_classes(echoed):
    assert not [row["error"] for row in echoed.rows if "error" in row]
    names = {row["method"] for row in echoed.rows}
    assert {"average", "average, known classes", "ensemble, known classes"} <= names
    assert "weight_matching > average > refit, known classes" in names
    assert {row["families"] for row in echoed.rows} == {2}


def test_published_figures_stand_beside_rows_of_the_same_kind(echoed):
    table = ma_echo_module.published_table(echoed.rows)
    columns = [list(column.cells) for column in table.columns]
    assert columns[0][:2] == ["ensemble", "averaging"]
    assert columns[1][:4] == ["80.0", "19.1", "10.1", "82.5"]
    assert columns[3][:2] == ["ensemble, known classes", "average, known classes"]
    assert columns[2][2:4] == ["", ""]  # neither optimal transport here, nor their own method
