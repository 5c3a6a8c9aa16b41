"""The threshold objective by hand, and the Wilson bound beside SciPy's."""

from math import e, log

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binomtest, norm

from metamerge.errors import ConfigError
from metamerge.mergers import ThresholdObjective, wilson_lower_bound

BEST, ENSEMBLE = torch.tensor([0.5, 0.9]), torch.tensor([0.7, 0.97])


@pytest.mark.parametrize(
    ("reference", "margin", "expected"),
    [
        ("absolute", 0.8, [0.8, 0.8]),
        ("best_member", 0.05, [0.55, 0.95]),
        ("ensemble", 0.05, [0.75, 1.0]),  # no accuracy is above 1
        ("ensemble", -0.1, [0.6, 0.87]),
    ],
)
def test_thresholds_by_hand(reference, margin, expected):
    found = ThresholdObjective(reference, margin).thresholds(BEST, ENSEMBLE)
    assert found.tolist() == pytest.approx(expected)


def three_families():
    """Logits of three families on four images: all right, half of them right, all wrong."""
    targets = torch.tensor([0, 1, 0, 1])
    right = F.one_hot(targets, 2).float()
    wrong = 1 - right
    half = torch.cat([right[:2], wrong[2:]])
    return torch.stack([right, half, wrong]), targets


def test_the_accuracy_of_every_family_is_counted():
    _, accuracy = ThresholdObjective().loss(*three_families(), torch.zeros(3))
    assert accuracy.tolist() == [1.0, 0.5, 0.0]


def test_families_far_below_their_threshold_count_in_full_and_those_far_above_not_at_all():
    logits, targets = three_families()
    high = log(1 + e)  # cross entropy of a wrong image; of a right one it is 1 less
    loss, _ = ThresholdObjective().loss(logits[1:], targets, torch.tensor([1.0, 0.6]))
    assert float(loss) == pytest.approx((high - 1 / 2 + high) / 2)
    loss, _ = ThresholdObjective().loss(logits, targets, torch.tensor([0.4, -0.1, -0.6]))
    assert float(loss) == pytest.approx(0.0, abs=1e-10)


def test_a_family_at_its_threshold_counts_half():
    logits, targets = three_families()
    loss, accuracy = ThresholdObjective(softness=0.3).loss(logits[1:2], targets, torch.ones(1) / 2)
    full = F.cross_entropy(logits[1], targets)
    assert float(accuracy) == 0.5
    assert float(loss) == pytest.approx(float(full) / 2)


def test_with_headroom_a_family_counts_half_only_beyond_its_threshold():
    logits, targets = three_families()
    objective = ThresholdObjective(softness=0.02, headroom=0.2)
    for threshold, weight in ((0.5, 1.0), (0.3, 0.5), (0.1, 0.0)):
        loss, _ = objective.loss(logits[1:2], targets, torch.tensor([threshold]))
        full = F.cross_entropy(logits[1], targets)
        assert float(loss) == pytest.approx(weight * float(full), abs=1e-4)  # sigmoid(-10)


def test_headroom_does_not_ask_for_more_than_every_image():
    logits, targets = three_families()
    full = float(F.cross_entropy(logits[0], targets))
    loss, accuracy = ThresholdObjective(headroom=0.2).loss(logits[:1], targets, torch.ones(1))
    assert float(accuracy) == 1.0
    assert float(loss) == pytest.approx(full / 2)


def test_headroom_does_not_move_the_threshold():
    found = ThresholdObjective("ensemble", 0.05, headroom=0.1).thresholds(BEST, ENSEMBLE)
    assert found.tolist() == pytest.approx([0.75, 1.0])


def test_softness_is_the_distance_over_which_a_family_fades_out():
    logits, targets = three_families()
    full = float(F.cross_entropy(logits[1], targets))
    for softness in (0.05, 0.2):
        objective = ThresholdObjective(softness=softness)
        for steps, weight in ((1, 0.7310586), (-1, 0.2689414), (-3, 0.0474259)):  # sigmoid(steps)
            threshold = torch.tensor([0.5 + steps * softness])
            found = objective.loss(logits[1:2], targets, threshold)[0]
            assert float(found) == pytest.approx(weight * full, rel=1e-5)


def test_only_families_below_their_threshold_get_a_gradient():
    logits, targets = three_families()
    logits.requires_grad_()
    thresholds = torch.tensor([0.5, 0.9, 0.5])  # above, below, below; softness 0.02
    ThresholdObjective().loss(logits, targets, thresholds)[0].backward()
    assert float(logits.grad[0].abs().max()) < 1e-10  # sigmoid(-25) is 1e-11
    for family in (1, 2):
        own = logits[family].detach().requires_grad_()
        (F.cross_entropy(own, targets) / 3).backward()
        assert torch.allclose(logits.grad[family], own.grad, atol=1e-7)


# ---------------------------------------------------------------------------- kinds of targets


def test_classes_may_be_numbered_by_every_family():
    logits, targets = three_families()
    own = torch.stack([targets, 1 - targets, targets])
    thresholds = torch.tensor([0.9, 0.5, 0.1])
    loss, accuracy = ThresholdObjective(softness=0.3).loss(logits, own, thresholds)
    assert accuracy.tolist() == [1.0, 0.5, 0.0]
    swapped = torch.stack([logits[0], logits[1].flip(-1), logits[2]])
    expected, _ = ThresholdObjective(softness=0.3).loss(swapped, targets, thresholds)
    assert float(loss) == pytest.approx(float(expected))
    everyone = targets.expand(3, -1)
    same, _ = ThresholdObjective(softness=0.3).loss(logits, everyone, thresholds)
    assert float(same) == float(
        ThresholdObjective(softness=0.3).loss(logits, targets, thresholds)[0]
    )


def test_probabilities_that_are_certain_are_classes():
    logits, targets = three_families()
    own = torch.stack([targets, 1 - targets, targets])
    thresholds = torch.tensor([0.9, 0.5, 0.1])
    objective = ThresholdObjective(softness=0.3)
    loss, agreement = objective.loss(logits, F.one_hot(own, 2).float(), thresholds)
    expected, accuracy = objective.loss(logits, own, thresholds)
    assert float(loss) == pytest.approx(float(expected))
    assert torch.equal(agreement, accuracy)


def test_probabilities_are_imitated_by_hand():
    wanted = torch.tensor([[[0.75, 0.25], [0.5, 0.5]]])
    logits = torch.tensor([[[log(3), 0.0], [0.0, log(3)]]])  # probabilities 3/4 1/4 and 1/4 3/4
    loss, agreement = ThresholdObjective().loss(logits, wanted, torch.ones(1))
    first = -(0.75 * log(0.75) + 0.25 * log(0.25))
    second = -(0.5 * log(0.25) + 0.5 * log(0.75))
    assert float(loss) == pytest.approx((first + second) / 2)  # sigmoid(25) is 1
    assert float(agreement) == 0.5  # of the second, the first of two equals is the likeliest


def test_probabilities_get_no_gradient_at_what_they_ask_for():
    wanted = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(0)).softmax(-1)
    logits = wanted.log().requires_grad_()
    ThresholdObjective(headroom=1.0).loss(logits, wanted, torch.ones(2))[0].backward()
    assert float(logits.grad.abs().max()) < 1e-7


# ---------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"reference": "mean"}, "reference: got 'mean'"),
        ({"reference": "absolute", "margin": 0.0}, "margin"),
        ({"reference": "absolute", "margin": 1.5}, "margin"),
        ({"reference": "absolute", "margin": float("nan")}, "margin"),
        ({"margin": float("nan")}, "margin"),
        ({"margin": float("inf")}, "margin"),
        ({"headroom": float("nan")}, "headroom"),
        ({"softness": 0.0}, "softness"),
        ({"softness": -0.1}, "softness"),
        ({"softness": float("nan")}, "softness"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, told):
    with pytest.raises(ConfigError, match=told):
        ThresholdObjective(**settings)


# ---------------------------------------------------------------------------- Wilson's bound


def test_wilson_bounds_by_hand():
    # Nothing failed: 1 / (1 + z^2 / n), with z = 2 and n = 16 that is 1 / (1 + 1/4).
    assert wilson_lower_bound(16, 16, z=2) == pytest.approx(0.8)
    # Half of 12 with z = 2: (1/2 + 1/6 - 2 sqrt(1/48 + 1/144)) / (4/3) = (2/3 - 1/3) * 3/4.
    assert wilson_lower_bound(6, 12, z=2) == pytest.approx(0.25)
    assert wilson_lower_bound(0, 5) == 0.0
    assert wilson_lower_bound(0, 0) == 0.0


@pytest.mark.parametrize("trials", [1, 2, 7, 24, 1000])
def test_the_wilson_bound_is_that_of_scipy(trials):
    z = float(norm.ppf(0.975))
    for successes in {0, 1, trials // 2, trials - 1, trials}:
        interval = binomtest(successes, trials).proportion_ci(method="wilson")
        found = wilson_lower_bound(successes, trials, z)
        assert found == pytest.approx(interval.low, abs=1e-12)


def test_more_families_at_the_same_share_raise_the_bound():
    bounds = [wilson_lower_bound(9 * n, 10 * n) for n in (1, 2, 10, 100)]
    assert bounds == sorted(bounds)
    assert bounds[-1] < 0.9
