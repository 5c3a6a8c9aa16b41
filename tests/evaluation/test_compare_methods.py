"""Rows by name, common bases, seeds and failures; and processes that share the rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from rich.console import Console

from evaluation.bench import Bench
from evaluation.compare import CompareOptions, compare, main
from evaluation.competitors import ALL, chosen_entries
from evaluation.judged import zoo_families
from evaluation.methods import entries as entries_module
from evaluation.methods.entries import Entry, parse_entry
from evaluation.methods.ledger import Ledger, gathered
from evaluation.metrics import common_task
from evaluation.processes import share
from metamerge import merge, registry
from metamerge.errors import ConfigError, MetaMergeError
from metamerge.mergers import GNNConfig, GNNMerger, save_merger
from metamerge.registry import get_method, list_methods, merge_method
from metamerge.weights import stack, unstack
from zoo.build import ZooOptions, build
from zoo.training import predict

CHECKOUT = Path(__file__).resolve().parents[2]
QUICK = {
    **{"unlabelled": (30,), "labelled": (30,), "full": False, "controls": False},
    "pictures": False,
}
KEPT = ("method", "members", "data", "accuracy_mean", "accuracy_std", "difference", "p")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("methods")


@pytest.fixture(scope="module")
def zoo(place):
    """Three families of three fine-tunes of a common base each."""
    own = {"widths": (8,), "segment_size": 60, "members": (3,), "epochs": 8.0}
    own |= {"init": "shared", "shared_steps": 20, "snapshots": 1}
    own |= {"train_families": 2, "validation_families": 1, "test_families": 3}
    return build(ZooOptions(out=str(place / "zoo"), **own))


@pytest.fixture(scope="module")
def merger(place, zoo):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = GNNMerger(GNNConfig(shapes=((1, 8, 8),), probes=8, width=4))
    told = {"digest": zoo.digest, "options": zoo.options, "task": zoo.manifest["task"]}
    save_merger(network, place / "merger", {"options": {"seed": 0}, "zoos": [told]})
    return str(place / "merger")


@pytest.fixture(scope="module")
def bench(zoo):
    return Bench(zoo_families(zoo, common_task(zoo), 3), 0)


def run(zoo, merger, out, **options):
    given = CompareOptions(merger=(merger,), out=str(out), tracking=False, **{**QUICK, **options})
    return compare(given, Console(quiet=True))


# ------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("average", Entry("average")),
        ("none+average", Entry("average", None)),
        ("none + average + refit", Entry("average", None, ("refit",))),
        ("canonical > weight_matching > ties", Entry("ties", ("canonical", "weight_matching"))),
        ("average+repair+refit", Entry("average", "default", ("repair", "refit"))),
        ("weighted_average", Entry("weighted_average", options={"coefficients": [2.0, 1.0, 1.0]})),
    ],
)
def test_names_say_how_to_merge(name, entry):
    assert parse_entry(name, 3) == entry


def test_labels_of_the_table_are_names():
    entry = Entry("average", ("canonical", "weight_matching"), ("repair",))
    assert parse_entry(entry.label, 3) == entry


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("averge", "averge"),
        ("canonical+averge", "averge"),
        ("average+ties", "names 2 merge methods"),
        ("cannonical+average", "cannonical"),
        ("average+refitt", "refitt"),
    ],
)
def test_names_that_are_not_known_are_refused(name, told):
    with pytest.raises(ConfigError, match=told):
        parse_entry(name, 3)


def test_all_takes_every_method_that_fits_a_common_base(bench):
    found = {entry.method for entry in chosen_entries(bench, [ALL], ["gnn"])}
    fit = {
        record.name
        for record in map(get_method, list_methods())
        if "merger" not in record.resources
        and (record.most or 3) >= 3
        and ("base" in record.resources or not record.align)
    }
    assert fit <= found
    assert "ties" in found


def test_learned_methods_want_their_merger(bench):
    assert chosen_entries(bench, ["gnn"], ["gnn"]) == []
    with pytest.raises(ConfigError, match="autoencoder is learned; name one with --merger"):
        chosen_entries(bench, ["autoencoder"], ["gnn"])


# ------------------------------------------------------------------------------- rows


@pytest.fixture(scope="module")
def result(zoo, merger, place):
    return run(
        zoo,
        merger,
        place / "out",
        methods=("ties", "dare", "regression_mean", "greedy_soup"),
        seeds=(0, 1),
        reference="average, aligned",
    )


def rows_of(result):
    return {(one.method, one.data): one for one in result.scored}


def test_methods_are_rows_at_every_budget_that_they_can_use(result):
    rows = rows_of(result)
    assert ("ties", "none") in rows
    assert ("weight_matching > regression_mean", "unlabelled:30") in rows
    assert ("weight_matching > greedy_soup", "labelled:30") in rows
    assert ("weight_matching > greedy_soup", "none") not in rows
    assert {("average", "none"), ("average, aligned + refit", "unlabelled:30")} <= rows.keys()
    assert "cluster, all" not in {method for method, _ in rows}  # nobody named it
    assert result.meta["failed"] == []


def test_methods_that_read_changes_get_the_base_that_members_left(result, zoo, bench):
    fused = []
    for family, members in enumerate(unstack(bench.judged.families)):
        base = {key: tensor[family] for key, tensor in bench.judged.bases.items()}
        fused.append(merge(unstack(members), method="ties", base=base).weights)
    inputs, targets = bench.judged.split.images("test")
    said = predict(bench.layout.program, stack(fused), inputs).argmax(-1)
    expected = (said == targets).float().mean(-1)
    assert torch.equal(rows_of(result)["ties", "none"].accuracies, expected)


def test_what_is_random_is_repeated_with_every_seed_and_nothing_else(result):
    repeated = {row: len(one.by_seed) for row, one in rows_of(result).items()}
    assert repeated["dare", "none"] == 2
    assert repeated["best member", "labelled:30"] == 2
    assert repeated["ties", "none"] == 0
    assert repeated["soft-vote ensemble", "none"] == 0


def test_every_row_says_against_what_it_is_held(place):
    rows = json.loads((place / "out" / "leaderboard.json").read_text())
    assert {row["against"] for row in rows} == {"average, aligned"}


def test_a_reference_that_is_no_row_is_refused_before_anything_is_made(zoo, merger, tmp_path):
    with pytest.raises(ConfigError, match="no row 'tie' at K=3"):
        run(zoo, merger, tmp_path / "out", reference="tie")
    assert not (tmp_path / "out").exists()


def test_methods_for_a_base_are_refused_where_there_is_none(bench):
    class Bare:
        judged = type("Judged", (), {"bases": None})
        members = 3

    with pytest.raises(ConfigError, match=r"methods: ties reads members as changes.*--base"):
        chosen_entries(Bare, ["ties"], [])


def test_a_method_that_fails_is_told_and_the_others_are_compared(zoo, merger, tmp_path):
    try:

        @merge_method(align=None)
        def broken(weights):
            "Fail."
            raise MetaMergeError("no luck")

        found = run(zoo, merger, tmp_path / "out", methods=("broken", "karcher_mean"))
    finally:
        registry._METHODS.records.pop("broken", None)
    (failed,) = found.meta["failed"]
    assert failed["method"] == "broken"
    assert "no luck" in failed["error"]
    assert ("weight_matching > karcher_mean", "none") in rows_of(found)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "no luck" in page


def test_images_that_make_no_difference_make_no_row(zoo, merger, tmp_path, monkeypatch):
    monkeypatch.setattr(entries_module.Entry, "possible", lambda self, data: True)
    found = run(zoo, merger, tmp_path / "out", methods=("karcher_mean",))
    data = [one.data for one in found.scored if "karcher" in one.method]
    assert data == ["none"]


# ------------------------------------------------------------------------------- processes


def test_pieces_are_dealt_out_and_none_twice():
    class State(PartialState):
        def __init__(self, index):
            self.__dict__ = {"process_index": index, "num_processes": 3}

    shares = [share(range(8), State(index)) for index in range(3)]
    assert sorted(piece for own in shares for piece in own) == list(range(8))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_what_processes_wrote_is_gathered_and_survives_a_cut_line(tmp_path):
    path, parts = tmp_path / "rows.jsonl", [tmp_path / f"rows.{rank}.jsonl" for rank in (0, 1)]
    Ledger(path, {}).add("old", {"x": 0})
    for rank, part in enumerate(parts):
        Ledger(path, {}, into=part).add(f"of {rank}", {"x": rank})
    with parts[0].open("a") as file:
        file.write('{"key": "cut')
    gathered(path, [*parts, tmp_path / "rows.2.jsonl"])
    assert Ledger(path, {}).rows == {"old": {"x": 0}, "of 0": {"x": 0}, "of 1": {"x": 1}}
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def launched(code, *arguments, place):
    """Two CPU processes that run some code before the comparison's own entry point."""
    script = place / "script.py"
    script.write_text(f"{code}\nfrom evaluation.compare import main\nmain()\n")
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file"]
    command += [str(CHECKOUT / "accelerate_config.yaml"), "--multi_gpu", "--num_processes", "2"]
    command += ["--main_process_port", "0", str(script), *arguments]
    own = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=place, env={**os.environ, **own}
    )


ARGUMENTS = (
    *("--methods", "ties", "dare", "regression_mean", "greedy_soup", "--seeds", "0", "1"),
    *("--reference", "average, aligned", "--unlabelled", "30", "--labelled", "30", "--no-full"),
    *("--no-controls", "--no-tracking", "--no-pictures"),
)


def test_two_processes_leave_the_table_of_one(result, place, merger, on_two_processes, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["compare", "--merger", merger, *ARGUMENTS, "--out", "two"])
    said = on_two_processes(main)
    one, two = (
        json.loads((place / name / "leaderboard.json").read_text()) for name in ("out", "two")
    )
    assert [[row[key] for key in KEPT] for row in two] == [
        [row[key] for key in KEPT] for row in one
    ]
    assert said.count("test accuracy in %") == 1  # one of the two speaks
    assert sorted(path.name for path in (place / "two").glob("rows*")) == ["rows.jsonl"]


def test_a_process_that_raises_ends_all_of_them(place, merger):
    code = """
import os
from evaluation import making
if os.environ["RANK"] == "1":
    making.share = lambda pieces, state: 1 / 0
"""
    done = launched(code, "--merger", merger, *ARGUMENTS, "--out", "three", place=place)
    assert done.returncode != 0
    assert "ZeroDivisionError" in done.stderr
    assert not (place / "three" / "leaderboard.json").exists()
