"""The comparison from end to end: rows, controls, gates, files and runs; and what it refuses."""

import json
import math
import re
import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from rich.console import Console

from evaluation import compare as comparison
from evaluation.compare import CompareOptions, compare, main
from evaluation.metrics import accuracy, family_logits
from metamerge import merge
from metamerge.checkpoints import save_checkpoint
from metamerge.errors import ConfigError, IncompatibleWeights, Unreadable, ZooError
from metamerge.mergers import GNNConfig, GNNMerger, read_card, save_merger
from metamerge.weights import stack
from trainers.merger import MergerOptions, train
from zoo.build import ZooOptions, build, options_from, split_of
from zoo.training import predict

KEYS = {
    *("method", "members", "data", "accuracy_mean", "accuracy_std", "accuracy_worst"),
    *("families", "seconds", "parameters", "control"),
}
SIZES, FAMILIES, WIDTH = (2, 3), 4, 16
PARAMETERS = 64 * WIDTH + WIDTH + WIDTH * 10 + 10
IMAGES = 400  # objective and validation images together

CONTROLS = {
    "best member": "labelled",
    "soft-vote ensemble": "none",
    "majority-vote ensemble": "none",
    "distilled from best member": "unlabelled",
    "distilled from aligned average": "unlabelled",
    "best member, fine-tuned": "labelled",
    "trained from scratch": "labelled",
    "trained on all segments (ceiling)": "segments",
}
METHODS = {
    "gnn": "none",
    "average": "none",
    "average, aligned": "none",
    "average, aligned + repair": "unlabelled",
    "average, aligned + refit": "unlabelled",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("comparison")


@pytest.fixture(scope="module")
def zoo(place):
    return build(
        ZooOptions(
            out=str(place / "zoo"),
            widths=(WIDTH,),
            segment_size=150,
            members=SIZES,
            train_families=8,
            validation_families=4,
            test_families=FAMILIES,
            epochs=10.0,
        )
    )


@pytest.fixture(scope="module")
def merger(place, zoo):
    """A merger that was trained for a second."""
    options = MergerOptions(
        zoo=str(zoo.folder),
        out=str(place / "merger"),
        probes=32,
        width=8,
        families=4,
        steps=20,
        eval_every=10,
        tracking=False,
    )
    try:
        train(options, Accelerator(cpu=True))
    finally:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
    return options.out


@pytest.fixture(scope="module", autouse=True)
def short_controls():
    """Controls are trained for a few epochs: here it matters that they are there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluation.controls.TUNE_EPOCHS", 3)
        patch.setattr("evaluation.controls.SCRATCH_EPOCHS", 6)
        yield


@pytest.fixture(scope="module")
def result(place, zoo, merger):
    """One comparison, tracked, with everything that it left behind."""
    uri = f"sqlite:///{place}/mlflow.db"
    options = CompareOptions(merger=merger, out=str(place / "out"))
    console = Console(width=160, record=True, quiet=False, file=(place / "table.txt").open("w"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        rows = compare(options, console)
    out = place / "out"
    return SimpleNamespace(
        rows=rows,
        uri=uri,
        out=out,
        options=options,
        table=console.export_text(),
        written=json.loads((out / "leaderboard.json").read_text()),
        meta=json.loads((out / "leaderboard.meta.json").read_text()),
    )


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return tmp_path


def row_of(result, method, members):
    (row,) = [r for r in result.rows if (r["method"], r["members"]) == (method, members)]
    return row


def refused(error, *told, **options):
    with pytest.raises(error) as caught:
        compare(CompareOptions(**options), Console(quiet=True))
    message = str(caught.value)
    assert [piece for piece in told if piece not in message] == [], message


# ------------------------------------------------------------------------------- the leaderboard


def test_every_row_has_the_same_keys(result):
    assert all(row.keys() == KEYS for row in result.written)
    assert result.written == result.rows


def test_rows_are_sorted_by_accuracy(result):
    scores = [row["accuracy_mean"] for row in result.written]
    assert scores == sorted(scores, reverse=True)


def test_every_number_is_of_its_kind(result):
    for row in result.written:
        assert 0 <= row["accuracy_worst"] <= row["accuracy_mean"] <= 1
        assert 0 <= row["accuracy_std"] < 0.5
        assert row["families"] == FAMILIES
        assert row["members"] in SIZES
        assert row["seconds"] >= 0
        assert type(row["control"]) is bool
        ensemble = row["method"].endswith("ensemble")
        assert row["parameters"] == PARAMETERS * (row["members"] if ensemble else 1)


def test_every_method_appears_once_per_number_of_members(result):
    counts = Counter((row["method"], row["members"]) for row in result.written)
    assert set(counts.values()) == {1}


@pytest.mark.parametrize("members", SIZES)
def test_all_controls_are_there_with_what_they_used(result, members):
    for expected, control in ((CONTROLS, True), (METHODS, False)):
        for method, data in expected.items():
            row = row_of(result, method, members)
            assert row["control"] == control, method
            assert row["data"].partition(":")[0] == data, method


def test_data_say_how_many_images_were_used(result):
    for row in result.written:
        assert re.fullmatch(r"none|segments|(unlabelled|labelled):\d+", row["data"])
        if ":" in row["data"]:
            assert row["data"].endswith(f":{IMAGES}")


def test_rows_are_the_accuracies_of_the_merged_networks_on_test_images(result, zoo, merger):
    inputs, targets = split_of(zoo).images("test")
    calls = {
        "gnn": {"merger": merger},
        "average": {"method": "average", "align": None},
        "average, aligned": {"method": "average"},
    }
    for method, arguments in calls.items():
        fused = [merge(zoo.address("test", 3, f), **arguments).weights for f in range(FAMILIES)]
        scores = accuracy(predict(zoo.layout.program, stack(fused), inputs), targets).double()
        row = row_of(result, method, 3)
        assert row["accuracy_mean"] == pytest.approx(float(scores.mean()), abs=1e-6)
        assert row["accuracy_std"] == pytest.approx(float(scores.std(correction=1)), abs=1e-6)
        assert row["accuracy_worst"] == pytest.approx(float(scores.min()), abs=1e-6)


def test_the_best_member_is_chosen_without_test_images(result, zoo):
    split = split_of(zoo)
    families = zoo.families("test", 3)
    kept = [split.images(part) for part in ("objective", "validation")]
    inputs, targets = (torch.cat(pair) for pair in zip(*kept, strict=True))
    chosen = accuracy(family_logits(zoo.layout.program, families, inputs), targets).argmax(1)
    inputs, targets = split.images("test")
    scores = accuracy(family_logits(zoo.layout.program, families, inputs), targets)
    expected = float(scores[torch.arange(FAMILIES), chosen].mean())
    assert row_of(result, "best member", 3)["accuracy_mean"] == pytest.approx(expected, abs=1e-6)


def test_training_on_all_segments_is_above_every_member(result):
    for members in SIZES:
        ceiling = row_of(result, "trained on all segments (ceiling)", members)
        assert ceiling["accuracy_mean"] > row_of(result, "best member", members)["accuracy_mean"]


# ------------------------------------------------------------------------------- what lies beside


def test_the_meta_file_says_what_was_compared(result, zoo, merger):
    meta = result.meta
    assert meta["task"]["name"] == "digits"
    assert meta["zoo"]["digest"] == zoo.digest
    assert meta["images"] == {"segments": 948, "objective": 300, "validation": 100, "test": 449}
    assert meta["seeds"] == {"zoo": 0, "merger": 0, "compare": 0}
    assert meta["merger"]["card"] == read_card(merger)


def test_the_meta_file_holds_the_gates(result):
    assert result.meta["gates"].keys() == {f"k{members}" for members in SIZES}
    for gates in result.meta["gates"].values():
        assert len(gates) >= 6
        for gate in gates:
            assert {"name", "value", "limit", "passed"} <= gate.keys()
            assert gate["passed"] == (gate["value"] <= gate["limit"])


def test_differences_are_those_of_the_rows(result):
    for told in result.meta["differences"]:
        gnn = row_of(result, "gnn", told["members"])["accuracy_mean"]
        rival = row_of(result, told["against"], told["members"])["accuracy_mean"]
        assert told["difference"] == pytest.approx(gnn - rival, abs=2e-6)
        assert told["half_width"] >= 0


def test_nothing_but_the_leaderboard_is_written(result):
    names = {path.name for path in result.out.iterdir()}
    assert names == {"leaderboard.json", "leaderboard.meta.json", "leaderboard.png"}
    assert (result.out / "leaderboard.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_shows_every_method(result):
    for method in {row["method"] for row in result.rows}:
        assert method in result.table
    assert "all passed" in result.table or "FAILED" in result.table


# ------------------------------------------------------------------------------- MLflow


@pytest.fixture(scope="module")
def runs(result):
    from mlflow import MlflowClient

    client = MlflowClient(result.uri)
    experiments = [e.experiment_id for e in client.search_experiments() if e.name == "metamerge"]
    return client, client.search_runs(experiments)


def test_the_run_has_one_level_of_children(result, runs):
    _, found = runs
    (parent,) = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in found if run is not parent]
    assert parent.info.run_name == "compare digits"
    assert parent.data.params["merger"] == result.options.merger
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert {run.info.status for run in found} == {"FINISHED"}
    names = Counter(run.info.run_name for run in children)
    assert names == Counter(f"{row['method']} K={row['members']}" for row in result.rows)


def test_children_share_the_names_of_their_metrics(result, runs):
    _, found = runs
    children = {r.info.run_name: r for r in found if "mlflow.parentRunId" in r.data.tags}
    assert {frozenset(run.data.metrics) for run in children.values()} == {
        frozenset(KEYS - {"method", "members", "data", "control"})
    }
    for row in result.rows:
        run = children[f"{row['method']} K={row['members']}"]
        assert math.isclose(run.data.metrics["accuracy_mean"], row["accuracy_mean"])
        assert run.data.params["data"] == row["data"]


def test_the_parent_holds_the_mergers_figures_and_the_files(result, runs):
    client, found = runs
    (parent,) = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    told = {f"gnn_accuracy_k{k}": row_of(result, "gnn", k)["accuracy_mean"] for k in SIZES}
    assert told.items() <= parent.data.metrics.items()
    artifacts = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert artifacts >= {path.name for path in result.out.iterdir()}


# ------------------------------------------------------------------------------- again


def test_the_same_comparison_of_one_size_gives_the_same_rows(result, work, monkeypatch):
    """Without tracking nothing is tracked; only times differ."""
    monkeypatch.setattr(comparison, "_gates", lambda *_: [])
    options = CompareOptions(
        merger=result.options.merger, out="again", members=(3,), tracking=False
    )
    rows = compare(options, Console(quiet=True))
    assert sorted(path.name for path in work.iterdir()) == ["again"]

    def kept(found):
        return {r["method"]: {k: r[k] for k in KEYS - {"seconds"}} for r in found}

    assert kept(rows) == kept(row for row in result.rows if row["members"] == 3)


# ------------------------------------------------------------------------------- what is refused


def test_a_merger_that_is_not_there_is_refused(work):
    refused(ConfigError, "'nothing'", "accelerate launch trainers/merger.py", merger="nothing")
    assert list(work.iterdir()) == []


def test_a_folder_that_is_no_merger_is_refused(work):
    folder = save_checkpoint({"w": torch.zeros(2)}, work / "weights")
    refused(Unreadable, "weights", "no merger", merger=str(folder))
    assert [path.name for path in work.iterdir()] == ["weights"]


def test_a_zoo_that_is_not_there_is_refused(work, merger):
    refused(ZooError, "nowhere: no zoo here", "zoo.build", merger=merger, zoo="nowhere")
    assert list(work.iterdir()) == []


def test_a_zoo_with_other_test_images_than_the_mergers_is_refused(work, zoo, merger):
    other = build(replace(options_from(zoo.options), out=str(work / "other"), seed=1, epochs=0.1))
    told = ("seed", "test images", "trained on")
    refused(ConfigError, *told, merger=merger, zoo=str(other.folder), out="out")
    assert not (work / "out").exists()


def test_a_number_of_members_that_the_zoo_does_not_have_is_refused(work, merger):
    refused(ConfigError, "members", "(2, 3)", "[8]", merger=merger, members=(2, 8))
    assert list(work.iterdir()) == []


def test_a_merger_for_other_inputs_than_the_zoos_is_refused(work, zoo, merger):
    """Its probes are 4x4, the digits are 8x8."""
    other = GNNMerger(GNNConfig(input_shape=(1, 4, 4), probes=8, width=8))
    save_merger(other, work / "other", read_card(merger))
    told = ("(1, 8, 8)", "(1, 4, 4)", "train a merger")
    refused(IncompatibleWeights, *told, merger=str(work / "other"), out="out")
    assert not (work / "out").exists()


def test_the_command_ends_with_a_message_and_no_traceback(work, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare", "--merger", "nothing"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code not in (0, None)
    assert "nothing" in f"{caught.value.code}{capsys.readouterr().err}"
    monkeypatch.setattr(sys, "argv", ["compare", "--mergers", "nothing"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "Did you mean --merger?" in capsys.readouterr().err
