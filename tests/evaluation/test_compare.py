"""The comparison from end to end: rows, controls, gates, files and runs; and what it refuses."""

import json
import math
import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from rich.console import Console

from evaluation.compare import CompareOptions, compare, main
from evaluation.metrics import accuracy, family_logits
from evaluation.pictures import comparison_figures
from metamerge import merge
from metamerge.checkpoints import save_checkpoint
from metamerge.errors import ConfigError, Unreadable, ZooError
from metamerge.mergers import GNNConfig, GNNMerger, read_card, save_merger
from metamerge.weights import stack
from zoo.build import ZooOptions, build, options_from, split_of
from zoo.training import predict
from zoo.variants import Variants

KEYS = {
    *("method", "members", "data", "accuracy_mean", "accuracy_std", "accuracy_worst"),
    *("families", "seconds", "parameters", "control", "seeds", "accuracy_seed_std"),
}
COMPARED = {"against", "difference", "low", "high", "p"}
SIZES, FAMILIES, WIDTH = (2, 3), 4, 16
PARAMETERS = 64 * WIDTH + WIDTH + WIDTH * 10 + 10
IMAGES = 400  # objective and validation images together
BUDGETS = {"unlabelled": (100, IMAGES), "labelled": (60, IMAGES)}
PICTURES = {
    *("leaderboard", "cost", "accuracy_by_members", "interpolation", "barriers", "weight_plane"),
    *("variance", "reliability", "mixing"),
}
FILES = {
    *("leaderboard.json", "leaderboard.meta.json", "report.html", "report.md", "rows.jsonl"),
    *(f"{name}.png" for name in PICTURES),
}

CONTROLS = {
    "mean member": "none",
    "soft-vote ensemble": "none",
    "majority-vote ensemble": "none",
    "mean network of the training zoo": "none",
    "best network of the training zoo": "none",
    "best member": "labelled",
    "best member, fine-tuned": "labelled",
    "trained from scratch": "labelled",
    "distilled from best member": "unlabelled",
    "distilled from aligned average": "unlabelled",
    "trained on all segments (ceiling)": "segments",
}
METHODS = {
    "gnn": "none",
    "gnn, no prior": "none",
    "gnn, calibrated": "unlabelled",
    "gnn, adapted": "labelled",
    "gnn, then fine-tuned": "labelled",
    "average": "none",
    "average, aligned": "none",
    "average, aligned + repair": "unlabelled",
    "average, aligned + refit": "unlabelled",
    "rank average, aligned": "labelled",
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
def relabelled(place, zoo):
    """Families that call the classes by numbers of their own."""
    own = {
        "out": str(place / "relabelled"),
        "relabel": True,
        "members": (2,),
        "train_families": 3,
        "epochs": 40.0,
    }
    return build(replace(options_from(zoo.options), **own))


def made_merger(folder, zoo, **config):
    """A merger with an input prior, which nobody has trained, and the card of one that was."""
    shape = tuple(zoo.layout.program.input_shape()[1:])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        merger = GNNMerger(GNNConfig(**{"shapes": (shape,), "probes": 16, "width": 8, **config}))
        with torch.no_grad():
            merger.prior.normal_(std=0.1)
    told = {"digest": zoo.digest, "options": zoo.options, "task": zoo.manifest["task"]}
    save_merger(merger, folder, {"options": {"seed": 0}, "zoos": [told]})
    return str(folder)


@pytest.fixture(scope="module")
def merger(place, zoo):
    return made_merger(place / "merger", zoo)


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
    options = CompareOptions(
        merger=(merger,), out=str(place / "out"), unlabelled=(100,), labelled=(60,)
    )
    console = Console(width=160, record=True, quiet=False, file=(place / "table.txt").open("w"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        draw = Mock(wraps=comparison_figures)
        patch.setattr("evaluation.showing.comparison_figures", draw)
        found = compare(options, console)
    out = place / "out"
    return SimpleNamespace(
        scored=found.scored,
        rows=[one.row() for one in found.scored],
        drawn=draw.call_args.args[0],
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


def row_of(result, method, members, data=None):
    found = [
        r
        for r in result.rows
        if (r["method"], r["members"]) == (method, members) and data in (None, r["data"])
    ]
    assert len(found) == 1 or data is None, (method, data, found)
    return found[0]


def quick(**options):
    """A comparison without images, controls and tracking."""
    plain = {"unlabelled": (0,), "labelled": (0,), "full": False, "controls": False}
    given = CompareOptions(**{**plain, "pictures": False, "tracking": False, **options})
    return compare(given, Console(quiet=True))


def refused(error, *told, **options):
    with pytest.raises(error) as caught:
        quick(**options)
    message = str(caught.value)
    assert [piece for piece in told if piece not in message] == [], message


# ------------------------------------------------------------------------------- the leaderboard


def test_every_row_has_the_same_keys(result):
    assert all(row.keys() == KEYS | COMPARED for row in result.written)
    assert [{k: row[k] for k in KEYS} for row in result.written] == result.rows


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


@pytest.mark.parametrize("members", SIZES)
def test_every_row_is_there_once_at_every_budget(result, members):
    expected = Counter()
    clusters = {"cluster, all": "none", "cluster, best": "labelled"} if members > 2 else {}
    for method, data in {**CONTROLS, **METHODS, **clusters}.items():
        for count in BUDGETS.get(data, ("",)):
            expected[method, f"{data}:{count}" if count else data, method in CONTROLS] += 1
    found = [r for r in result.rows if r["members"] == members]
    assert Counter((r["method"], r["data"], r["control"]) for r in found) == expected


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
    row = row_of(result, "best member", 3, f"labelled:{IMAGES}")
    expected = float(scores[torch.arange(FAMILIES), chosen].mean())
    assert row["accuracy_mean"] == pytest.approx(expected, abs=1e-6)
    mean = row_of(result, "mean member", 3)["accuracy_mean"]
    assert mean == pytest.approx(float(scores.mean()), abs=1e-6)


def test_training_on_all_segments_is_above_every_member(result):
    for members in SIZES:
        ceiling = row_of(result, "trained on all segments (ceiling)", members)
        best = row_of(result, "best member", members, f"labelled:{IMAGES}")
        assert ceiling["accuracy_mean"] > best["accuracy_mean"]


# ------------------------------------------------------------------------------- what lies beside


def test_the_meta_file_says_what_was_compared(result, zoo, merger):
    meta = result.meta
    assert meta["task"]["name"] == "digits"
    assert meta["zoo"]["digest"] == zoo.digest
    assert meta["images"] == {"segments": 948, "objective": 300, "validation": 100, "test": 449}
    assert meta["seeds"] == {"zoo": 0, "merger": {"gnn": 0}, "compare": [0]}
    assert meta["command"].startswith("python -m evaluation.compare --merger ")
    told = meta["mergers"]["gnn"]
    assert (told["folder"], told["kind"], told["foreign"]) == (merger, "gnn", False)
    assert told["card"] == read_card(merger)


def test_the_meta_file_holds_the_gates_and_how_near_training_networks_are(result):
    told = result.meta["mergers"]["gnn"]
    for name in ("gates", "forgotten_class_recall", "nearest_training"):
        assert told[name].keys() == {f"k{members}" for members in SIZES}
    for gates in told["gates"].values():
        names = [gate["name"] for gate in gates]
        assert names[-2:] == ["poisoned_member", "training_copies"]
        assert len(set(names)) == len(names) == 9
        for gate in gates:
            assert gate["passed"] == (gate["value"] <= gate["limit"])
    for distances in told["nearest_training"].values():
        assert 0.05 < distances["nearest"] <= distances["mean"]


def test_every_row_is_held_against_the_merger_on_the_same_families(result):
    own = {(one.method, one.members, one.data): one for one in result.scored}
    for row in result.written:
        assert row["against"] == "gnn"
        mine = own[row["method"], row["members"], row["data"]]
        gaps = mine.accuracies - own["gnn", row["members"], "none"].accuracies
        assert row["difference"] == pytest.approx(float(gaps.mean()), abs=2e-6)
        assert row["low"] <= row["difference"] + 1e-6
        assert row["difference"] - 1e-6 <= row["high"]
        reference = (row["method"], row["data"]) == ("gnn", "none")
        assert (row["p"] is None) == reference


def test_pictures_show_the_rows_of_the_leaderboard_and_know_their_reference(result):
    assert result.drawn == result.written
    assert {row["against"] for row in result.drawn} <= {row["method"] for row in result.drawn}


def test_nothing_but_the_leaderboard_its_rows_pages_and_pictures_is_written(result):
    assert {path.name for path in result.out.iterdir()} == FILES
    assert (result.out / "leaderboard.png").read_bytes().startswith(b"\x89PNG")


def test_both_pages_hold_every_row_and_picture(result):
    html, markdown = ((result.out / f"report.{kind}").read_text() for kind in ("html", "md"))
    for row in result.rows:
        assert f"<td>{row['method']}</td><td>{row['data']}</td>" in html
        assert f"{row['method']}" in markdown
    assert html.count('<img src="data:image/svg+xml;base64,') == len(PICTURES)
    assert all(f"]({name}.png)" in markdown for name in PICTURES)
    assert result.meta["command"] in markdown


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


def run_name(row):
    return f"{row['method']} K={row['members']}, {row['data']}"


def test_the_run_has_one_level_of_children(result, runs):
    _, found = runs
    (parent,) = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in found if run is not parent]
    assert parent.info.run_name == "compare digits"
    assert result.options.merger[0] in parent.data.params["merger"]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert {run.info.status for run in found} == {"FINISHED"}
    names = Counter(run.info.run_name for run in children)
    assert names == Counter(map(run_name, result.rows))


def test_children_share_the_names_of_their_metrics(result, runs):
    _, found = runs
    children = {r.info.run_name: r for r in found if "mlflow.parentRunId" in r.data.tags}
    assert {frozenset(run.data.metrics) for run in children.values()} == {
        frozenset(KEYS - {"method", "members", "data", "control"})
    }
    for row in result.rows:
        run = children[run_name(row)]
        assert math.isclose(run.data.metrics["accuracy_mean"], row["accuracy_mean"])
        assert run.data.params["data"] == row["data"]


def test_the_parent_holds_the_mergers_figures_and_the_files(result, runs):
    client, found = runs
    (parent,) = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    told = {f"gnn_accuracy_k{k}": row_of(result, "gnn", k)["accuracy_mean"] for k in SIZES}
    assert told.items() <= parent.data.metrics.items()
    artifacts = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert artifacts >= FILES - {"rows.jsonl"}


def test_what_a_merger_makes_of_a_family_is_kept_as_a_model(result, runs, zoo, monkeypatch):
    _, found = runs
    (parent,) = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", result.uri)
    kept = merge([f"runs:/{parent.info.run_id}/fused-gnn"], method="average").weights
    family = f"{zoo.folder}#test-k{max(SIZES)}/0"
    again = merge(family, merger=result.options.merger[0], device="cpu").weights
    assert kept.keys() == again.keys()
    for key, tensor in again.items():
        torch.testing.assert_close(kept[key], tensor)


# ------------------------------------------------------------------------------- again


def test_the_same_comparison_of_one_size_gives_the_same_rows(result, work):
    """Without tracking nothing is tracked; only times differ."""
    options = replace(result.options, out="again", members=(3,), tracking=False, pictures=False)
    rows = [one.row() for one in compare(options, Console(quiet=True)).scored]
    assert sorted(path.name for path in work.iterdir()) == ["again"]

    def kept(found):
        return {(r["method"], r["data"]): {k: r[k] for k in KEYS - {"seconds"}} for r in found}

    assert kept(rows) == kept(row for row in result.rows if row["members"] == 3)


def test_finished_rows_are_not_made_again(result, monkeypatch):
    for name in ("timed", "voted", "merge"):
        monkeypatch.setattr(f"evaluation.bench.Bench.{name}", lambda *_, **__: 1 / 0)
    monkeypatch.setattr("evaluation.making.examine", lambda *_: 1 / 0)
    own = replace(result.options, tracking=False, pictures=False)
    found = compare(own, Console(quiet=True))
    assert [one.row() for one in found.scored] == result.rows
    assert found.meta["mergers"]["gnn"]["gates"] == result.meta["mergers"]["gnn"]["gates"]


def test_another_merger_in_the_same_folder_is_judged_anew(work, zoo):
    scores = []
    for prior in (5, 3):
        folder = made_merger(work / "merger", zoo, prior=prior)
        found = quick(merger=(folder,), members=(2,), out="out").scored
        scores.append({s.method: (s.accuracies.tolist(), s.seconds) for s in found})
    assert scores[0]["average"] == scores[1]["average"]  # kept, down to its seconds
    assert scores[0]["gnn"][1] != scores[1]["gnn"][1]


# ------------------------------------------------------------------------------- many mergers


def test_several_mergers_are_named_by_their_folders_and_families_can_be_few(work, zoo, merger):
    other = made_merger(work / "other", zoo, prior=3)
    found = quick(merger=(merger, other), members=(2,), families=3, out="out")
    assert {"merger", "other"} <= {s.method for s in found.scored}
    assert list(found.meta["mergers"]) == ["merger", "other"]
    assert {len(s.accuracies) for s in found.scored} == {3}
    assert found.meta["reference"] == "merger"


def test_a_merger_of_another_task_is_called_foreign(work, zoo, merger):
    card = read_card(merger)
    (told,) = card["zoos"]
    elsewhere = {**told, "digest": "0" * 16, "task": {**told["task"], "digest": "another"}}
    elsewhere["options"] = {**told["options"], "task": "elsewhere", "seed": 5, "objective": 77}
    network = GNNMerger(GNNConfig(shapes=((1, 8, 8),), probes=16, width=8))
    save_merger(network, work / "foreign", {**card, "zoos": [elsewhere]})
    found = quick(merger=("foreign",), zoo=str(zoo.folder), members=(2,), out="out")
    told = found.meta["mergers"]["gnn"]
    assert told["foreign"] is True
    assert told["nearest_training"] == {"k2": None}
    assert "training_copies" not in {gate["name"] for gate in told["gates"]["k2"]}


# ------------------------------------------------------------------------------- renamed classes


@pytest.fixture(scope="module")
def renamed_result(place, relabelled):
    folder = made_merger(place / "of relabelled", relabelled)
    options = CompareOptions(
        merger=(folder,),
        out=str(place / "renamed"),
        unlabelled=(100,),
        labelled=(60,),
        full=False,
        tracking=False,
        pictures=False,
    )
    found = compare(options, Console(quiet=True))
    return {(one.method, one.data): one.accuracies for one in found.scored}, found.meta


def test_families_are_judged_by_their_own_numbers_of_classes(renamed_result, relabelled):
    scores, _ = renamed_result
    inputs, targets = split_of(relabelled).images("test")
    classes = Variants.from_records(relabelled.records("test", 2)).classes
    for method, align in (("average", None), ("average, aligned", "weight_matching")):
        addresses = [relabelled.address("test", 2, f) for f in range(FAMILIES)]
        fused = stack([merge(a, method="average", align=align).weights for a in addresses])
        logits = predict(relabelled.layout.program, fused, inputs)
        assert torch.equal(scores[method, "none"], accuracy(logits, classes[:, targets]))
    logits = family_logits(relabelled.layout.program, relabelled.families("test", 2), inputs)
    expected = accuracy(logits, classes[:, targets][:, None]).mean(1)
    assert torch.allclose(scores["mean member", "none"], expected, atol=1e-6)
    assert float(accuracy(logits, targets).mean()) < 0.25  # by the task's numbers they know little


def test_controls_and_methods_learn_from_the_labels_of_renamed_families(renamed_result):
    scores = {row: float(found.mean()) for row, found in renamed_result[0].items()}
    members = scores["mean member", "none"]
    assert members > 0.4
    assert scores["best member", "labelled:60"] >= members - 0.02
    assert scores["best member, fine-tuned", "labelled:60"] > members
    assert scores["trained on all segments (ceiling)", "segments"] > members
    assert scores["distilled from best member", "unlabelled:100"] > members - 0.05
    assert scores["gnn, then fine-tuned", "labelled:60"] > 0.4
    assert scores["gnn, adapted", "labelled:60"] >= scores["gnn", "none"] - 0.1


def test_null_mergers_do_not_know_what_a_family_calls_the_classes(renamed_result):
    scores, meta = renamed_result
    for which in ("mean", "best"):
        assert float(scores[f"{which} network of the training zoo", "none"].mean()) < 0.3
    gates = {gate["name"]: gate for gate in meta["mergers"]["gnn"]["gates"]["k2"]}
    assert gates["label_permutation"]["passed"]
    assert gates["identical_members"]["passed"]


def test_null_mergers_know_a_task_whose_classes_keep_their_numbers(result):
    best = row_of(result, "best network of the training zoo", 3)["accuracy_mean"]
    assert best > row_of(result, "mean member", 3)["accuracy_mean"]


# ------------------------------------------------------------------------------- what is refused


def test_a_merger_that_is_not_there_is_refused(work):
    refused(ConfigError, "'nothing'", "accelerate launch trainers/merger.py", merger=("nothing",))
    assert list(work.iterdir()) == []


def test_a_folder_that_is_no_merger_is_refused(work):
    folder = save_checkpoint({"w": torch.zeros(2)}, work / "weights")
    refused(Unreadable, "weights", "no merger", merger=(str(folder),))
    assert [path.name for path in work.iterdir()] == ["weights"]


def test_a_zoo_that_is_not_there_is_refused(work, merger):
    refused(ZooError, "nowhere: no zoo here", "zoo.build", merger=(merger,), zoo="nowhere")
    assert list(work.iterdir()) == []


def test_a_zoo_with_other_test_images_than_the_mergers_is_refused(work, zoo, merger):
    other = build(replace(options_from(zoo.options), out=str(work / "other"), seed=1, epochs=0.1))
    told = ("seed", "test images", "trained on")
    refused(ConfigError, *told, merger=(merger,), zoo=str(other.folder), out="out")
    assert not (work / "out").exists()


def test_a_number_of_members_that_the_zoo_does_not_have_is_refused(work, merger):
    refused(ConfigError, "members", "(2, 3)", "[8]", merger=(merger,), members=(2, 8))
    assert list(work.iterdir()) == []


def test_mergers_of_several_zoos_want_to_know_where_they_are_judged(work, zoo, merger):
    card = read_card(merger)
    both = [*card["zoos"], {**card["zoos"][0], "digest": "another"}]
    network = GNNMerger(GNNConfig(shapes=((1, 8, 8),), probes=16, width=8))
    save_merger(network, work / "both", {**card, "zoos": both})
    refused(ConfigError, "2 zoos", "--zoo", merger=("both",))


def test_a_zoo_whose_families_see_other_images_is_refused(work, zoo, merger):
    own = {"out": str(work / "other"), "flip_families": True, "epochs": 0.1, "test_families": 1}
    other = build(replace(options_from(zoo.options), **own))
    told = ("flip_families", "whatever these call the classes")
    refused(ConfigError, *told, merger=(merger,), zoo=str(other.folder), out="out")


@pytest.mark.parametrize("name", ["labelled", "unlabelled"])
def test_one_image_is_no_budget(name):
    with pytest.raises(ConfigError, match=f"{name}: expected 0 or at least 2"):
        CompareOptions(**{name: (1,)})


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


def test_labelled_images_choose_a_member_where_nothing_is_adapted(work, result):
    told = {"merger": result.options.merger, "labelled": (20,), "members": SIZES[:1]}
    rows = {(one.method, one.data) for one in quick(**told, adapt=False).scored}
    assert ("best member", "labelled:20") in rows
    assert "gnn, adapted" not in {method for method, _ in rows}
    assert rows < {(one.method, one.data) for one in quick(**told).scored}
