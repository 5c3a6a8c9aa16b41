"""Scores of classifiers by hand, beside scikit-learn, and beside loops in float64."""

import math

import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss, recall_score

from evaluation.metrics import (
    accuracy,
    agreement,
    calibration_error,
    class_accuracies,
    classification_scores,
    mixture_accuracies,
    negative_log_likelihood,
    read_answers,
    references,
    reliability,
    soft_vote,
)


def test_the_accuracy_of_four_images():
    logits = torch.tensor([[0.1, 0.9], [3.0, 1.0], [-1.0, -2.0], [0.0, 5.0]])
    assert float(accuracy(logits, torch.tensor([1, 0, 1, 1]))) == 0.75
    stacked = torch.stack([logits, -logits])[:, None]  # [2, 1, 4, 2]
    assert accuracy(stacked, torch.tensor([1, 0, 1, 1])).tolist() == [[0.75], [0.25]]


def test_references_of_one_family():
    targets = torch.tensor([0, 1, 0, 1])
    # Logits of class 0; class 1 has 0. Probabilities of 10, 2, 0.1: 1.00, 0.88, 0.52.
    margins = torch.tensor(
        [
            [10.0, -0.1, 10.0, -0.1],  # right, right, right, right
            [-2.0, 10.0, -0.1, -2.0],  # wrong, wrong, wrong, right
            [-2.0, -0.1, -0.1, 10.0],  # wrong, right, wrong, wrong
        ]
    )
    logits = torch.stack([margins, torch.zeros_like(margins)], -1)[None]
    # Sums of probabilities of class 0: 1.24, 1.95, 1.95, 1.59, where 1.5 is half. The first is
    # wrong although the sum of logits is above 0, the third right against two of three votes.
    found = references(logits, targets)
    assert {key: value.tolist() for key, value in found.items()} == {
        "best_member": [1.0],
        "mean_member": [pytest.approx((1 + 0.25 + 0.25) / 3)],
        "ensemble": [0.25],
    }


def test_references_are_those_of_each_family():
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(3, 4, 50, 5, generator=generator), torch.arange(50) % 5
    together = references(logits, targets)
    for family in range(3):
        alone = references(logits[family : family + 1], targets)
        assert {k: v.item() for k, v in alone.items()} == {
            k: v[family].item() for k, v in together.items()
        }
    assert (together["best_member"] >= together["mean_member"]).all()


def drawn(*shape, seed=0, classes=5, scale=3.0):
    """Logits in float64 and classes, most of them right."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(*shape, classes, generator=generator, dtype=torch.float64)
    targets = torch.randint(classes, shape[-1:], generator=generator)
    return logits + 3 * torch.nn.functional.one_hot(targets, classes), targets


def slow_calibration_error(logits, targets, bins):
    """As in the paper, input by input."""
    members = [[] for _ in range(bins)]
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        top = max(row)
        total = sum(math.exp(value - top) for value in row)
        for place in range(bins):
            if place / bins < 1 / total <= (place + 1) / bins:
                members[place].append((1 / total, row.index(top) == target))
    gaps = [
        abs(sum(c for c, _ in own) / len(own) - sum(r for _, r in own) / len(own)) * len(own)
        for own in members
        if own
    ]
    return sum(gaps) / len(targets)


def test_the_loss_of_two_images_by_hand():
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]], dtype=torch.float64)
    expected = (math.log(2) + math.log(4 / 3)) / 2  # of probabilities 1/2 and 3/4
    assert float(negative_log_likelihood(logits, torch.tensor([1, 0]))) == pytest.approx(expected)


def test_calibration_of_four_images_by_hand():
    # Confidences .5, .9, .9, .6 in two bins (0, .5] and (.5, 1]; right: yes, yes, no, yes.
    chances = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.9, 0.1], [0.4, 0.6]], dtype=torch.float64)
    targets = torch.tensor([0, 0, 1, 1])
    bins = reliability(chances.log(), targets, bins=2)
    assert bins.share.tolist() == [0.25, 0.75]
    assert bins.confidence.tolist() == [pytest.approx(0.5), pytest.approx(0.8)]
    assert bins.accuracy.tolist() == [1.0, pytest.approx(2 / 3)]
    expected = 0.25 * 0.5 + 0.75 * (0.8 - 2 / 3)
    assert float(calibration_error(chances.log(), targets, bins=2)) == pytest.approx(expected)


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_the_calibration_error_is_that_of_a_loop_over_images(bins):
    logits, targets = drawn(3, 200)
    found = calibration_error(logits, targets, bins=bins)
    for own, value in zip(logits, found, strict=True):
        assert float(value) == pytest.approx(slow_calibration_error(own, targets, bins), abs=1e-12)


def test_bins_without_images_have_no_accuracy_and_do_not_count():
    bins = reliability(torch.tensor([[50.0, 0.0]]), torch.tensor([0]), bins=4)
    assert bins.share.tolist() == [0, 0, 0, 1]
    assert bins.accuracy.isnan().tolist() == [True, True, True, False]
    assert float(calibration_error(torch.tensor([[50.0, 0.0]]), torch.tensor([0]))) == 0


def test_scores_are_those_of_scikit_learn():
    logits, targets = drawn(2, 3, 120)
    scores = classification_scores(logits, targets)
    for i in range(2):
        for j in range(3):
            said, chances = logits[i, j].argmax(-1), logits[i, j].softmax(-1)
            own = {name: value[i, j] for name, value in scores.items()}
            assert float(own["accuracy"]) == pytest.approx(accuracy_score(targets, said))
            expected = log_loss(targets, chances, labels=range(5))
            assert float(own["negative_log_likelihood"]) == pytest.approx(expected, abs=1e-12)
            recalls = recall_score(targets, said, average=None)
            assert own["class_accuracies"].tolist() == pytest.approx(recalls.tolist())


def test_scores_at_once_are_those_of_the_single_functions():
    logits, targets = drawn(4, 90)
    scores = classification_scores(logits, targets, bins=9)
    single = accuracy(logits, targets), class_accuracies(logits, targets)  # of 90 float32 shares
    for name, found in zip(("accuracy", "class_accuracies"), single, strict=True):
        assert torch.allclose(scores[name], found.double(), atol=1e-7)
    assert torch.equal(scores["negative_log_likelihood"], negative_log_likelihood(logits, targets))
    assert torch.equal(scores["calibration_error"], calibration_error(logits, targets, bins=9))


def test_a_network_that_says_nothing_is_not_right_everywhere():
    logits, targets = torch.zeros(8, 4), torch.arange(8) % 4  # all logits are equal
    assert float(classification_scores(logits, targets)["accuracy"]) == 0.25


def test_networks_may_number_classes_by_themselves():
    logits, targets = drawn(2, 60)
    own = torch.stack([targets, 4 - targets])
    scores = classification_scores(torch.stack([logits[0], logits[0].flip(-1)]), own)
    for name in ("accuracy", "negative_log_likelihood", "calibration_error"):
        assert float(scores[name][0]) == pytest.approx(float(scores[name][1]), abs=1e-12)
    first, second = scores["class_accuracies"]
    assert torch.equal(first, second.flip(0))


def test_a_class_without_images_has_no_accuracy():
    found = class_accuracies(torch.eye(3)[[0, 0, 2]], torch.tensor([0, 1, 0]))
    assert found.tolist() == [0.5, 0.0, pytest.approx(math.nan, nan_ok=True)]


def test_segments_are_scored_on_their_own_images():
    logits, targets = torch.eye(3)[[0, 1, 1, 2]], torch.tensor([0, 1, 2, 2])
    segments = [torch.tensor([0, 1]), torch.tensor([2, 3, 1])]
    found = classification_scores(logits, targets, segments=segments)["segment_accuracies"]
    assert found.tolist() == [1.0, pytest.approx(2 / 3)]


def test_the_accuracy_on_a_segment_follows_its_classes():
    by_class = torch.tensor([0.5, 1.0, torch.nan])
    counts = torch.tensor([[10, 10, 0], [0, 5, 0], [0, 0, 1]])
    found = mixture_accuracies(by_class, counts)
    assert found[:2].tolist() == [0.75, 1.0]
    assert found[2].isnan()


def test_the_soft_vote_is_the_mean_of_probabilities():
    logits, _ = drawn(2, 4, 30)
    expected = logits.softmax(-1).mean(1)
    assert torch.allclose(soft_vote(logits).exp(), expected, atol=1e-12)
    far = torch.tensor([[[900.0, 0.0]], [[0.0, 900.0]]])  # no overflow
    assert soft_vote(far).tolist() == [[pytest.approx(-math.log(2)), pytest.approx(-math.log(2))]]


def test_agreement_counts_equal_answers():
    one = torch.eye(3)[[0, 1, 2, 0]]
    assert float(agreement(one, torch.eye(3)[[0, 1, 1, 2]])) == 0.5
    assert agreement(torch.stack([one, one.roll(1, -1)]), one).tolist() == [1.0, 0.0]


def test_of_equal_logits_the_first_is_the_answer_whatever_stands_beside_them():
    tied = torch.tensor([[2.0, 2.0, 1.0], [0.0, 3.0, 3.0]])
    diverged = torch.tensor([[float("nan"), 0.0, 1.0], [float("inf"), 0.0, 1.0]])
    logits = torch.stack([tied, diverged])
    for classes in ([0, 1], [1, 2], [2, 0]):
        targets = torch.tensor(classes)
        right = read_answers(logits, targets).right
        assert torch.equal(right, (logits.argmax(-1) == targets).float())
