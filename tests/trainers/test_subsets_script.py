"""Training of subsets as users start it: tables, a kill, two processes that go on, refusals."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from trainers.subset_runs import HALVES, TIMED, Piece
from trainers.subsets import SubsetOptions, stages

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "trainers" / "subsets.py")
MASKS = ("first", "weak", "unsalient-weights~4")
SMALL = (
    *("--widths", "2", "3", "--steps", "16", "--every", "4", "--seeds", "2", "--together", "1"),
    *("--repeats", "1", "--probes", "1", "--curved", "16", "--timed-steps", "20"),
    *("--masks", *MASKS, "--images", "300"),
)
PIECES = 2 * (2 * (1 + len(MASKS)) + 2)  # seeds; starts, full and masks; halves

pytestmark = [pytest.mark.xdist_group("subsets_script"), pytest.mark.usefixtures("one_thread")]


def table(folder):
    return json.loads((folder / "table.json").read_text())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("subsets")


@pytest.fixture(scope="module")
def whole(command, place):
    """A run that nothing interrupts, tracked."""
    with pytest.MonkeyPatch.context() as patch:
        assert command(patch, place, "--out", "whole", *SMALL) == 0
    return place / "whole"


def test_a_run_leaves_tables_pictures_and_a_run_per_mask(whole, place):
    told = table(whole)
    names = [(entry["start"], entry["mask"]) for entry in told["summary"]]
    own = ["full", *MASKS]
    assert names == [
        *(("init", mask) for mask in (*own, HALVES, TIMED)),
        *(("converged", mask) for mask in own),
    ]
    assert {entry["seeds"] for entry in told["summary"]} == {2}
    assert all(0 < entry["test"] < 1 for entry in told["summary"])
    for name in ("init-steps", "init-seconds", "converged-steps"):
        assert (whole / f"{name}.png").stat().st_size > 10_000
    assert "| `weak` |" in (whole / "table.md").read_text()
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{place}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "metamerge"]
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 1 + len(names)
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_curves_belong_together(whole):
    """The whole training moves as itself; masks begin where it begins, and see the same images."""
    rows = {(row["start"], row["mask"]): row for row in table(whole)["rows"]}
    full, first = rows["init", "full"], rows["init", "first"]
    assert full["steps"] == [0, 1, 2, 4, 8, 12, 16]
    assert [own[0] for own in first["curves"]["train"]] == [o[0] for o in full["curves"]["train"]]
    for network in range(2):
        same, whole_way = (row["curves"] for row in (first, full))
        assert same["same"][network][-1] < whole_way["displacement"][network][-1]
        assert same["displacement"][network][0] == same["same"][network][0] == 0
    assert first["live"] < first["weights"]
    assert rows["init", HALVES]["steps"][-1] == 16
    assert rows["init", TIMED]["steps"][-1] == 20


def test_trainings_go_on_from_where_the_whole_one_ended(whole):
    rows = {(row["start"], row["mask"]): row for row in table(whole)["rows"]}
    before = [own[-1] for own in rows["init", "full"]["curves"]["validation"]]
    for mask in ("full", *MASKS):
        after = [own[0] for own in rows["converged", mask]["curves"]["validation"]]
        assert after == pytest.approx(before, rel=1e-6)
        assert min(rows["converged", mask]["barrier"]) >= 0


@pytest.fixture(scope="module")
def killed(place, killed_when):
    """What a run leaves that is killed after some rows; the next one is half written."""
    ledger = place / "killed.state" / "rows.jsonl"

    def holds():
        return ledger.exists() and ledger.read_text().count("\n") >= 5

    killed_when(holds, place, "--out", "killed", *SMALL, "--no-tracking")
    assert not (place / "killed").exists()
    rows = [row for row in ledger.read_text().splitlines() if row.endswith("}")]
    assert len(rows) <= PIECES  # it was not finished
    ledger.write_text("\n".join([*rows[:4], rows[4][:30]]))
    return ledger


def test_two_processes_go_on_where_a_kill_left_off_with_the_same_result(
    whole, killed, place, on_two_processes, command, monkeypatch
):
    kept = killed.read_text().splitlines()
    arguments = ("--out", "killed", *SMALL, "--no-tracking")
    said = on_two_processes(lambda: command(monkeypatch, place, *arguments))
    assert said.count("killed/table.json") == 1  # one of the two speaks
    found = killed.read_text().splitlines()
    assert found[:4] == kept[:4]  # finished rows were not made again
    keys = [json.loads(line)["key"] for line in found if line.endswith("}")]
    assert len(keys) == len(set(keys)) == PIECES + 1  # and the seconds
    assert not list(killed.parent.glob("rows.*.jsonl"))
    assert table(place / "killed")["rows"] == table(whole)["rows"]


def test_other_masks_go_on_with_the_rows_that_are_there(command, whole, place, monkeypatch):
    """Which masks there are decides nothing of what a row holds."""
    shutil.copytree(place / "whole.state", place / "more.state")
    ledger = place / "more.state" / "rows.jsonl"
    before = len(ledger.read_text().splitlines())
    arguments = ("--out", "more", *SMALL, "--masks", "first", "upper", "--no-halves")
    arguments = (*arguments, "--starts", "init", "--no-tracking")
    rows = table(whole)["rows"]
    assert command(monkeypatch, place, *arguments) == 0
    assert len(ledger.read_text().splitlines()) == before + 3  # seconds, and two seeds of upper
    found = {row["mask"]: row for row in table(place / "more")["rows"]}
    assert list(found) == ["full", "first", "upper"]
    assert found["first"] == next(row for row in rows if row["mask"] == "first")


def test_whole_trainings_come_before_what_is_held_against_them():
    options = SubsetOptions(masks=("weak", "full", "weak"), starts=("converged",))
    found = stages(options, [(0, 1), (2,)], timed=0)
    assert found == [
        [Piece("init", "full", (0, 1)), Piece("init", "full", (2,))],
        [Piece("converged", "full", (0, 1)), Piece("converged", "full", (2,))],
        [Piece("converged", "weak", (0, 1)), Piece("converged", "weak", (2,))],
    ]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--mask", "first"], "Did you mean --masks?"),
        (["--masks", "firts"], "masks: got 'firts', expected family"),
        (["--optimizer", "adam"], "optimizer: expected one of ('adamw', 'sgd')"),
        (["--interactions", "all"], "interactions: expected one of"),
        (["--starts", "end"], "starts: expected some of"),
        (["--steps", "0"], "steps: expected at least 1, got 0"),
        (["--lr", "0"], "lr: expected a rate above 0"),
        (["--images", "-1"], "images: expected 0 or more, got -1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_make_no_sense_end_with_code_2(
    command, tmp_path, monkeypatch, capsys, arguments, told
):
    assert command(monkeypatch, tmp_path, *arguments) == 2
    assert told in capsys.readouterr().err


def test_options_can_be_written_down():
    assert json.loads(json.dumps(asdict(SubsetOptions())))["task"] == "digits"
