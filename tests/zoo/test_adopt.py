"""Other people's networks as a zoo: checkpoints by address that compute what theirs did."""

import csv
import sys

import pytest
import torch

from metamerge import merge
from metamerge.errors import ConfigError, ZooError
from zoo import adopt as adopting
from zoo.adopt import AdoptOptions, adopt
from zoo.architectures import mlp
from zoo.build import split_of
from zoo.store import load_zoo

KNOWN = {"architecture": "mlp", "shape": (1, 4, 4), "outputs": 3, "widths": (5,)}


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "test_accuracy"])
        for i in range(11):
            torch.manual_seed(i)
            torch.save(mlp((1, 4, 4), 3, widths=(5,)).state_dict(), folder / f"n{i:02d}.pt")
            writer.writerow([f"n{i:02d}.pt", i / 10])
    return folder


def options(source, **changes):
    given = {"out": str(source.parent / "zoo"), "members": (2, 3), "shares": (0.6, 0.0, 0.4)}
    return AdoptOptions(str(source), **{**given, **changes})


def test_every_network_is_a_checkpoint_by_address_with_its_metrics(source):
    zoo = adopt(options(source, **KNOWN))
    assert {n: g["families"] for n, g in zoo.groups.items()} == {
        "train-k2": 3, "train-k3": 2, "test-k2": 2, "test-k3": 1,
    }  # fmt: skip
    records = zoo.records("test", 2)
    for family in range(2):
        for member in range(2):
            number = int(records["source"][family, member])
            torch.manual_seed(number)
            model = mlp((1, 4, 4), 3, widths=(5,))
            merged = merge(f"{zoo.address('test', 2, family)}/{member}", method="average")
            assert all(torch.equal(merged.weights[k], t) for k, t in model.state_dict().items())
            assert records["test_accuracy"][family, member] == pytest.approx(number / 10)
            assert zoo.manifest["source"]["names"][number] == f"n{number:02d}.pt"


def test_no_network_is_in_two_parts(source):
    zoo = adopt(options(source))
    parts = [
        {int(i) for m in (2, 3) for i in zoo.records(part, m)["source"].flatten()}
        for part in ("train", "test")
    ]
    assert parts[0].isdisjoint(parts[1])


def test_the_same_adoption_finds_its_zoo_and_another_is_refused(source):
    first = adopt(options(source))
    assert adopt(options(source)).manifest == first.manifest
    with pytest.raises(ZooError, match="holds another zoo"):
        adopt(options(source, seed=1))
    assert load_zoo(first.folder).manifest == first.manifest


def test_without_an_architecture_weights_are_kept_and_the_way_out_is_told(source):
    zoo = adopt(options(source))
    assert zoo.families("train", 2)["1.weight"].shape == (3, 2, 5, 16)
    with pytest.raises(ZooError, match="--architecture"):
        _ = zoo.layout


def test_nothing_is_judged_on_networks_whose_images_nobody_knows(source):
    with pytest.raises(ZooError, match="nobody knows which images"):
        split_of(adopt(options(source, **KNOWN)))


def test_another_architecture_is_refused_with_the_tensor_that_differs(source):
    with pytest.raises(ConfigError, match=r"'1.weight' of shape \(6, 16\).* have \(5, 16\)"):
        adopt(options(source, **{**KNOWN, "widths": (6,)}))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"layout": "keras"}, "layout"),
        ({"members": (0,)}, "members"),
        ({"shares": (0.5, 0.5)}, "shares"),
        ({"architecture": "mlp"}, "--shape"),
    ],
)
def test_options_that_make_no_sense_are_refused(source, changes, match):
    with pytest.raises(ConfigError, match=match):
        options(source, **changes)


def test_too_few_networks_for_a_family_are_refused(source):
    with pytest.raises(ConfigError, match="make no family of 12"):
        adopt(options(source, members=(12,)))


def test_the_source_is_not_its_own_zoo(source):
    with pytest.raises(ConfigError, match="the source itself"):
        adopt(options(source, out=str(source)))


def test_the_command_says_what_to_do_next(source, monkeypatch, capsys):
    out = str(source.parent / "zoo")
    monkeypatch.setattr(
        sys, "argv", ["adopt", "--source", str(source), "--out", out, "--members", "2"]
    )
    adopting.main()
    assert "python -m zoo.show" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["adopt", "--source", str(source / "nothing"), "--out", out])
    with pytest.raises(SystemExit):
        adopting.main()
    assert "nothing" in capsys.readouterr().err
