"""Suites: rows that can be run, mergers that are trained once, and one table at the end."""

import json
import sys
from dataclasses import fields, replace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from accelerate import PartialState
from rich.console import Console

from evaluation import suite_runs
from evaluation.compare import CompareOptions, main
from evaluation.goals import NATIVE, OWN, Goal
from evaluation.scored import Scored
from evaluation.suite_runs import chosen_rows, run_suite, trained
from evaluation.suite_zoos import FASHION_CNN, FASHION_MLP, FASHION_SKEWED, FASHION_SKEWED_CNN, TINY
from evaluation.suites import MERGERS, SUITES, Row, Training
from metamerge.errors import ConfigError, MetaMergeError
from metamerge.mergers import GNNConfig, GNNMerger, save_merger
from trainers.merger import MergerOptions
from zoo.recipe import ZooOptions
from zoo.store import load_zoo

ROWS = [row for rows in SUITES.values() for row in rows]
KNOWN = {  # methods that rows may be held against
    *("soft-vote ensemble", "distilled from best member", "best member", "trained from scratch"),
    *("best member, fine-tuned", "average, aligned", "average, aligned + repair", OWN, NATIVE),
}
SMALL = ZooOptions(
    widths=(4,),
    members=(2,),
    segment_size=50,
    train_families=1,
    validation_families=1,
    test_families=2,
    epochs=0.2,
)


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def trainings(monkeypatch):
    """Trainings save a merger that nobody trained; what they were called with."""
    calls = []

    def call(command, **_):
        calls.append(command)
        folder = command[command.index("--out") + 1]
        merger = GNNMerger(GNNConfig(shapes=((1, 8, 8),), probes=4, width=4))
        save_merger(merger, folder, {"options": {"seed": 0}, "zoos": []})
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(suite_runs.subprocess, "run", call)
    return calls


def comparison(options, console, state):
    """Scores that depend on the zoo's folder and nothing else."""
    accuracies = torch.tensor([0.8, 0.9])
    rows = [
        Scored("gnn", 2, "none", accuracies, 0.1, 10, False),
        Scored("soft-vote ensemble", 2, "none", accuracies - 0.1, 0.1, 20, True),
    ]
    gates = [{"name": "output_cosine", "value": 0.9, "limit": 0.3, "passed": False}]
    return SimpleNamespace(scored=rows, meta={"mergers": {"gnn": {"gates": {"k2": gates}}}})


@pytest.fixture
def suite(monkeypatch):
    """A suite of two rows with equal trainings, the second judged on two zoos."""
    training = Training((SMALL,), {"steps": 3})
    other = ZooOptions(**{**vars(SMALL), "segment_size": 60})
    rows = (
        Row("one", "above", (training,), goals=(Goal("soft-vote ensemble", 0.05, members=2),)),
        Row("two", "far above", (training,), (SMALL, other), goals=(Goal(0.95),)),
    )
    monkeypatch.setitem(SUITES, "small", rows)
    return rows


def run(compare=comparison, **options):
    given = CompareOptions(**{"suite": "small", "tracking": False, **options})
    return run_suite(given, Console(quiet=True), compare, PartialState(cpu=True))


# ---------------------------------------------------------------------------- the rows that exist


def test_rows_of_a_suite_have_names_of_their_own():
    for rows in SUITES.values():
        assert len({row.name for row in rows}) == len(rows)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_rows_name_options_and_methods_that_exist(row):
    for training in (*row.mergers, Training((), row.native or {})):
        assert set(training.options) <= {field.name for field in fields(MergerOptions)}
        MergerOptions(**training.options)
    CompareOptions(**row.compare)
    assert row.goals
    for goal in row.goals:
        assert isinstance(goal.over, float) or goal.over in KNOWN
        assert goal.row in ("", "calibrated", "adapted")
        sizes = {k for zoo in row.judge or row.mergers[0].zoos for k in zoo.members}
        assert goal.members in {0, *sizes}


@pytest.mark.parametrize("row", MERGERS, ids=lambda row: row.name)
def test_published_rows_are_judged_on_twelve_families_at_least(row):
    assert min(zoo.test_families for zoo in row.judge or row.mergers[0].zoos) >= 12


@pytest.mark.parametrize(
    ("name", "judge"),
    [
        ("foreign", FASHION_SKEWED),
        ("foreign-mlp", FASHION_MLP),
        ("foreign-cnn", FASHION_CNN),
        ("foreign-skewed-cnn", FASHION_SKEWED_CNN),
    ],
)
def test_a_merger_of_a_foreign_task_is_trained_on_none_of_the_judged_tasks(name, judge):
    (row,) = chosen_rows("mergers", [name])
    assert row.judge == (judge,)
    tasks = {zoo.task for training in row.mergers for zoo in training.zoos}
    assert tasks.isdisjoint(zoo.task for zoo in row.judge)
    assert {goal.members for goal in row.goals} == set(judge.members)


@pytest.mark.parametrize(
    ("suite", "only", "told"),
    [
        ("mergers", ("digit",), "rows digits, "),
        ("merger", (), "one of mergers, quick, .*or one of their rows: digits, fashion-mlp"),
    ],
)
def test_unknown_suites_and_rows_are_refused(suite, only, told):
    with pytest.raises(ConfigError, match=told):
        chosen_rows(suite, only)


def test_a_row_is_a_suite_by_its_own_name():
    for row in MERGERS:
        assert chosen_rows(row.name, ()) == [row]
    assert [row.name for row in chosen_rows("fixtures", ())] == ["third-party"]


# ---------------------------------------------------------------------------- running them


def test_equal_trainings_are_done_once_and_never_again(work, suite, trainings):
    run()
    run()
    (command,) = trainings
    assert command[:3] == [sys.executable, "-m", "trainers.merger"]
    assert {"--zoo", "--steps", "3", "--no-tracking"} <= set(command)


def test_another_option_is_another_training(work, trainings):
    console, options = Console(quiet=True), CompareOptions(tracking=False)
    state = PartialState(cpu=True)
    folders = {
        trained(Training((SMALL,), {"steps": steps}), work, console, options, state)
        for steps in (3, 4, 3)
    }
    assert len(folders) == len(trainings) == 2


def test_a_suite_leaves_its_table_and_what_it_was_made_of(work, suite, trainings):
    lines = run(out="out")
    told = json.loads((work / "out" / "suite.json").read_text())
    assert told["lines"] == lines
    assert told["rows"]["one"]["mergers"][0]["options"] == {"steps": 3}
    assert [(line["row"], line["reached"]) for line in lines] == [("one", True), ("two", False)]
    assert [line["families"] for line in lines] == [2, 4]  # two zoos together
    assert {tuple(line["gates"]) for line in lines} == {("k2 output_cosine",)}
    table = (work / "out" / "suite.md").read_text()
    assert "| one | 2 | none | gnn | 85.0 | 75.0 |" in table
    assert table.count("\n") == 4


def test_only_the_rows_that_are_named_are_run(work, suite, trainings):
    assert {line["row"] for line in run(only=("two",))} == {"two"}


def test_a_native_merger_is_trained_on_every_judged_zoo_and_held_against_it_there(
    work, suite, trainings, monkeypatch
):
    wide, deep = (ZooOptions(**{**vars(SMALL), "widths": w}) for w in ((8,), (4, 4)))
    rival = {(8,): 0.9, (4, 4): 0.7}

    def compared(options, console, state):
        base, own = options.merger
        widths = tuple(load_zoo(options.zoo).options["widths"])
        rows = [
            Scored(name, 2, "none", torch.tensor([score]), 0.1, 10, False)
            for name, score in (("a", 0.8), ("b", rival[widths]))
        ]
        known = {"a": {"folder": base, "gates": {}}, "b": {"folder": own, "gates": {}}}
        about = {"mergers": known, "zoo": {"options": {"widths": widths}}}
        return SimpleNamespace(scored=rows, meta=about)

    goals = (Goal(NATIVE, -0.01, members=2),)
    row = Row("w", "near", (Training((SMALL,)),), (wide, deep), native={"steps": 3}, goals=goals)
    monkeypatch.setitem(SUITES, "small", (row,))
    told = CompareOptions(suite="small", tracking=False)
    lines = run_suite(told, Console(quiet=True), compared, PartialState(cpu=True))
    assert [(line["row"], line["merger"], line["reached"]) for line in lines] == [
        ("w 8", "a", False),
        ("w 4-4", "a", True),
    ]
    assert len(trainings) == 3


def test_a_row_on_third_party_files_wants_them(work, suite, trainings, monkeypatch):
    row = Row("pair", "", (Training((SMALL,)),), third_party=True, goals=(Goal(0.9),))
    monkeypatch.setitem(SUITES, "small", (row,))
    with pytest.raises(ConfigError, match="pair: give the two files with --third-party"):
        run()


def test_a_row_on_third_party_files_is_judged_on_them_alone(work, suite, trainings, monkeypatch):
    row = Row("pair", "", (Training((SMALL,)),), third_party=True, goals=(Goal(0.9),))
    monkeypatch.setitem(SUITES, "small", (row,))
    judge = Mock(side_effect=comparison)
    run(judge, third_party=("a.dat", "b.dat"))
    ((options, *_),) = (call.args for call in judge.call_args_list)
    assert (options.third_party, options.zoo) == (("a.dat", "b.dat"), None)


def test_a_training_that_leaves_no_merger_ends_the_suite(work, suite, monkeypatch):
    ended = SimpleNamespace(returncode=3)
    monkeypatch.setattr(suite_runs.subprocess, "run", lambda *_, **__: ended)
    with pytest.raises(MetaMergeError, match="ended with 3, no merger"):
        run()


def test_the_quick_suite_trains_compares_and_tells_what_was_reached(work, monkeypatch, capsys):
    """The merger is trained by a process of its own; fewer families, steps and epochs."""
    (row,) = SUITES["quick"]
    (training,) = row.mergers
    zoo = replace(TINY, train_families=6, validation_families=4, test_families=3)
    short = Training((zoo,), {**training.options, "steps": 10})
    monkeypatch.setitem(SUITES, "quick", (replace(row, mergers=(short,)),))
    monkeypatch.setattr("evaluation.controls.TUNE_EPOCHS", 1)
    monkeypatch.setattr("evaluation.controls.SCRATCH_EPOCHS", 1)
    arguments = ["--suite", "quick", "--no-tracking", "--no-pictures", "--out", "out"]
    monkeypatch.setattr(sys, "argv", ["compare", *arguments])
    main()
    told = json.loads((work / "out" / "suite.json").read_text())
    assert [line["members"] for line in told["lines"]] == [2, 3]
    assert {line["families"] for line in told["lines"]} == {3}
    assert all(0 < line["accuracy"] < 1 for line in told["lines"])
    assert "what was to be reached" in capsys.readouterr().out
