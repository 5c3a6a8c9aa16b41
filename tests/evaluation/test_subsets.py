"""What trainings of subsets came to, worked out by hand."""

import pytest
import torch

from evaluation.pictures.subsets import subsets_figures
from evaluation.side_by_side import fastest
from evaluation.subsets import (
    cells,
    interval,
    joined,
    markdown,
    ratios,
    steps_to,
    summary,
)

SECONDS = {"full": 0.2, "first": 0.1}


def row(mask, seeds=(0,), *, validation, moved, same=None, test=0.5, start="init", **others):
    count, steps = len(seeds), [0, 10, 20]
    curves = {"train": validation, "validation": validation, "displacement": moved}
    curves |= {"same": same, "cosine": [0, 1, 1]} if same else {}
    return {
        "start": start,
        "mask": mask,
        "seeds": list(seeds),
        "steps": steps,
        "curves": {name: [own] * count for name, own in curves.items()},
        "test": [test] * count,
        "live": 50 if same else 100,
        "weights": 100,
        "norm": [2.0] * count,
        **others,
    }


FULL = {"validation": [2.0, 1.0, 0.5], "moved": [0, 2, 4]}
FIRST = {"validation": [2.0, 1.5, 0.5], "moved": [0, 3, 4], "same": [0, 1, 2]}


def test_rows_of_several_seeds_are_joined_in_order():
    rows = [row("first", (2,), test=0.3, **FIRST), row("full", (0, 1), **FULL)]
    rows += [row("first", (0, 1), test=0.1, **FIRST), row("full", (2,), test=0.9, **FULL)]
    full, first = joined(rows, ["full", "first", "weak"])
    assert (full["mask"], full["seeds"], full["test"]) == ("full", [0, 1, 2], [0.5, 0.5, 0.9])
    assert first["test"] == [0.1, 0.1, 0.3]
    assert first["steps"] == [0, 10, 20]
    assert len(first["curves"]["same"]) == 3


def test_an_interval_is_that_of_student():
    """Of 1 and 3: mean 2, standard error 1, and t with one degree of freedom is 12.706."""
    mean, wide = interval(torch.tensor([[1.0], [3.0]]))
    assert mean.item() == 2
    assert wide.item() == pytest.approx(12.706, abs=1e-3)
    assert interval(torch.tensor([[1.0]]))[1].item() == 0


def test_displacements_are_compared_by_steps_and_by_seconds():
    full, first = row("full", **FULL), row("first", **FIRST)
    assert ratios(first, full).tolist() == [[3, 2]]
    # At half the seconds of a step, step 10 meets step 5 of the whole training, and 20 meets 10.
    assert ratios(first, full, 0.5).tolist() == [[3 / 0.5, 4 / 1]]
    assert ratios(first, full, 2.0)[0, 1].isnan()  # beyond the end of the whole training


def test_steps_to_a_loss_are_read_off_the_line_between_marks():
    assert steps_to(row("full", **FULL), 1.5) == 5
    assert steps_to(row("full", **FULL), 0.4) is None
    assert steps_to(row("full", **FULL), 3.0) == 0


def test_a_summary_by_hand():
    full = row("full", (0, 1), test=0.8, **FULL)
    first = row("first", (0, 1), test=0.7, **FIRST)
    told = {entry["mask"]: entry for entry in summary([full, first], SECONDS)}
    own = told["first"]
    assert own["live"] == 0.5
    assert own["speed"] == 2
    assert own["beyond"] == pytest.approx(-0.1)
    assert own["beyond_width"] == pytest.approx(0)
    assert own["moved_early"] == 3
    assert own["moved_end"] == 2
    assert own["moved_seconds"] == 4  # step 20 of the mask and step 10 of the whole training
    assert own["steps_to"] == 15  # the whole training is at 1.0 after half of its steps
    assert own["seconds_to"] == pytest.approx(15 * 0.1 / (10 * 0.2))
    assert told["full"]["seconds_to"] == 1
    assert "moved_end" not in told["full"]
    assert cells(own)[:3] == ["50", "2.00", "3.00 ± 0.00"]


def test_restarts_tell_how_far_they_went():
    left = {"loss_before": [0.5], "loss_after": [0.4], "barrier": [0.01]}
    rows = [row("full", start="converged", **FULL, **left)]
    rows += [row("first", start="converged", **FIRST, **left)]
    own = summary(rows, SECONDS)[1]
    assert own["gone"] == 2  # 4 away, from a norm of 2
    assert own["barrier"] == pytest.approx(0.01)
    assert "| `first` | 50 | 200 ± 0 |" in markdown([own])


def test_a_network_that_was_there_at_once_has_no_seconds_to_compare_with():
    """Restarted from its end it starts below the loss that it has later."""
    worse = {"validation": [0.4, 0.5, 0.6], "moved": [0, 2, 4]}
    told = summary([row("full", start="converged", **worse)], SECONDS)[0]
    assert told["steps_to"] == 0
    assert "seconds_to" not in told


def test_pictures_have_a_column_per_kind_of_mask():
    masks = ("first", "random", "weak", "random-weights", "first~20", "halves")
    seconds = dict.fromkeys(("full", *masks), 0.1)
    rows = [row("full", **FULL), *(row(mask, **FIRST) for mask in masks)]
    figures = dict(subsets_figures(rows, seconds, title="x"))
    assert list(figures) == ["init-steps", "init-seconds"]
    panels = figures["init-steps"].axes
    assert len(panels) == 3 * 5
    titles = [axes.get_title() for axes in panels[:5]]
    assert titles[0] == "by their place"
    assert titles[-1] == "rotating"
    assert panels[0].lines[1].get_ydata().tolist() == [2.0, 1.5, 0.5]
    assert panels[10].lines[0].get_ydata().tolist() == [3, 2]


def test_work_is_timed_by_turns_and_the_fastest_turn_counts():
    seen = []
    found = fastest({name: lambda name=name: seen.append(name) for name in "ab"}, 3)
    assert seen == list("abababab")
    assert min(found.values()) >= 0
