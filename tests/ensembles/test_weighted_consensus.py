from math import inf

import pytest
import torch

from metamerge.ensembles import Seen, soft_vote, weighted_consensus
from metamerge.errors import ConfigError

# Two members, two inputs, two classes: the first is sure and right, the second unsure.
LOGITS = torch.tensor([[[0.9, 0.1], [0.1, 0.9]], [[0.5, 0.5], [0.5, 0.5]]]).log()
LABELS = torch.tensor([0, 1])


def weights(**options):
    return weighted_consensus(Seen(LOGITS), LABELS, **options).weights


def test_inverse_losses_of_four_numbers():
    first, second = -torch.tensor(0.9).log(), -torch.tensor(0.5).log()
    assert weights(by="inverse").tolist() == pytest.approx(
        [float(second / (first + second)), float(first / (first + second))]
    )


def test_a_softmax_of_losses_of_four_numbers():
    # exp(-loss) at temperature 1 is the geometric mean of the true classes' probabilities
    assert weights(temperature=1.0).tolist() == pytest.approx([0.9 / 1.4, 0.5 / 1.4])
    assert weights(temperature=1e-3).tolist() == pytest.approx([1, 0])
    assert weights(temperature=inf).tolist() == [0.5, 0.5]


def test_the_consensus_is_the_weighted_mean_of_probabilities():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(3, 30, 4, generator=generator), torch.arange(30) % 4
    made = weighted_consensus(Seen(logits), labels, temperature=0.1)
    expected = sum(
        float(w) * member.double().softmax(-1)
        for w, member in zip(made.weights, logits, strict=True)
    )
    assert torch.allclose(made(Seen(logits)).exp().double(), expected, atol=1e-6)


def test_members_are_equal_where_weights_do_not_mend_an_error():
    report = {}
    found = weighted_consensus(Seen(LOGITS), LABELS, report=report)
    assert found.weights.tolist() == [0.5, 0.5]
    assert report["temperature"] == "inf"
    assert torch.allclose(found(Seen(LOGITS)).exp(), soft_vote(LOGITS))


def test_a_member_that_is_surely_wrong_is_left_out():
    wrong = LOGITS.flip(-1)[:1].expand(2, -1, -1)
    made = weighted_consensus(Seen(torch.cat([LOGITS[:1], wrong])), LABELS)
    assert made.weights[0] > 0.5


@pytest.mark.parametrize("temperature", [0, -1, "1", True, torch.nan])
def test_temperatures_that_are_none_are_refused(temperature):
    with pytest.raises(ConfigError, match=r"temperature must be a number in \(0, inf\], or None"):
        weights(temperature=temperature)


def test_options_that_contradict_are_refused():
    with pytest.raises(ConfigError, match="by must be one of"):
        weights(by="rank")
    with pytest.raises(ConfigError, match="temperature is one of by='softmax'"):
        weights(by="inverse", temperature=1.0)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0]), r"labels have shape \(1,\)"),
        (torch.tensor([0.0, 1.0]), "whole numbers"),
        (torch.tensor([0, 2]), "labels go from 0 to 2, the members have classes 0 to 1"),
        (torch.tensor([-1, 1]), "labels go from -1 to 1"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, message):
    with pytest.raises(ConfigError, match=message):
        weighted_consensus(Seen(LOGITS), labels)


def test_other_members_than_it_was_fitted_to_are_refused():
    made = weighted_consensus(Seen(LOGITS), LABELS)
    with pytest.raises(ConfigError, match="there are 1 members, expected the 2"):
        made(Seen(LOGITS[:1]))
