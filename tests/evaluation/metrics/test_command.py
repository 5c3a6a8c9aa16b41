"""``python -m evaluation.metrics`` from end to end: its file beside the single functions."""

import io
import json
import sys

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from evaluation.metrics import accuracy, barriers, class_accuracies, family_logits, soft_vote
from evaluation.metrics.command import MetricsOptions, main, measure
from metamerge.errors import ConfigError
from metamerge.weights import unstack
from zoo.build import build, split_of
from zoo.recipe import ZooOptions
from zoo.variants import Variants, renamed

SMALL = {"members": (3,), "train_families": 1, "validation_families": 1, "test_families": 2,
         "epochs": 4, "segment_size": 80, "widths": (8,)}  # fmt: skip


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    out = tmp_path_factory.mktemp("metrics") / "zoo"
    return build(ZooOptions(out=str(out), relabel=True, **SMALL))


def measured(tmp_path, **options):
    console = Console(record=True, width=120, file=io.StringIO())
    path = tmp_path / "out" / "metrics.json"
    told = measure(MetricsOptions(out=str(path), points=5, draws=3, **options), console)
    assert json.loads(path.read_text()) == json.loads(json.dumps(told))
    return told, console.export_text()


def in_task(zoo):
    """Test members with the task's numbers of classes, and the test images."""
    classes = Variants.from_records(zoo.records("test", 3)).classes
    return renamed(zoo.families("test", 3), zoo.layout, classes), split_of(zoo).images("test")


def test_the_file_holds_the_scores_of_members_ensembles_and_averages(zoo, tmp_path):
    told, text = measured(tmp_path, zoo=str(zoo.folder))
    families, (inputs, targets) = in_task(zoo)
    logits = family_logits(zoo.layout.program, families, inputs)
    found = torch.tensor([[m["accuracy"] for m in f["members"]] for f in told["families"]])
    assert torch.allclose(found, accuracy(logits, targets))
    classes = torch.tensor([f["ensemble"]["class_accuracies"] for f in told["families"]])
    assert torch.allclose(classes, class_accuracies(soft_vote(logits), targets))
    matrix = barriers(zoo.layout.program, families, inputs, targets, points=5)
    for family, own in zip(told["families"], matrix, strict=True):
        pairs = family["as trained"]["barriers"]["pairs"]
        expected = [[i, j, float(own[i, j])] for i in range(3) for j in range(i + 1, 3)]
        assert [value for row in pairs for value in row] == pytest.approx(
            [value for row in expected for value in row], abs=1e-5
        )
    assert told["split"] == "test"
    assert told["rows"] == len(targets)
    assert all(word in text for word in ("accuracy", "ECE", "average aligned", "loss barrier"))


def test_segments_are_scored_on_the_rows_that_members_learned(zoo, tmp_path):
    told, _ = measured(tmp_path, zoo=str(zoo.folder), split="segments")
    families, _ = in_task(zoo)
    task, rows = split_of(zoo).task, zoo.rows("test", 3).long()
    for place, family in enumerate(told["families"]):
        own = {key: t[place : place + 1] for key, t in families.items()}
        found = torch.tensor([member["segment_accuracies"] for member in family["members"]])
        for segment, learned in enumerate(rows[place]):
            learned = learned[learned >= 0].unique()
            logits = family_logits(zoo.layout.program, own, task.inputs[learned])
            expected = accuracy(logits, task.targets[learned])[0]
            assert torch.allclose(found[:, segment], expected)


def test_a_segment_of_test_images_is_scored_by_its_classes(zoo, tmp_path):
    told, _ = measured(tmp_path, zoo=str(zoo.folder), families=1)
    split, rows = split_of(zoo), zoo.rows("test", 3)[0, 1]
    counts = torch.bincount(split.task.targets[rows[rows >= 0].long()], minlength=10)
    member = told["families"][0]["members"][2]
    by_class = torch.tensor(member["class_accuracies"])
    expected = float((by_class * counts).sum() / counts.sum())
    assert member["segment_accuracies"][1] == pytest.approx(expected, abs=1e-6)


def test_checkpoints_are_one_family_of_their_task(zoo, tmp_path):
    families, _ = in_task(zoo)
    paths = []
    for place, own in enumerate(unstack({key: t[0] for key, t in families.items()})):
        paths.append(str(tmp_path / f"{place}.safetensors"))
        save_file({key: t.contiguous() for key, t in own.items()}, paths[-1])
    given = {"checkpoints": tuple(paths), "task": "digits", "architecture": "mlp", "widths": (8,)}
    told, text = measured(tmp_path, **given)
    alone, _ = measured(tmp_path, zoo=str(zoo.folder), families=1)
    scores = [[m["accuracy"] for m in one["families"][0]["members"]] for one in (told, alone)]
    assert scores[0] == pytest.approx(scores[1])
    assert "0.safetensors" in "".join(text.split())


def test_families_that_see_other_inputs_are_scored_on_theirs(tmp_path):
    options = {**SMALL, "permute_pixels": True, "classes_per_family": 4, "epochs": 10}
    zoo = build(ZooOptions(out=str(tmp_path / "zoo"), **options))
    told, _ = measured(tmp_path, zoo=str(zoo.folder))
    variants = Variants.from_records(zoo.records("test", 3))
    for place, family in enumerate(told["families"]):
        inputs, targets = variants.images(split_of(zoo), "test", place)
        own = {key: t[place : place + 1] for key, t in zoo.families("test", 3).items()}
        expected = accuracy(family_logits(zoo.layout.program, own, inputs), targets)[0]
        found = [member["accuracy"] for member in family["members"]]
        assert found == pytest.approx(expected.tolist())
        assert max(found) > 0.4  # chance is a quarter


def test_regressions_have_scores_of_their_own(tmp_path):
    options = {**SMALL, "task": "diabetes", "objective": 80, "split": "disjoint", "segment_size": 0}
    zoo = build(ZooOptions(out=str(tmp_path / "zoo"), **options))
    told, text = measured(tmp_path, zoo=str(zoo.folder))
    assert told["families"][0]["ensemble"].keys() == {
        *("mean_absolute_error", "mean_squared_error", "r2"),
    }
    assert "R2" in text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "zoo, checkpoints: give one"),
        ({"zoo": "a", "checkpoints": ("b",)}, "zoo, checkpoints: give one"),
        ({"checkpoints": ("b",)}, "task: name the task"),
        ({"zoo": "a", "split": "train"}, "split: expected one of segments, objective"),
        ({"zoo": "a", "align": "nothing"}, "align: expected one of none"),
        ({"zoo": "a", "points": 2}, "points: expected 0 or at least 3"),
    ],
)
def test_options_that_make_no_sense_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        MetricsOptions(**given)


def test_what_is_wrong_is_told_in_a_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["metrics", "--zoo", str(tmp_path)])
    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code == 3
    assert "no zoo here" in capsys.readouterr().err
