"""The table of all methods: which rows it has, what it keeps, what it writes, what it refuses."""

import csv
import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from evaluation.methods import entries as entries_module
from evaluation.methods import settings as settings_module
from evaluation.methods import table as methods_module
from evaluation.methods.entries import Entry, entries
from evaluation.methods.ledger import Ledger
from evaluation.methods.rows import merge_calls
from evaluation.methods.settings import zoo_setting
from evaluation.methods.table import NAMES, MethodsOptions, methods, setting_rows, settings_of
from evaluation.methods.tables import markdown
from evaluation.methods.third_party import ThirdPartyCNN, third_party_setting
from metamerge import registry
from metamerge.checkpoints import save_checkpoint
from metamerge.errors import ConfigError
from metamerge.registry import get_method, list_alignments, list_methods, merge_method
from metamerge.structure import Layout, discover_program, run
from zoo.architectures import program_of
from zoo.tasks import Task

FEW = ["average", "rank_average", "task_arithmetic"]


def quiet():
    return Console(quiet=True)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Two families of four networks on digits, with and without a common base."""
    folder = tmp_path_factory.mktemp("zoos")
    return zoo_setting("digits", folder=folder, families=2, data=None, quick=True, console=quiet())


@contextmanager
def short_table():
    """Few methods and short controls: the tests are about the table, not about the methods."""
    with pytest.MonkeyPatch.context() as patch:
        known = [name for name in FEW if name in list_methods()]
        patch.setattr(entries_module, "list_methods", lambda: known)
        patch.setattr(entries_module, "list_alignments", lambda: ["weight_matching"])
        patch.setattr(entries_module, "list_corrections", lambda: ["refit", "batch_norm"])
        patch.setattr("evaluation.controls.TUNE_EPOCHS", 1)
        patch.setattr("evaluation.controls.SCRATCH_EPOCHS", 1)
        yield patch


def test_every_registered_method_and_alignment_has_a_row(setting):
    own = list(entries(setting.layout, setting.members, "own", learned="gnn"))
    common = list(entries(setting.layout, setting.members, "common", learned="gnn"))
    records = [get_method(name) for name in list_methods()]
    fitting = {r.name for r in records if (r.most or 4) >= setting.members}
    others = {r.name for r in records if "merger" in r.resources and r.name != "gnn"}
    assert others == {"autoencoder"}
    assert {entry.method for entry in own + common} == fitting - others
    assert {name for entry in own for name in entry.alignments} == {*list_alignments()}


def test_methods_for_a_base_are_tried_on_families_with_one_and_only_there(setting):
    own = entries(setting.layout, setting.members, "own", learned="gnn")
    assert not [e.label for e in own if "base" in get_method(e.method).required]


def test_learned_methods_wait_for_a_merger(setting):
    told = entries(setting.layout, setting.members, "own", learned=None)
    assert "gnn" not in {entry.method for entry in told}


def test_labels_are_unique_within_a_start(setting):
    for start in ("own", "common"):
        labels = [e.label for e in entries(setting.layout, 4, start, learned="gnn")]
        assert len(labels) == len({*labels})


def test_a_correction_needs_images_and_a_plain_average_has_no_use_for_them():
    assert [Entry("average", None).possible(d) for d in entries_module.DATA] == [True, False, False]
    corrected = Entry("average", None, ("refit",))
    assert [corrected.possible(d) for d in entries_module.DATA] == [False, True, False]


def test_what_requires_labels_is_tried_with_labels_only():
    try:

        @merge_method()
        def labelled_only(weights, *, labels):
            "Take the first member."
            return weights[0]

        entry = Entry("labelled_only")
        assert [entry.possible(d) for d in entries_module.DATA] == [False, False, True]
    finally:
        registry._METHODS.records.pop("labelled_only", None)


def test_base_is_the_network_that_members_left_together(setting):
    draw = setting.starts["common"][0]
    own = setting.starts["own"][0]
    assert draw.bases is not None
    assert own.bases is None
    key = next(iter(draw.bases))
    from_base = (draw.families[key] - draw.bases[key][:, None]).norm()
    from_each_other = (own.families[key] - own.families[key].mean(1, keepdim=True)).norm()
    assert 0 < from_base < from_each_other


def test_calibration_images_are_500_and_no_member_has_seen_them(setting):
    draw = setting.starts["own"][0]
    inputs, labels = draw.budget.everything
    seen = setting.images[0][torch.cat(draw.segments)]
    assert len(inputs) == len(labels) == 500
    alike = {tuple(row) for row in seen.flatten(1).tolist()}
    repeated = [tuple(row) in alike for row in inputs.flatten(1).tolist()]
    assert sum(repeated) <= 1  # digits holds a few images twice


def test_a_row_is_what_merging_each_family_gives(setting):
    call = next(
        call
        for call in merge_calls(setting, None)
        if call.about["start"] == "own" and call.about["method"] == "average"
    )
    row, draw = call.score(), setting.starts["own"][0]
    inputs, targets = setting.test
    expected = []
    for members in draw.members:
        mean = {key: sum(m[key] for m in members) / len(members) for key in members[0]}
        logits = run(setting.layout.program, mean, [inputs])
        expected.append((logits.argmax(1) == targets).float().mean())
    assert row["accuracy_mean"] == pytest.approx(float(torch.stack(expected).mean()), abs=1e-6)
    assert row["accuracy_worst"] == pytest.approx(float(min(expected)), abs=1e-6)
    assert row["families"] == 2


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """One short run of the command on digits, with everything that it left behind."""
    out, made = tmp_path_factory.mktemp("methods"), []
    options = MethodsOptions(settings=("digits",), out=str(out), families=2, quick=True)
    with short_table() as patch:
        rows = methods(options, quiet())
        patch.setattr(methods_module, "attempted", lambda score, *_: made.append(score) or {})
        again = methods(options, quiet())
    return SimpleNamespace(rows=rows, out=out, again=again, made=made)


def test_the_same_command_makes_no_row_again(result):
    assert result.made == []
    assert result.again == result.rows


def test_rows_are_those_of_the_leaderboard_and_more(result):
    needed = {"method", "members", "data", "accuracy_mean", "accuracy_std", "accuracy_worst"}
    needed |= {"families", "seconds", "parameters", "control", "setting", "start"}
    assert all(needed <= row.keys() for row in result.rows)
    assert json.loads((result.out / "methods.json").read_text()) == result.rows


def test_controls_and_ensembles_are_rows(result):
    controls = {row["method"] for row in result.rows if row["control"]}
    assert {"soft-vote ensemble", "best member", "trained from scratch"} <= controls
    assert {"distilled from best member", "trained on all segments (ceiling)"} <= controls
    assert {"best member, prior fitted", "aligned average, one garbage member more"} <= controls


def test_a_garbage_member_more_is_a_network_more_to_keep_for_the_vote_only(result):
    own = {row["method"]: row for row in result.rows if row["start"] == "own"}
    vote, average = (
        own[f"{name}, one garbage member more"]
        for name in ("soft-vote ensemble", "aligned average")
    )
    assert vote["parameters"] == own["soft-vote ensemble"]["parameters"] * 5 / 4
    assert average["parameters"] == own["average"]["parameters"]
    assert own["soft-vote ensemble"]["accuracy_mean"] != vote["accuracy_mean"]


def test_the_classes_that_a_member_learned_are_counted_by_hand():
    task = Task("four", torch.zeros(4, 1), torch.tensor([0, 0, 1, 2]), 3)
    rows = torch.tensor([[[0, 1, 2], [3, -1, -1]]])  # two zeros and a one; a two
    shares = settings_module._shares(rows, task)
    assert torch.allclose(shares, torch.tensor([[[3 / 6, 2 / 6, 1 / 6], [1 / 4, 1 / 4, 2 / 4]]]))


def test_what_says_nothing_without_batch_normalisation_is_left_out(result):
    assert not [row for row in result.rows if "batch_norm" in row["method"]]


def test_a_method_that_refuses_images_without_labels_has_one_row_with_them(result):
    data = [r["data"] for r in result.rows if "rank_average" in r["method"] and "error" not in r]
    assert data == ["labelled"] * len(data)
    assert data


def test_files_of_the_table_hold_every_row(result):
    with (result.out / "methods.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(result.rows)
    text = (result.out / "methods.md").read_text()
    assert all(row["method"] in text for row in result.rows)
    for start in ("own", "common"):
        assert (result.out / f"methods-digits-{start}.png").stat().st_size > 10_000


def test_a_method_that_raises_is_a_row_and_is_tried_again(setting, tmp_path):
    call = next(iter(merge_calls(setting, None)))

    def broken():
        raise RuntimeError("no luck")

    rows = setting_rows(setting, [call._replace(score=broken)], tmp_path, 60, quiet())
    assert rows[0]["error"] == "RuntimeError: no luck"
    assert "error" in markdown(rows, {setting.name: setting.title})
    rows = setting_rows(setting, [call], tmp_path, 60, quiet())
    assert rows[0]["accuracy_mean"] > 0


def test_a_row_that_takes_too_long_is_given_up(setting, tmp_path):
    call = next(iter(merge_calls(setting, None)))

    def endless():
        while True:
            pass

    rows = setting_rows(setting, [call._replace(score=endless)], tmp_path, 1, quiet())
    assert rows[0]["error"] == "TimeoutError: given up after 1 s"


def test_a_row_that_is_named_is_made_again(setting, tmp_path):
    call = next(iter(merge_calls(setting, None)))
    setting_rows(setting, [call], tmp_path, 60, quiet())
    changed = call._replace(score=lambda: {"accuracy_mean": 0.5})
    kept = setting_rows(setting, [changed], tmp_path, 60, quiet())
    again = setting_rows(setting, [changed], tmp_path, 60, quiet(), redo=("average",))
    assert kept[0]["accuracy_mean"] != 0.5
    assert again[0]["accuracy_mean"] == 0.5


def test_images_and_labels_that_made_no_difference_make_no_second_row():
    row = {"start": "own", "method": "a", "accuracy_mean": 0.5, "accuracy_std": 0.1}
    rows = [{**row, "data": data} for data in ("none", "unlabelled", "labelled")]
    assert methods_module._without_repeats(rows) == rows[:1]
    rows[2]["accuracy_mean"] = 0.6
    assert methods_module._without_repeats(rows) == [rows[0], rows[2]]


def test_ledger_keeps_rows_of_its_options_only(tmp_path):
    Ledger(tmp_path / "rows.jsonl", {"a": 1}).add("one", {"x": 1})
    Ledger(tmp_path / "rows.jsonl", {"a": 2}).add("two", {"x": 2})
    assert Ledger(tmp_path / "rows.jsonl", {"a": 1}).rows == {"one": {"x": 1}}
    assert "two" in Ledger(tmp_path / "rows.jsonl", {"a": 2})


def test_ledger_survives_a_line_that_was_cut_short(tmp_path):
    path = tmp_path / "rows.jsonl"
    Ledger(path, {}).add("one", {"x": 1})
    with path.open("a") as file:
        file.write('{"key": "two", "dig')
    ledger = Ledger(path, {})
    assert ledger.rows == {"one": {"x": 1}}
    ledger.add("three", {"x": 3})
    assert Ledger(path, {}).rows == {"one": {"x": 1}, "three": {"x": 3}}


def test_unknown_settings_are_refused_by_name():
    with pytest.raises(ConfigError, match="settings: got digit; there are digits, "):
        settings_of(["digit"], folder=None, families=0, third_party=(), quick=True, console=quiet())


def test_third_party_is_left_out_without_its_files(tmp_path):
    told = {"folder": tmp_path, "families": 0, "quick": True, "console": quiet()}
    assert len(settings_of(NAMES, third_party=(), **told)) == 3
    assert len(settings_of(NAMES, third_party=("a.dat", "b.dat"), **told)) == 4


def test_third_party_network_is_traced_as_it_computes():
    network = ThirdPartyCNN().eval()
    program = program_of(network, (1, 28, 28))
    images = torch.rand(3, 1, 28, 28)
    assert torch.allclose(run(program, network.state_dict(), [images]), network(images), atol=1e-6)
    assert {*Layout(program, discover_program(program)).spec.groups.values()} == {32, 64}


@pytest.fixture
def small_mnist(monkeypatch):
    inputs = torch.rand(700, 1, 28, 28)
    task = Task("mnist", inputs, torch.arange(700) % 10, 10, test_rows=range(600, 700))
    monkeypatch.setattr("evaluation.methods.third_party.load_task", lambda name, data: task)


def test_third_party_draws_share_their_members_and_no_image_with_the_test(tmp_path, small_mnist):
    files = [save_checkpoint(ThirdPartyCNN().state_dict(), tmp_path / name) for name in "ab"]
    setting = third_party_setting([str(file) for file in files], draws=2, data=None)
    first, second = setting.starts["own"]
    assert setting.members == 2
    assert first.families is second.families
    assert not torch.equal(first.budget.everything[0], second.budget.everything[0])
    tested = {tuple(x) for x in setting.test[0].flatten(1).tolist()}
    drawn = first.budget.everything[0].flatten(1).tolist()
    assert len(drawn) == 500
    assert not tested & {tuple(x) for x in drawn}


def test_files_of_another_network_are_refused(tmp_path, small_mnist):
    other = save_checkpoint({"weight": torch.zeros(2, 2)}, tmp_path / "other")
    with pytest.raises(ConfigError, match=r"expected .*conv1.weight.*pygmtools"):
        third_party_setting([str(other)], draws=1, data=None)
