"""Trainings in rounds: what they came to, worked out by hand, and their pictures."""

import json

import pytest

from evaluation.rounds import (
    PictureOptions,
    borrow_unions,
    chosen,
    compared,
    rounds_figure,
    summary,
    write_rounds,
)
from metamerge.errors import ConfigError


def row(test, validation=None, *, members=4, seed=0, lr=0.1, images=100, union=None):
    curve = {"test": test, "validation": validation or test, "images": [images] * len(test)}
    told = {"members": members, "seed": seed, "lr": lr, "images": images, "curve": curve}
    told |= {"bytes_per_round": 1_000_000 * members}
    return told | ({"union": row(union)} if union else {})


def test_rates_are_chosen_on_validation_images_for_all_seeds_at_once():
    rows = [
        row([0.5], [0.80], lr=0.1),
        row([0.9], [0.70], lr=0.2),
        row([0.5], [0.60], lr=0.1, seed=1),
        row([0.9], [0.69], lr=0.2, seed=1),  # means 0.70 and 0.695; by test it would be the other
    ]
    assert {own["lr"] for own in chosen(rows)[4]} == {0.1}


def test_a_summary_by_hand():
    """Means by rounds 0.6, 0.83, 0.85; the union ends at 0.84, so 0.83 is within a point."""
    rows = [
        row([0.5, 0.80, 0.84], union=[0.7, 0.83]),
        row([0.7, 0.86, 0.86], seed=1, union=[0.8, 0.85]),
    ]
    (told,) = summary(rows)
    assert told["members"] == 4
    assert told["seeds"] == 2
    assert told["test_mean"] == pytest.approx(0.85, abs=1e-6)
    assert told["test_std"] == pytest.approx(0.01 * 2**0.5, abs=1e-6)
    assert told["union_mean"] == pytest.approx(0.84, abs=1e-6)
    assert told["rounds_to_union"] == 2
    assert told["bytes_to_union"] == 8_000_000
    assert told["bytes"] == 12_000_000


def test_what_is_never_reached_is_none():
    (told,) = summary([row([0.5, 0.6], union=[0.9])])
    assert told["rounds_to_union"] is None
    assert told["bytes_to_union"] is None


def test_unions_are_borrowed_by_those_who_saw_as_much():
    series = {
        "lends": [row([0.5, 0.6], union=[0.9])],
        "same": [row([0.4, 0.5])],
        "other seed": [row([0.4, 0.5], seed=1)],
        "fewer rounds": [row([0.4])],
    }
    borrow_unions(series)
    assert series["same"][0]["union"] == series["lends"][0]["union"]
    assert "union" not in series["other seed"][0]
    assert "union" not in series["fewer rounds"][0]


def test_the_picture_has_two_panels_and_a_band_per_series():
    rows = [row([0.5, 0.8], union=[0.7, 0.9]), row([0.6, 0.9], seed=1, union=[0.7, 0.9])]
    figure = rounds_figure({"a": rows, "b": rows}, title="both", margin=1.0)
    left, right = figure.axes
    assert len(left.collections) == len(right.collections) == 2
    mean = left.lines[0]
    assert mean.get_xdata().tolist() == [1, 2]
    assert mean.get_ydata().tolist() == pytest.approx([55, 85], abs=1e-4)
    assert right.lines[0].get_xdata().tolist() == [4, 8]
    assert right.get_xscale() == "log"
    assert [text.get_text() for text in left.get_legend().get_texts()] == [
        *("a", "training on the union", "b")
    ]


def test_several_trainings_are_read_beside_each_other(tmp_path, capsys):
    told = {"options": {"method": "average", "outer": "averaging"}, "task": "digits"}
    write_rounds(tmp_path / "one", [row([0.5, 0.8], union=[0.7, 0.9])], told)
    write_rounds(tmp_path / "two", [row([0.4, 0.7]), row([0.4, 0.6], members=8)], told)
    assert (tmp_path / "one" / "rounds.png").stat().st_size > 10_000
    runs = (f"first={tmp_path / 'one'}", f"second={tmp_path / 'two'}")
    compared(PictureOptions(runs=runs, out=str(tmp_path / "deep" / "both")))
    written = json.loads((tmp_path / "deep" / "both.json").read_text())
    assert list(written) == ["first", "second, K = 4", "second, K = 8"]
    assert written["second, K = 4"]["union_mean"] == pytest.approx(0.9, abs=1e-6)
    assert (tmp_path / "deep" / "both.png").exists()
    assert "second, K = 8" in capsys.readouterr().out


@pytest.mark.parametrize("runs", [(), ("gone=nowhere",)])
def test_runs_that_cannot_be_read_are_refused(runs):
    with pytest.raises(ConfigError, match="runs: "):
        compared(PictureOptions(runs=runs))
