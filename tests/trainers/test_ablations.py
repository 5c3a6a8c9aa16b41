"""Ablations: what is held stays held, differences are paired, finished rows are kept."""

import json
from dataclasses import replace
from fnmatch import fnmatch

import pytest
import torch
from rich.console import Console

from evaluation.metrics import accuracy
from metamerge.errors import ConfigError
from metamerge.mergers import GNNConfig, GNNMerger, fuse
from metamerge.structure import run
from trainers.ablations import running
from trainers.ablations.cases import CASES, WHOLE, Case, hold
from trainers.ablations.judging import USES, judge, unaligned
from trainers.ablations.running import AblationOptions, ablate
from trainers.ablations.settings import SETTINGS, Setting
from trainers.ablations.table import (
    COLUMNS,
    ablations_figure,
    beyond_chance,
    differences,
    interval,
    markdown,
)
from trainers.merger import MergerOptions
from zoo.build import ZooOptions

SHAPE = (1, 8, 8)


def make_merger(**changes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GNNMerger(GNNConfig(**{"probes": 16, "shapes": (SHAPE,), "width": 32, **changes}))


# ---------------------------------------------------------------------------- what is left out


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.part} {case.name}")
def test_every_case_names_options_and_parameters_that_there_are(case):
    options = MergerOptions(**case.options)
    hold(make_merger(rounds=options.rounds, gate=options.gate), case.held)


def test_no_case_is_there_twice():
    assert len({(case.part, case.name) for case in CASES}) == len(CASES)
    assert CASES[0] == WHOLE


def test_parameters_that_nobody_has_are_told():
    with pytest.raises(ValueError, match=r"no parameter is called 'gates\.\*'"):
        hold(make_merger(), {"gates.*": ()})


@pytest.mark.parametrize("case", [c for c in CASES if c.held], ids=lambda c: f"{c.part} {c.name}")
def test_what_is_held_does_not_learn_and_all_else_does(case, make_families):
    group, merger = make_families(), make_merger()
    hold(merger, case.held)
    start = {name: p.detach().clone() for name, p in merger.named_parameters()}
    optimizer = torch.optim.AdamW(merger.parameters(), lr=0.1, weight_decay=0.0)
    for _ in range(2):  # fresh heads are zero: what is before them learns from the second step on
        members = {key: t[:2] for key, t in group.weights.items()}
        fused, trust = merger(members, group.layout)
        optimizer.zero_grad()
        (
            sum((t * t.detach().sin()).sum() for t in fused.values()) + trust.square().sum()
        ).backward()
        optimizer.step()
    held, learned = 0, 0
    for name, parameter in merger.named_parameters():
        moved = parameter.detach() != start[name]
        learned += int(moved.sum())
        for pattern, entries in case.held.items():
            if fnmatch(name, pattern):
                own = moved if entries == () else moved[entries]
                assert not own.any(), name
                held += own.numel()
    assert held
    assert learned > 1000


# ---------------------------------------------------------------------------- judging


def test_every_use_is_judged_family_by_family(make_families, trained_merger):
    group = make_families()
    group = replace(
        group,
        weights={key: tensor[:14] for key, tensor in group.weights.items()},
        answers=group.answers[:14],
    )
    scores = judge(trained_merger, [group], group.images[0][:80])
    assert scores.keys() == USES.keys()
    assert {len(found) for found in scores.values()} == {14}
    half = {key: tensor[:, ::2] for key, tensor in group.weights.items()}
    for use, members, inputs in (
        ("at once", group.weights, None),
        ("inputs", group.weights, group.images[0][:80]),
        ("fewer", half, None),
    ):
        with torch.no_grad():
            fused = fuse(trained_merger, members, group.layout, inputs, steps=0)
        logits = run(group.layout.program, fused, [group.images[0]], stacked=True)
        expected = accuracy(logits, group.images[1])
        # 12 families at a time and 14 at once round differently: one image of 300 may turn
        assert torch.allclose(torch.tensor(scores[use]), expected, atol=1.1 / len(group.images[1]))
    assert sum(scores["garbage"]) < sum(scores["at once"])


# ---------------------------------------------------------------------------- differences


def test_an_interval_by_hand():
    # Means over seeds 1 and 3, variance 2; over families 2 and 2, variance 0.
    found = interval(torch.tensor([[0.0, 3.0], [4.0, 1.0]]))
    assert found["difference"] == 2.0
    variance = ((1.5 - 2) ** 2 + (2.5 - 2) ** 2) / 1 / 2 + 0.0
    assert found["half_width"] == pytest.approx(1.96 * variance**0.5)
    assert found["agree"]
    assert beyond_chance(found)
    mixed = interval(torch.tensor([[0.1, 0.3], [-0.1, -0.1]]))
    assert not mixed["agree"]
    assert not beyond_chance(mixed)


def row(name, seed, once, refined, setting="digits"):
    uses = {use: [0.5, 0.5] for use in USES}
    judged = {**uses, "at once": once, "refined": refined}
    return {
        "setting": setting,
        "case": ["gate", name] if name else ["", "whole merger"],
        "seed": seed,
        "validation": judged,
        "test": {**judged, "refined": [x - 0.1 for x in refined]},
        "seconds": 1.0,
    }


def test_differences_are_paired_by_seed_and_the_usual_use_is_chosen_on_validation_families():
    rows = [
        row("", 0, [0.7, 0.8], [0.8, 0.9]),
        row("", 1, [0.7, 0.8], [0.6, 0.7]),
        row("none", 1, [0.6, 0.7], [0.5, 0.5]),
        row("none", 2, [0.1, 0.1], [0.1, 0.1]),  # no whole merger of this seed
    ]
    found = {(tuple(e["case"]), e["part"], e["use"]): e for e in differences(rows)}
    entry = found[("gate", "none"), "test", "usual"]
    assert entry["seeds"] == 1
    assert entry["difference"] == pytest.approx(-0.1)  # seed 1: nobody is refined
    whole = found[("", "whole merger"), "test", "usual"]
    assert whole["accuracy"] == pytest.approx((0.75 + 0.75) / 2)  # seed 0: .85 - .1 refined
    assert "| gate | none (seeds: 1) |" in markdown(differences(rows))


# ---------------------------------------------------------------------------- the whole of it


@pytest.fixture
def small(monkeypatch, tmp_path):
    """One small setting, two cases."""
    zoo = ZooOptions(
        widths=(16,),
        members=(2,),
        segment_size=150,
        epochs=(10.0,),
        train_families=6,
        validation_families=4,
        test_families=3,
        out=str(tmp_path / "zoo"),
    )
    short = {**SETTINGS["digits"].options, "probes": 16, "families": 3, "steps": 2}
    monkeypatch.setitem(SETTINGS, "digits", Setting("small digits", zoo, short))
    cases = (WHOLE, Case("gate", "none", {"gate": False}), Case("alignment", "none", aligned=False))
    monkeypatch.setattr(running, "CASES", cases)
    return AblationOptions(out=str(tmp_path / "out"), settings=("digits",), seeds=(0, 1))


def test_a_table_is_made_and_what_is_finished_is_not_made_again(small, tmp_path, monkeypatch):
    first = ablate(replace(small, seeds=(0,)), Console(quiet=True))
    assert {entry["seeds"] for entry in first["differences"]} == {1}
    lines = (tmp_path / "out" / "rows.jsonl").read_text().splitlines()
    assert len(lines) == 3
    told = json.loads(lines[0])["row"]
    assert len(told["validation"]["at once"]) == 4
    assert len(told["test"]["at once"]) == 3
    done = ablate(small, Console(quiet=True))
    assert (tmp_path / "out" / "rows.jsonl").read_text().splitlines()[:3] == lines
    assert {entry["seeds"] for entry in done["differences"]} == {2}
    monkeypatch.setattr(running, "fit", None)  # nothing is left to train
    again = ablate(small, Console(quiet=True))
    assert again == done
    assert json.loads((tmp_path / "out" / "ablations.json").read_text()) == done
    told = (tmp_path / "out" / "ablations.md").read_text()
    assert "small digits; 4 validation and 3 test families, seeds: 2:" in told
    assert (tmp_path / "out" / "ablations.png").stat().st_size > 10_000
    assert not list((tmp_path / "out" / "training").iterdir())


def test_marks_of_several_settings_stand_side_by_side():
    entries = [
        {
            **{"setting": name, "case": case, "part": part, "use": use, "accuracy": 0.9},
            **{"difference": 0.01, "half_width": 0.002, "agree": True, "seeds": 3, "families": 8},
        }
        for name in SETTINGS
        for case in (["", "whole merger"], ["gain", "none"], ["refit", "none"])
        for part, use in COLUMNS.values()
    ]
    (axes,) = ablations_figure(entries).axes
    heights = [bars.lines[0].get_ydata() for bars in axes.containers]
    several = len(SETTINGS)
    assert len(heights) == several > 2
    assert [sum(own) / several for own in zip(*heights, strict=True)] == pytest.approx([0, 1])
    assert all(len({round(h, 3) for h in own}) == several for own in zip(*heights, strict=True))


def test_unaligned_families_are_those_of_the_zoo(small):
    zoo = running.build_with_progress(SETTINGS["digits"].zoo, Console(quiet=True))
    grounds = running._grounds(zoo)
    (raw,) = unaligned(grounds.test, zoo, "test")
    stored = zoo.families("test", 2)
    assert all(torch.equal(raw.weights[key], tensor) for key, tensor in stored.items())
    assert not all(torch.equal(grounds.test[0].weights[k], t) for k, t in stored.items())


@pytest.mark.parametrize(
    ("wrong", "told"),
    [({"settings": ("cifar",)}, "settings: got 'cifar'"), ({"parts": ("gates",)}, "parts: got")],
)
def test_names_that_there_are_none_of_are_refused(wrong, told):
    with pytest.raises(ConfigError, match=told):
        AblationOptions(**wrong)
