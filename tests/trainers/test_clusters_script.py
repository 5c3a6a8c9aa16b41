"""The grid of clusters as users start it: real processes, a kill, a resume, two ranks, tables."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate import Accelerator

from metamerge.errors import ConfigError, ZooError
from trainers.cluster_tables import chosen, compared, paired
from trainers.clusters import ClusterOptions, finished, read_task, train
from zoo.options import parse
from zoo.tasks.housing import CALIFORNIA, GENERATED_HOUSING

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "trainers" / "clusters.py")
SMALL = (
    *("--tasks", "diabetes", "--hidden", "1", "--width", "8", "--clusterings", "features"),
    *("--rules", "plain", "increasing", "adam", "dropped", "--lr", "0.1", "0.01"),
    *("--runs", "6", "--epochs", "4", "--merged", "1", "--clusters", "2", "3"),
)
CELLS = 4 * 2 + 2

pytestmark = pytest.mark.xdist_group("clusters_script")


def rows_of(folder):
    """Finished cells by name, without what a clock says."""
    rows = finished(folder, parse(ClusterOptions, SMALL, prog="clusters"))
    return {
        key: {name: value for name, value in row.items() if "seconds" not in name}
        for key, row in rows.items()
        if "scores" in row
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("clusters")


@pytest.fixture(scope="module")
def two_ranks(place, on_two_processes, command):
    """The grid on two CPU processes, tracked."""
    with pytest.MonkeyPatch.context() as patch:
        said = on_two_processes(lambda: command(patch, place, *SMALL, "--out", "two"))
    return SimpleNamespace(folder=place / "two", out=said)


@pytest.fixture(scope="module")
def resumed(place, killed_when):
    """The grid on one process that is killed half-way and started again."""
    ledger, arguments = place / "one" / "rows-0.jsonl", [*SMALL, "--out", "one", "--no-tracking"]

    def holds():
        return ledger.exists() and ledger.read_text().count("\n") >= 3

    killed_when(holds, place, *arguments, launcher=None, OMP_NUM_THREADS="1")
    left = ledger.read_text()
    assert not (place / "one" / "cells.csv").exists()
    ledger.write_text(left[:-20])  # a kill may cut a line short
    options = parse(ClusterOptions, arguments, prog="clusters")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        train(options, Accelerator(cpu=True))
    return SimpleNamespace(folder=place / "one", before=left)


def test_two_processes_share_the_cells(two_ranks):
    counts = [
        sum('"scores"' in line for line in path.read_text().splitlines())
        for path in sorted(two_ranks.folder.glob("rows-*.jsonl"))
    ]
    assert counts == [CELLS / 2, CELLS / 2]


def test_a_resumed_grid_makes_only_what_is_missing(resumed):
    assert len(rows_of(resumed.folder)) == CELLS
    ledger = (resumed.folder / "rows-0.jsonl").read_text()
    assert ledger.startswith(resumed.before[:-20])


def test_one_process_that_was_killed_and_two_give_the_same_rows(two_ranks, resumed):
    assert rows_of(two_ranks.folder) == rows_of(resumed.folder)


def test_tables_hold_every_cell_and_every_run(two_ranks):
    with (two_ranks.folder / "cells.csv").open() as file:
        table = list(csv.DictReader(file))
    rows = json.loads((two_ranks.folder / "cells.json").read_text())
    assert len(table) == 8
    for line, row in zip(table, rows[:8], strict=True):
        assert (line["rule"], float(line["lr"])) == (row["rule"], row["lr"])
        assert float(line["mse_mean"]) == pytest.approx(np.mean(row["scores"]["mse"]))
        assert float(line["mae_std"]) == pytest.approx(np.std(row["scores"]["mae"], ddof=1))
        assert len(row["scores"]["mae"]) == 6
        assert len(row["curve"][0]) == 5
    for name in ("curves-diabetes.png", "rates-diabetes.png", "chosen.md", "members.md"):
        assert (two_ranks.folder / name).stat().st_size > 500
    assert "| 1 | features" in two_ranks.out


def test_learning_rates_are_chosen_on_validation_rows(two_ranks):
    rows = json.loads((two_ranks.folder / "cells.json").read_text())[:8]
    for best in chosen(rows):
        rivals = [row for row in rows if row["rule"] == best["rule"]]
        losses = [np.mean(row["best_validation"]) for row in rivals]
        assert np.mean(best["best_validation"]) == min(losses)
    table = compared(rows, ("plain",))
    assert len(table) == 4
    assert "mse - plain" not in table[0]
    assert "mse - plain interval" in table[1]


def test_runs_are_compared_pair_by_pair():
    one, other = ({"scores": {"mse": values}} for values in ([1.0, 2.0, 6.0], [2.0, 4.0, 5.0]))
    found = paired(one, other, "mse", 0.25)
    assert found["difference"] == pytest.approx(-2 / 3)
    deviation = np.std([-1.0, -2.0, 1.0], ddof=1)
    assert found["interval"] == pytest.approx(1.98 * deviation / 3**0.5)
    assert found["wide"] == pytest.approx(1.98 * deviation * (1 / 3 + 0.25) ** 0.5)


def test_a_table_of_ones_own_is_checked_before_anything_runs(tmp_path):
    path = tmp_path / "own.csv"
    rows = [f"{i},{i % 7 + 0.5},{2 * i + 1}" for i in range(40)]
    path.write_text("\n".join(["id,size,price", *rows]))
    options = ClusterOptions(tasks=(str(path),), target="price", kind="regression")
    with pytest.raises(ZooError, match="id"):
        read_task(options, str(path), SimpleNamespace(print=print))


def test_where_california_cannot_be_had_the_generated_set_is_taken_and_named(monkeypatch):
    def fails(name, **options):
        if name == CALIFORNIA:
            raise ZooError("no network")
        return known(name, **options)

    from trainers import clusters

    known = clusters.load_task
    monkeypatch.setattr(clusters, "load_task", fails)
    said = []
    task = read_task(ClusterOptions(rows=50), CALIFORNIA, SimpleNamespace(print=said.append))
    assert task.name == GENERATED_HOUSING
    assert len(task.inputs) == 50
    assert any(f"{GENERATED_HOUSING} is taken instead" in line for line in said)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"rules": ("plain", "up")}, "up"),
        ({"clusterings": ("colour",)}, "colour"),
        ({"clusters": (1, 2)}, "clusters"),
        ({"lr": (0.0,)}, "lr"),
        ({"coefficient": "gap"}, "coefficient"),
        ({"curriculum": 2.0}, "curriculum"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, word):
    with pytest.raises(ConfigError, match=word):
        ClusterOptions(**options)
