"""Differences between rows: intervals that cover, p-values by hand, corrections, references."""

from math import atan, pi
from statistics import mean, stdev

import pytest
import torch

from evaluation.scored import Scored, over_seeds
from evaluation.significance import (
    against_reference,
    bootstrap_interval,
    find_reference,
    holm,
    paired_t_p,
)
from metamerge.errors import ConfigError


def row(method, accuracies, *, data="none", control=False):
    return Scored(method, 4, data, torch.tensor(accuracies), 0.1, 10, control)


ROWS = [
    row("gnn", [0.80, 0.82, 0.84, 0.86]),
    row("vote", [0.70, 0.75, 0.73, 0.78], control=True),
    row("average", [0.80, 0.81, 0.85, 0.86]),
]


def test_differences_are_means_of_paired_gaps():
    told = against_reference(ROWS, ROWS[0])
    assert [one.mean for one in told] == pytest.approx([0.0, -0.09, 0.0], abs=1e-6)
    assert {one.against for one in told} == {"gnn"}
    assert told[0].p is None
    assert told[1].low < -0.09 < told[1].high < 0
    assert told[1].significant
    assert not told[2].significant


def test_a_pairs_spread_counts_and_not_that_of_the_families():
    """Families differ by 6 points, gaps not at all."""
    better = row("better", [0.81, 0.83, 0.85, 0.87])
    told = against_reference([ROWS[0], better], ROWS[0])[1]
    assert told.low == pytest.approx(0.01, abs=1e-6)
    assert told.high == pytest.approx(0.01, abs=1e-6)
    assert told.p == pytest.approx(0.0, abs=1e-6)


def test_one_family_has_a_difference_and_no_interval():
    rows = [row("gnn", [0.8]), row("vote", [0.7])]
    told = against_reference(rows, rows[0])[1]
    assert told.mean == pytest.approx(-0.1, abs=1e-6)
    assert (told.low, told.high, told.p, told.significant) == (None, None, None, False)


def test_p_is_that_of_students_paired_test():
    """Gaps of mean .09 and standard error .00913; with 3 degrees of freedom t has a closed form."""
    gaps = [0.10, 0.07, 0.11, 0.08]
    x = mean(gaps) / (stdev(gaps) / 2) / 3**0.5
    expected = 1 - 2 / pi * (x / (1 + x**2) + atan(x))
    p = paired_t_p(torch.tensor([gaps, [-g for g in gaps], [0.0] * 4], dtype=torch.float64))
    assert p.tolist() == pytest.approx([expected, expected, 1.0], abs=1e-9)


def test_holm_by_hand():
    """Sorted .01, .02, .03 times 3, 2, 1: .03, .04, .04 (never falling); then cut at 1."""
    assert holm(torch.tensor([0.03, 0.01, 0.02])).tolist() == pytest.approx([0.04, 0.03, 0.04])
    assert holm(torch.tensor([0.9, 0.8])).tolist() == [1.0, 1.0]
    assert holm(torch.tensor([])).tolist() == []


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    """400 draws of 8 families: 95 % within 4 standard errors of a share, 1.09 points each."""
    generator = torch.Generator().manual_seed(0)
    gaps = 0.3 + torch.randn(400, 8, generator=generator, dtype=torch.float64)
    low, high = bootstrap_interval(gaps)
    covered = float(((low < 0.3) & (high > 0.3)).double().mean())
    assert 0.95 - 4 * 0.0109 < covered <= 0.95 + 4 * 0.0109


def test_the_reference_is_found_by_method_label_or_being_best():
    few = row("refit", [0.9] * 4, data="unlabelled:100")
    many = row("refit", [0.95] * 4, data="unlabelled:500")
    control = row("ceiling", [0.99] * 4, control=True)
    rows = [*ROWS, few, many, control]
    assert find_reference(rows, "vote") is rows[1]
    assert find_reference(rows, "refit") is few
    assert find_reference(rows, "refit, unlabelled:500") is many
    assert find_reference(rows, "best") is many
    with pytest.raises(ConfigError, match="no row 'votes'"):
        find_reference(rows, "votes")


def test_seeds_are_averaged_family_by_family_and_their_spread_is_kept():
    """By hand: means over families .7 and .8, their standard deviation .0707."""
    one = over_seeds([row("a", [0.6, 0.8]), row("a", [0.9, 0.7])])
    assert one.accuracies.tolist() == pytest.approx([0.75, 0.75])
    assert one.by_seed == pytest.approx((0.7, 0.8))
    told = one.row()
    assert (told["seeds"], told["accuracy_seed_std"]) == (2, pytest.approx(0.070711, abs=1e-6))
    assert ROWS[0].row()["seeds"] == 1
    assert Scored.from_record(one.record()).row() == told
