"""Options of a zoo: what is refused before anything runs, and what makes two zoos the same."""

import json
import math
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch

from metamerge.errors import ConfigError, ZooError
from zoo.options import parse
from zoo.recipe import ZooOptions, factory_for, options_from
from zoo.tasks import load_task

# ------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("split", "iid", "one of"),
        ("init", "none", r"one of \('own', 'shared'\)"),
        ("by", "label", "one of"),
        ("precision", "float16", r"one of \('float32', 'bfloat16'\)"),
        ("members", (), "different numbers from 1 on"),
        ("members", (2, 2), "different numbers from 1 on"),
        ("members", (0, 2), "different numbers from 1 on"),
        ("train_families", 0, "1 or more|more than 0"),
        ("train_families", -1, "1 or more|more than 0"),
        ("validation_families", -1, "0 or more"),
        ("test_families", -1, "0 or more"),
        ("epochs", 0.0, "more than 0"),
        ("epochs", math.inf, "more than 0"),
        ("epochs", (0.0, 3.0), "more than 0"),
        ("epochs", (3.0, 1.0), "one number or a range of two"),
        ("epochs", (1.0, 2.0, 3.0), "one number or a range of two"),
        ("epochs", (), "one number or a range of two"),
        ("lr", math.nan, "more than 0"),
        ("lr", (0.1, math.nan), "one number|more than 0"),
        ("lr", -0.01, "more than 0"),
        ("alpha", 0.0, "more than 0"),
        ("alpha", (0.1, math.inf), "more than 0"),
        ("weight_decay", -1.0, "0 or more"),
        ("weight_decay", (0.1, 0.01), "one number or a range of two"),
        ("batch_size", 0, "more than 0"),
        ("classes_per_segment", 0, "more than 0"),
        ("segment_size", -1, "0 or more"),
        ("shared_steps", -1, "0 or more"),
        ("patience", -1, "0 or more"),
        ("snapshots", -1, "0 or more"),
        ("shard", -1, "0 or more"),
        ("classes_per_family", -1, "0 or more"),
        ("reference_epochs", -1.0, "0 or more"),
        ("pool", 0.0, "more than 0"),
        ("pool", 1.1, "a share up to 1"),
        ("augment_share", 1.1, "a share up to 1"),
        ("augment_share", -0.1, "a share up to 1"),
        ("share", math.nan, "a share up to 1"),
        ("hold_back", 0.0, "a share below 1"),
        ("hold_back", 1.0, "a share below 1"),
        ("widths", (32, 0), "numbers from 1 on"),
        ("seed", -1, "0 to 2147483647"),
        ("seed", 2**31, "0 to 2147483647"),
    ],
    ids=str,
)
def test_a_value_that_makes_no_sense_is_refused_by_name(option, value, told):
    with pytest.raises(ConfigError, match=rf"^{option}: .*({told})"):
        ZooOptions(**{option: value})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"architecture": "transformer"}, r"'transformer' is unknown; there are \['cnn', 'convnet"),
        ({"architecture": "nowhere:net"}, r"'nowhere:net' cannot be imported.*PYTHONPATH"),
        ({"architecture": "math:pi"}, r"'math:pi' is float, not a factory"),
        ({"augment": ("rotate",)}, "rotate"),
        ({"augment": ("noise=much",)}, "noise"),
        ({"shared_steps": 3}, "Add --init shared"),
        ({"split": "clusters", "segment_size": 0}, "--segment-size, or --pool 0.8"),
        ({"split": "difficulty", "segment_size": 0}, "--segment-size, or --pool 0.8"),
        ({"split": "bins", "segment_size": 0}, "--segment-size, or --pool 0.8"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_refused_with_a_way_out(changes, told):
    with pytest.raises(ConfigError, match=told):
        ZooOptions(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"split": "clusters", "segment_size": 0, "pool": 0.8},
        {"split": "bins", "segment_size": 100},
        {"shared_steps": 3, "init": "shared"},
        {"validation_families": 0, "test_families": 0},
        {"members": (1,)},
        {"weight_decay": (0.0, 0.1)},
        {"widths": ()},
        {"seed": 2**31 - 1},
    ],
    ids=str,
)
def test_options_at_the_edge_of_sense_are_taken(changes):
    options = ZooOptions(**changes)
    assert {name: getattr(options, name) for name in changes} == changes


# ------------------------------------------------------------------------------- ranges


@pytest.mark.parametrize("name", ["alpha", "epochs", "lr", "weight_decay"])
def test_a_single_number_is_a_range_of_one(name):
    for value in (2, 2.0, (2,), [2.0]):
        found = getattr(ZooOptions(**{name: value}), name)
        assert found == (2.0,)
        assert type(found[0]) is float
    assert getattr(ZooOptions(**{name: [1, 2]}), name) == (1.0, 2.0)


def test_a_command_line_takes_one_or_two_numbers():
    line = "--lr 0.001 0.1 --epochs 3 --augment flip noise=0.1 --widths 8 4 --relabel"
    options = parse(ZooOptions, line.split(), prog="zoo.build")
    assert options == ZooOptions(
        lr=(0.001, 0.1), epochs=(3.0,), augment=("flip", "noise=0.1"), widths=(8, 4), relabel=True
    )


# ------------------------------------------------------------------------------- the digest


def test_where_things_lie_does_not_shape_a_zoo():
    assert ZooOptions(out="elsewhere", data="there").digest == ZooOptions().digest


def test_how_a_number_is_written_does_not_shape_a_zoo():
    one = ZooOptions(epochs=30, lr=1, pool=1, share=0, reference_epochs=5, members=[2, 4])
    other = ZooOptions(
        epochs=(30.0,), lr=(1.0,), pool=1.0, share=0.0, reference_epochs=5.0, members=(2, 4)
    )
    assert one.digest == other.digest
    assert one.shaping == other.shaping


CHANGED = {
    "task": "mnist",
    "target": "column",
    "kind": "regression",
    "drop": ("column",),
    "objective": 300,
    "architecture": "cnn",
    "widths": (16,),
    "norm": "batch",
    "split": "disjoint",
    "alpha": (0.4, 0.5),
    "segment_size": 200,
    "pool": 0.5,
    "share": 0.4,
    "classes_per_segment": 3,
    "algorithm": "gmm",
    "linkage": "average",
    "neighbours": 5,
    "min_cluster_size": 5,
    "covariance": "diag",
    "by": "targets",
    "reference_epochs": 1.0,
    "init": "shared",
    "augment": ("flip",),
    "augment_share": 0.5,
    "relabel": True,
    "classes_per_family": 5,
    "permute_pixels": True,
    "flip_families": True,
    "members": (2, 4),
    "train_families": 10,
    "validation_families": 10,
    "test_families": 10,
    "epochs": 10.0,
    "batch_size": 16,
    "lr": (0.01, 0.02),
    "weight_decay": 0.1,
    "patience": 3,
    "hold_back": 0.2,
    "snapshots": 2,
    "precision": "bfloat16",
    "shard": 7,
    "seed": 1,
}


def test_every_other_option_shapes_a_zoo():
    names = {field.name for field in fields(ZooOptions)}
    assert names - {"out", "data", "shared_steps"} == CHANGED.keys()
    shared = ZooOptions(init="shared", shared_steps=3)  # has no sense without the other
    digests = {ZooOptions(**{name: value}).digest for name, value in CHANGED.items()}
    assert len(digests | {ZooOptions().digest, shared.digest}) == len(CHANGED) + 2


def test_what_shapes_a_zoo_is_what_json_gives_back():
    shaping = ZooOptions(**CHANGED | {"task": "digits"}).shaping
    assert json.loads(json.dumps(shaping)) == shaping
    assert not {"out", "data"} & shaping.keys()


# ------------------------------------------------------------------------------- the folder


def test_the_usual_zoo_of_a_task_bears_its_name():
    assert ZooOptions().folder == Path("zoos/digits")
    assert ZooOptions(task="mnist").folder == Path("zoos/mnist")
    assert ZooOptions(task="/data/of.mine/wine.v2.csv").folder == Path("zoos/wine")


def test_an_unusual_zoo_gets_a_folder_of_its_own():
    folders = [ZooOptions(seed=seed).folder for seed in range(3)]
    assert len(set(folders)) == 3
    assert folders[1] == Path(f"zoos/digits-{ZooOptions(seed=1).digest[:8]}")


def test_a_folder_that_was_named_is_used_whatever_the_options():
    assert ZooOptions(seed=1, out="here").folder == ZooOptions(out="here").folder == Path("here")


def test_families_of_a_part_are_counted():
    options = ZooOptions(train_families=5, validation_families=3, test_families=0)
    assert [options.families(part) for part in ("train", "validation", "test")] == [5, 3, 0]


# ------------------------------------------------------------------------------- records


@pytest.mark.parametrize("changes", [{}, CHANGED, {"out": "x", "data": "y"}], ids=["", "all", "x"])
def test_options_come_back_from_json_as_they_were(changes):
    options = ZooOptions(**changes)
    back = options_from(json.loads(json.dumps(asdict(options))))
    assert back == options
    assert back.digest == options.digest


def test_what_shapes_a_zoo_suffices_to_make_its_options():
    options = ZooOptions(**CHANGED, out="somewhere")
    assert options_from(options.shaping) == replace(options, out=None)


@pytest.mark.parametrize(
    "changes",
    [
        {"momentum": 0.9},
        {"split": "iid"},
        {"seed": "0"},
        {"members": 2},
        {"members": ["two"]},
        {"alpha": ["much"]},
        {"epochs": None},
        {"widths": [None]},
        {"architecture": "gone:factory"},
        {"pool": [1]},
    ],
    ids=str,
)
def test_options_of_another_version_are_refused(changes):
    told = "options of a zoo are of another version.*Build the zoo again"
    with pytest.raises(ZooError, match=told):
        options_from({**ZooOptions().shaping, **changes})


# ------------------------------------------------------------------------------- networks


def shapes(options):
    model = factory_for(options, load_task("digits"))()
    return {key: tuple(t.shape) for key, t in model.state_dict().items()}


def test_networks_fit_the_task_and_have_the_widths_that_were_asked_for():
    assert shapes(ZooOptions()) == {
        **{"1.weight": (32, 64), "1.bias": (32,), "3.weight": (10, 32), "3.bias": (10,)}
    }
    assert shapes(ZooOptions(widths=(5,)))["1.weight"] == (5, 64)
    assert shapes(ZooOptions(architecture="cnn", widths=(3, 4)))["0.weight"] == (3, 1, 3, 3)
    normed = shapes(ZooOptions(architecture="resnet20", widths=(2, 3, 4), norm="batch"))
    assert any(key.endswith("running_mean") for key in normed)


def test_families_that_know_some_classes_have_as_many_outputs():
    assert shapes(ZooOptions(classes_per_family=4))["3.weight"] == (4, 32)


def test_every_network_of_a_factory_is_a_fresh_one():
    make = factory_for(ZooOptions(), load_task("digits"))
    assert not torch.equal(make().state_dict()["1.weight"], make().state_dict()["1.weight"])


def test_an_option_that_an_architecture_does_not_know_is_refused():
    with pytest.raises(ConfigError, match="'mlp' has no norm; got norm='batch'"):
        factory_for(ZooOptions(norm="batch"), load_task("digits"))()
