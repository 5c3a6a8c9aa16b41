"""Training in rounds as users start it: kills, resumes, two ranks, and every way to merge."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from evaluation.metrics import accuracy
from metamerge import merge
from metamerge.checkpoints import read_checkpoints
from metamerge.errors import ConfigError
from trainers.ground import Course, Ground
from trainers.rounds import RoundsOptions
from zoo.training import predict

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "trainers" / "rounds.py")
ROUNDS = 40
SMALL = (
    *("--widths", "16", "--members", "3", "--rounds", str(ROUNDS), "--seeds", "1", "--lr", "0.003"),
    *("--epochs", "2", "--save-every", "1", "--no-union"),
)
SHORT = (*SMALL, "--rounds", "3", "--no-tracking")
COURSE = "k3-seed0-lr0.003"

pytestmark = [pytest.mark.xdist_group("rounds_script"), pytest.mark.usefixtures("one_thread")]


def written(folder):
    return json.loads((folder / "rounds.json").read_text())


def weights_of(folder):
    return read_checkpoints(folder)[0].weights


@pytest.fixture(scope="module")
def made(command):
    """A short training in this process: rows, and the last network of the first."""

    def made(monkeypatch, folder, *arguments):
        assert command(monkeypatch, folder, "--out", "run", *SHORT, *arguments) == 0
        content = written(folder / "run")
        return SimpleNamespace(rows=content["rows"], summary=content["summary"], out=folder / "run")

    return made


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("rounds")


@pytest.fixture(scope="module")
def whole(command, place):
    """One training that nothing interrupts, with Nesterov momentum and moments that are kept."""
    with pytest.MonkeyPatch.context() as patch:
        assert command(patch, place, "--out", "whole", *SMALL, *DEEP) == 0
    return place / "whole"


DEEP = ("--outer", "nesterov", "--outer-lr", "0.8", "--momentum", "0.5", "--moments", "kept")


@pytest.fixture(scope="module")
def killed(place, killed_when):
    """What a training leaves that is killed after some rounds."""
    latest = place / "killed.state" / COURSE / "LATEST"

    def holds():
        return latest.exists() and int(latest.read_text()[-8:]) >= 3

    killed_when(holds, place, "--out", "killed", *SMALL, *DEEP)
    assert not (place / "killed" / COURSE).exists()
    return SimpleNamespace(reached=int(latest.read_text()[-8:]))


# ------------------------------------------------------------------------------- one training


def test_a_training_leaves_a_network_that_can_be_merged_on(whole):
    (row,) = written(whole)["rows"]
    ground = Ground(RoundsOptions(widths=(16,)).zoo, torch.device("cpu"))
    inputs, targets = ground.split.images("test")
    weights = {key: tensor[None] for key, tensor in weights_of(whole / COURSE).items()}
    found = float(accuracy(predict(ground.program, weights, inputs), targets))
    assert found == pytest.approx(row["curve"]["test"][-1], abs=1e-6)
    merged = merge([whole / COURSE, whole / COURSE], method="average").weights
    assert all(torch.equal(merged[key], tensor[0]) for key, tensor in weights.items())


def test_rounds_learn_what_no_member_knows(whole):
    (row,) = written(whole)["rows"]
    test, members = row["curve"]["test"], row["curve"]["members"]
    assert len(test) == ROUNDS
    assert test[-1] > 0.9 > test[0]
    assert row["curve"]["validation"][-1] >= members[-1] - 0.01


def test_bytes_are_those_of_all_networks_up_and_down(whole):
    parameters = 64 * 16 + 16 + 16 * 10 + 10
    (row,) = written(whole)["rows"]
    assert row["bytes_per_round"] == 2 * 3 * 4 * parameters
    (told,) = written(whole)["summary"]
    assert told["bytes"] == ROUNDS * row["bytes_per_round"]


def test_the_run_in_mlflow_holds_options_curves_and_files(whole, place):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{place}/mlflow.db")
    run = client.get_run(written(whole)["run"])
    assert run.info.status == "FINISHED"
    assert run.data.params["outer"] == "nesterov"
    curve = client.get_metric_history(run.info.run_id, f"{COURSE}/test")
    assert [point.step for point in curve] == list(range(1, ROUNDS + 1))
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {
        *("rounds.json", "rounds.png")
    }


def test_a_finished_training_is_not_made_again(command, whole, place, monkeypatch):
    before, began = written(whole), time.monotonic()
    assert command(monkeypatch, place, "--out", "whole", *SMALL, *DEEP) == 0
    after = written(whole)
    assert after["rows"] == before["rows"]
    assert after["run"] == before["run"]
    assert time.monotonic() - began < 60


# ------------------------------------------------------------------------------- kills, processes


def test_a_killed_training_goes_on_and_loses_no_bit(command, whole, killed, place, monkeypatch):
    assert 3 <= killed.reached < ROUNDS
    assert command(monkeypatch, place, "--out", "killed", *SMALL, *DEEP) == 0
    found, expected = weights_of(place / "killed" / COURSE), weights_of(whole / COURSE)
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
    (one,), (other,) = written(place / "killed")["rows"], written(whole)["rows"]
    assert one["curve"] == other["curve"]
    assert not (place / "killed.state" / COURSE).exists()


def test_two_processes_reach_what_one_reaches(whole, place, on_two_processes, command, monkeypatch):
    """Three members on two processes; sums in another order are all that may differ."""
    arguments = ("--out", "two", *SMALL, *DEEP, "--no-tracking")
    said = on_two_processes(lambda: command(monkeypatch, place, *arguments))
    assert said.count("two/rounds.json") == 1  # one of the two speaks
    found, expected = weights_of(place / "two" / COURSE), weights_of(whole / COURSE)
    for key, tensor in expected.items():
        # 40 rounds of 40 steps let single rounding errors of 1e-7 grow; weights are about 0.1.
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-3)
    (one,), (other,) = written(place / "two")["rows"], written(whole)["rows"]
    assert one["curve"]["images"] == other["curve"]["images"]


# ------------------------------------------------------------------------------- ways to merge


@pytest.mark.parametrize(
    "arguments",
    [
        ("--init", "own", "--align", "weight_matching", "--correct", "refit", "--images", "100"),
        ("--init", "own", "--align", "activation_matching", "--images", "100", "--labels"),
        ("--method", "weighted_average", "--split", "dirichlet", "--moments", "kept"),
        ("--init", "own", "--method", "gnn", "--outer", "nesterov", "--moments", "kept"),
        ("--init", "own", "--align", "weight_matching", "--outer", "elastic_averaging"),
        ("--outer", "soft_weight_sharing", "--augment", "shift=1", "noise=0.1"),
        ("--architecture", "cnn", "--widths", "4", "--augment", "flip", "--schedule", "round"),
    ],
    ids=lambda words: " ".join(words).replace("--", ""),
)
def test_any_merge_and_any_outer_optimiser_goes(made, tmp_path, monkeypatch, arguments):
    (row,) = made(monkeypatch, tmp_path, *arguments).rows
    assert len(row["curve"]["test"]) == 3
    assert 0 < row["curve"]["validation"][-1] <= 1
    assert min(row["curve"]["distance"]) > 0


def test_aligned_members_with_own_inits_merge_better_than_unaligned_ones(
    made, tmp_path, monkeypatch
):
    found = {}
    for align in ("none", "weight_matching"):
        folder = tmp_path / align
        folder.mkdir()
        arguments = ("--init", "own", "--align", align, "--epochs", "20", "--seeds", "3")
        found[align] = made(monkeypatch, folder, *arguments, "--rounds", "1").summary[0]
    assert found["weight_matching"]["test_mean"] > found["none"]["test_mean"] + 0.1


def test_the_union_sees_as_many_images_in_one_network(made, tmp_path, monkeypatch):
    (row,) = made(monkeypatch, tmp_path, "--union").rows
    seen, union = sum(row["curve"]["images"]), sum(row["union"]["curve"]["images"])
    ground = Ground(RoundsOptions().zoo, torch.device("cpu"))
    assert row["images"] == row["union"]["images"] == len(ground.split.rows("segments"))
    assert abs(seen - union) <= 3 * 3 * 32  # no more than a last batch per member and round
    assert row["union"]["curve"]["test"][-1] > row["curve"]["test"][-1]
    assert row["union"]["passes"] == [2, 2, 2]


def test_all_numbers_of_members_share_the_union_of_the_same_images(made, tmp_path, monkeypatch):
    run = made(monkeypatch, tmp_path, "--union", "--members", "2", "4", "--rounds", "1")
    assert run.rows[0]["union"] == run.rows[1]["union"]
    assert len(list(run.out.glob("union-*"))) == 1


def test_one_member_is_training_on_the_union(made, tmp_path, monkeypatch):
    """The same images, passes and rates; only inits and orders of images are others."""
    arguments = ("--members", "1", "--union", "--moments", "kept", "--seeds", "2")
    rows = made(monkeypatch, tmp_path, *arguments).rows
    for row in rows:
        assert row["curve"]["images"] == row["union"]["curve"]["images"]
        assert row["union"]["curve"]["test"][-1] == pytest.approx(row["curve"]["test"][-1], abs=0.1)


def test_rounds_grow_and_a_leash_shortens_them(made, tmp_path, monkeypatch):
    for name, arguments in {"grow": ("--growth", "1"), "leash": ("--divergence", "0.02")}.items():
        (tmp_path / name).mkdir()
        (row,) = made(monkeypatch, tmp_path / name, *arguments, "--union").rows
        images = row["curve"]["images"]
        if name == "grow":  # 2, 3 and 4 passes, last batches filled up
            over = [seen - n * row["images"] for n, seen in zip((2, 3, 4), images, strict=True)]
            assert all(0 <= count <= 3 * 32 for count in over)
        else:
            assert max(images) < 2 * row["images"]
            assert sum(row["union"]["curve"]["images"]) <= sum(images) + 3 * 32


def test_a_threshold_on_validation_images_ends_a_training(made, tmp_path, monkeypatch):
    arguments = ("--rounds", "30", "--threshold", "0.8", "--schedule", "constant")
    (row,) = made(monkeypatch, tmp_path, *arguments).rows
    validation = row["curve"]["validation"]
    assert row["stopped"]
    assert validation[-1] >= 0.8
    assert all(value < 0.8 for value in validation[:-1])
    assert len(validation) < 30


def test_every_number_of_members_and_rate_has_a_row(made, tmp_path, monkeypatch):
    arguments = ("--members", "2", "4", "--lr", "0.003", "0.00001", "--rounds", "2")
    run = made(monkeypatch, tmp_path, *arguments)
    pairs = [(row["members"], row["lr"]) for row in run.rows]
    assert pairs == [(2, 0.003), (2, 0.00001), (4, 0.003), (4, 0.00001)]
    assert [(told["members"], told["lr"]) for told in run.summary] == [(2, 0.003), (4, 0.003)]
    assert (run.out / "k4-seed0-lr1e-05" / "manifest.json").exists()


# ------------------------------------------------------------------------------- options


def test_a_linear_rate_falls_with_the_passes():
    options = RoundsOptions(rounds=3, epochs=1.0, growth=1.0)  # 1, 2 and 3 of 6 passes
    ends = [(stint.lr, stint.last_lr) for stint in (options.stint(i, 0.6) for i in range(3))]
    assert ends[0] == pytest.approx((0.6, 0.5))
    assert ends[1] == pytest.approx((0.5, 0.3))
    assert ends[2] == pytest.approx((0.3, 0.0))


def test_seeds_have_segments_inits_and_orders_of_their_own():
    ground = Ground(RoundsOptions(widths=(4,), init="own").zoo, torch.device("cpu"))
    (one, start), (other, again) = (ground.segments(Course(3, seed, 0.1)) for seed in (0, 1))
    assert not set(one.seeds) & set(other.seeds)
    assert not torch.equal(one.rows[0].sort().values, other.rows[0].sort().values)
    assert len({float(t[0, 0]) for s in (start, again) for t in s["1.weight"]}) == 6
    held_back = torch.cat([ground.split.rows(part) for part in ("objective", "validation", "test")])
    assert not torch.isin(torch.cat([*one.rows, *other.rows]), held_back).any()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--round", "3"], "unknown option '--round'. Did you mean --rounds?"),
        (["--outer", "adam"], "outer: expected one of ('averaging', 'nesterov'"),
        (["--moments", "lost"], "moments: expected one of ('reset', 'kept')"),
        (["--correct", "refit"], "correct: refit needs inputs: give --images"),
        (["--threshold", "90"], "threshold: expected 0 to 1, got 90.0"),
        (["--lr", "0"], "lr: expected rates above 0"),
        (["--divergence", "-1"], "divergence: expected 0 or more, got -1.0"),
        (["--split", "random"], "split: got 'random'"),
        (["--method", "mean"], "mean"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_make_no_sense_end_with_code_2(
    command, tmp_path, monkeypatch, capsys, arguments, told
):
    assert command(monkeypatch, tmp_path, *arguments) == 2
    assert told in capsys.readouterr().err


def test_regressions_are_refused(command, tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, tmp_path, "--task", "diabetes", "--objective", "100") != 0
    assert "it is judged by accuracy" in capsys.readouterr().err


def test_options_can_be_written_down():
    with pytest.raises(ConfigError, match="rounds"):
        RoundsOptions(rounds=0)
    assert json.loads(json.dumps(asdict(RoundsOptions())))["task"] == "digits"
