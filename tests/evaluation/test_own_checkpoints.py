"""Checkpoints of one's own: files and folders as families, what is said of them, refusals."""

import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from sklearn.datasets import load_wine
from torch import nn

from evaluation.compare import CompareOptions, compare
from evaluation.own_checkpoints import OwnOptions, own_families
from metamerge import merge
from metamerge.checkpoints import save_checkpoint
from metamerge.errors import CheckpointError, ConfigError, StructureError
from metamerge.structure import trace
from metamerge.weights import stack
from zoo.training import init_networks, predict, train_networks

FACTORY = """
from torch import nn

def make(shape, outputs):
    return nn.Sequential(nn.Linear(*shape, 8), nn.ReLU(), nn.Linear(8, outputs))
"""
QUICK = {
    "unlabelled": (20,),
    "labelled": (20,),
    "full": False,
    "tracking": False,
    "pictures": False,
}


def network():
    return nn.Sequential(nn.Linear(13, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A table of wines, a network in a module, and six members in files and in folders of three."""
    folder = tmp_path_factory.mktemp("own")
    inputs, targets = load_wine(return_X_y=True)
    inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    lines = [",".join([*(f"x{i}" for i in range(13)), "kind"])]
    for values, target in zip(inputs, targets, strict=True):
        lines.append(",".join([*(f"{v:.6f}" for v in values), f"kind {target}"]))
    (folder / "wine.csv").write_text("\n".join(lines) + "\n")
    (folder / "own_net.py").write_text(FACTORY)
    start = init_networks(network, range(6))
    told = (torch.tensor(inputs, dtype=torch.float32), torch.tensor(targets))
    rows = list(torch.randperm(len(targets), generator=torch.Generator().manual_seed(0)).chunk(6))
    program = trace(network(), told[0][:2])
    trained = train_networks(program, start, *told, rows, epochs=30).weights
    for k in range(6):
        weights = {key: t[k].clone() for key, t in trained.items()}
        torch.save(weights, folder / f"part{k}.pt")
        own = folder / "families" / "ab"[k // 3]
        own.mkdir(parents=True, exist_ok=True)
        torch.save(weights, own / f"{k}.pt")
        save_checkpoint(weights, folder / f"told{k}", program=program.to_json())
    return folder


@pytest.fixture
def work(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(place)
    yield place
    sys.modules.pop("own_net", None)


def read(work, *names, **options):
    given = {"task": str(work / "wine.csv"), "target": "kind", "model": "own_net:make", **options}
    return own_families(OwnOptions(tuple(str(work / name) for name in names), **given), seed=0)


def test_files_are_one_family_and_their_rows_are_those_of_merge(work):
    judged = read(work, "part0.pt", "part1.pt", "part2.pt")
    assert (len(judged), judged.members) == (1, 3)
    options = CompareOptions(
        checkpoints=tuple(str(work / f"part{k}.pt") for k in range(3)),
        task=str(work / "wine.csv"),
        target="kind",
        model="own_net:make",
        methods=("regression_mean",),
        out="out",
        **QUICK,
    )
    found = compare(options, Console(quiet=True))
    rows = {(one.method, one.data): one for one in found.scored}
    files = [str(work / f"part{k}.pt") for k in range(3)]
    fused = merge(files, method="average", model=network()).weights
    inputs, targets = judged.split.images("test")
    said = predict(judged.layout.program, stack([fused]), inputs).argmax(-1)
    expected = (said == targets).float().mean(-1)
    assert torch.equal(rows["average, aligned", "none"].accuracies, expected)
    assert {"gnn", "soft-vote ensemble", "best member", "trained from scratch"} <= {
        method for method, _ in rows
    }
    assert ("weight_matching > regression_mean", "unlabelled:20") in rows
    assert "trained on all segments (ceiling)" not in {method for method, _ in rows}
    (note,) = found.meta["notes"]
    assert "nobody knows which images these members learned from" in note
    written = json.loads(Path("out/leaderboard.json").read_text())
    assert {row["p"] for row in written} == {None}  # one family: nothing to pair


def test_folders_are_a_family_each(work):
    judged = read(work, "families/a", "families/b")
    assert (len(judged), judged.members) == (2, 3)
    both = torch.load(work / "part4.pt", weights_only=True)
    assert torch.equal(judged.families["0.weight"][1, 1], both["0.weight"])


def test_images_are_cut_into_parts_that_do_not_meet(work):
    split = read(work, "families/a", "families/b", objective=40).split
    parts = [set(split.rows(part).tolist()) for part in ("objective", "validation", "test")]
    assert len(set.union(*parts)) == sum(map(len, parts))
    assert len(parts[0]) + len(parts[1]) == 40
    assert len(parts[2]) == round(178 / 4)


def test_inputs_are_those_of_the_file(work):
    """Nobody knows how members' inputs were scaled, so nothing is scaled."""
    judged = read(work, "part0.pt", "part1.pt")
    first = (work / "wine.csv").read_text().splitlines()[1].split(",")[:13]
    rows = judged.split.task.inputs
    assert any(torch.allclose(row, torch.tensor([float(x) for x in first])) for row in rows)
    assert "chance" not in judged.note


def test_members_that_know_nothing_of_the_inputs_are_noticed(work):
    for k in range(2):
        torch.manual_seed(k)
        torch.save(network().state_dict(), work / f"fresh{k}.pt")
    judged = read(work, "fresh0.pt", "fresh1.pt")
    assert "not far from chance: are inputs scaled as they were in training?" in judged.note


def test_checkpoints_that_carry_their_program_need_no_model(work):
    judged = read(work, "told0", "told1", model=None)
    assert judged.network is None
    assert judged.members == 2


def test_a_base_comes_with_methods_that_want_one(work):
    judged = read(work, "part1.pt", "part2.pt", base=str(work / "part0.pt"))
    base = torch.load(work / "part0.pt", weights_only=True)
    assert torch.equal(judged.bases["0.weight"][0], base["0.weight"])


@pytest.mark.parametrize(
    ("names", "options", "told"),
    [
        (("part0.pt",), {}, "checkpoints: expected two files or more, .*part0.pt"),
        (("families/a", "part0.pt"), {}, r"families/a \(3\), .*part0.pt \(1\)"),
        (("part0.pt", "part1.pt"), {"model": None}, "model: .* Give --model: mlp, cnn"),
        (("part0.pt", "part1.pt"), {"model": "own_net:missing"}, "own_net:missing"),
        (("part0.pt", "part1.pt"), {"task": "digits", "target": None, "model": "mlp"}, "network"),
        (("told0", "told1"), {"task": "digits", "target": None, "model": None}, r"\(13,\)"),
        (("part0.pt", "part1.pt"), {"target": "x0"}, "classifications are compared"),
    ],
)
def test_what_makes_no_comparison_is_refused_with_a_reason(work, names, options, told):
    with pytest.raises((ConfigError, StructureError), match=told):
        read(work, *names, **options)


def test_checkpoints_that_cannot_be_read_are_named(work):
    (work / "empty.pt").write_bytes(b"")
    weights = torch.load(work / "part0.pt", weights_only=True)
    torch.save({**weights, "0.bias": weights["0.bias"] * float("nan")}, work / "broken.pt")
    for name, told in (("empty.pt", "empty.pt"), ("broken.pt", "broken.pt.*0.bias")):
        with pytest.raises(CheckpointError, match=told):
            read(work, "part0.pt", name)
    with pytest.raises(CheckpointError, match=r"missing\.pt"):
        read(work, "part0.pt", "missing.pt")


def test_a_task_with_other_classes_is_refused(work):
    text = (work / "wine.csv").read_text().replace("kind 2", "kind 1")
    (work / "two.csv").write_text(text)
    with pytest.raises(ConfigError, match="2 classes, the checkpoints' networks put out 3"):
        read(work, "told0", "told1", model=None, task=str(work / "two.csv"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"checkpoints": ("a.pt", "b.pt")}, "checkpoints, task: one needs the other"),
        ({"task": "digits"}, "checkpoints, task: one needs the other"),
        ({"checkpoints": ("a.pt",), "task": "digits", "zoo": "z"}, "zoo, checkpoints: say one"),
        ({"seeds": ()}, "seeds: expected at least one"),
    ],
)
def test_options_that_exclude_each_other_are_refused(options, told):
    with pytest.raises(ConfigError, match=told):
        CompareOptions(**options)


def test_images_that_the_merger_may_have_seen_are_no_test_images(work):
    """The merger of the package has seen digits, but those that seed 0 keeps back."""
    for k in range(2):
        torch.manual_seed(k)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 10))
        torch.save(net.state_dict(), work / f"digits{k}.pt")
    files = tuple(str(work / f"digits{k}.pt") for k in range(2))
    options = CompareOptions(checkpoints=files, task="digits", model="mlp", widths=(4,), seeds=(3,))
    with pytest.raises(ConfigError, match=r"seeds: .*bundled was trained on images of digits.*0"):
        compare(options, Console(quiet=True))
