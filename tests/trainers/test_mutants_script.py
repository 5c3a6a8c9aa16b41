"""Mutants as users make them: a run, a kill, and two processes that go on."""

import json
import sys
from pathlib import Path

import pytest

from trainers.mutants import MutantOptions, main
from zoo.build import ZooOptions, build

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "trainers" / "mutants.py")
SMALL = (
    *("--images", "60", "--epochs", "2", "--wide-epochs", "2", "--scratch-epochs", "2"),
    *("--rates", "0.003", "--rounds", "2", "--no-controls"),
)
ROWS = 17

pytestmark = pytest.mark.xdist_group("mutants_script")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("mutants")


@pytest.fixture(scope="module")
def zoo(place):
    return build(
        ZooOptions(
            out=str(place / "zoo"),
            widths=(8,),
            segment_size=150,
            members=(3,),
            train_families=1,
            validation_families=0,
            test_families=2,
            epochs=5.0,
        )
    )


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [SCRIPT, *arguments])
    main()


def scores(folder):
    rows = json.loads((folder / "leaderboard.json").read_text())
    return {(row["method"], row["data"]): row["accuracy_mean"] for row in rows}


@pytest.fixture(scope="module")
def whole(place, zoo):
    """A run that nothing interrupts, tracked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place}/mlflow.db")
        patch.chdir(place)
        command(patch, "--zoo", str(zoo.folder), "--out", str(place / "whole"), *SMALL)
    return place / "whole"


def test_a_run_leaves_a_table_a_picture_and_a_run_per_row(whole, place):
    assert len(scores(whole)) == ROWS
    meta = json.loads((whole / "leaderboard.meta.json").read_text())
    assert meta["gap"] < 1e-5
    assert meta["options"]["images"] == 60
    assert (whole / "leaderboard.png").stat().st_size > 10_000
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{place}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "metamerge"]
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == ROWS + 1
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_two_processes_go_on_where_a_kill_left_off_with_the_same_result(
    whole, zoo, place, killed_when, on_two_processes, monkeypatch
):
    arguments = ("--zoo", str(zoo.folder), "--out", str(place / "killed"), *SMALL, "--no-tracking")
    arguments = (*arguments, "--rows", "mutant", "joined")
    ledger = place / "killed" / "families" / "0.jsonl"

    def holds():
        return ledger.exists() and len(ledger.read_text().splitlines()) >= 4

    alone = {"launcher": None, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    killed_when(holds, place, *arguments, **alone)
    kept = ledger.read_text()
    assert not (place / "killed" / "leaderboard.json").exists()
    said = on_two_processes(lambda: command(monkeypatch, *arguments))
    assert said.count("leaderboard.json") == 1  # one of the two speaks
    lines = kept.splitlines()[:4]
    assert ledger.read_text().splitlines()[:4] == lines  # finished rows were not made again
    found, expected = scores(place / "killed"), scores(whole)
    named = {row for row in expected if "mutant" in row[0] or "joined" in row[0]}
    assert len(named) == 11
    assert found == {row: expected[row] for row in named}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--image", "3"], "Did you mean --images?"),
        (["--images", "1"], "images: expected at least 2, got 1"),
        (["--rounds", "0"], "rounds: expected at least 1, got 0"),
        (["--epochs", "0"], "epochs: expected more than 0, got 0"),
        (["--rates", "0"], "expected learning rates above 0"),
        (["--members", "-1"], "members: expected at least 0, got -1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_make_no_sense_end_with_code_2(monkeypatch, capsys, arguments, told):
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, *arguments)
    assert caught.value.code == 2
    assert told in capsys.readouterr().err


def test_families_of_a_size_that_the_zoo_lacks_are_refused(monkeypatch, capsys, zoo):
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, "--zoo", str(zoo.folder), "--members", "5", "--no-tracking")
    assert caught.value.code == 2
    assert "has families of (3,), got 5" in capsys.readouterr().err


def test_rows_that_there_are_not_are_refused(monkeypatch, capsys, zoo, tmp_path):
    arguments = ("--zoo", str(zoo.folder), "--out", str(tmp_path), *SMALL, "--no-tracking")
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, *arguments, "--rows", "mutent")
    assert caught.value.code == 2
    assert "rows: none has ('mutent',) in its name" in capsys.readouterr().err


def test_the_schedule_is_that_of_the_options():
    schedule = MutantOptions(epochs=3.0, rounds=2).schedule()
    assert (schedule.epochs, schedule.rounds, schedule.rates) == (3.0, 2, (1e-3, 3e-3))
