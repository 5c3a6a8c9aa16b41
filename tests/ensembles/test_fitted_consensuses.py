"""Consensuses whose weights are fitted: to what, and what they are without labels."""

import pytest
import torch
import torch.nn.functional as F

from metamerge.ensembles import (
    Seen,
    convolutional_consensus,
    learned_consensus,
    soft_vote,
    stacking,
)
from metamerge.ensembles.fitting import fit, fold_rows
from metamerge.errors import ConfigError

FITS = [learned_consensus, convolutional_consensus, stacking]


def skewed(count=150, seed=0):
    """Two sure members that know two classes of four, and an unsure one that knows all."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    sure, unsure = 4 * F.one_hot(labels % 2, 4), F.one_hot(labels, 4)
    logits = torch.stack([sure, sure, unsure]).float()
    return logits + 0.3 * torch.randn(3, count, 4, generator=generator), labels


def accuracy(logarithms, labels):
    return float((logarithms.argmax(-1) == labels).float().mean())


@pytest.mark.parametrize("make", FITS)
def test_who_knows_which_class_is_learned(make):
    logits, labels = skewed()
    unseen, truth = skewed(count=1000, seed=1)
    assert accuracy(soft_vote(unseen), truth) < 0.6
    made = make(Seen(logits), labels)
    assert accuracy(made(Seen(unseen)), truth) > 0.9


@pytest.mark.parametrize("make", FITS)
def test_labels_that_say_nothing_do_little_harm(make):
    generator = torch.Generator().manual_seed(0)
    logits = 0.1 * torch.randn(3, 1060, 4, generator=generator)
    labels = torch.randint(4, (1060,), generator=generator)
    made = make(Seen(logits[:, :60]), labels[:60])
    unseen, truth = logits[:, 60:], labels[60:]
    harm = F.nll_loss(made(Seen(unseen)), truth) - F.nll_loss(soft_vote(unseen).log(), truth)
    # three shares estimated from 60 labels cost 3 / (2 * 60) = 0.025 on average
    assert float(harm) < 0.05


@pytest.mark.parametrize("make", FITS)
def test_one_label_leaves_the_soft_vote(make):
    logits, labels = skewed(count=8)
    report = {}
    made = make(Seen(logits[:, :1]), labels[:1], report=report)
    assert report["ridge"] == "infinite"
    assert torch.allclose(made(Seen(logits)).exp(), soft_vote(logits), atol=1e-6)


@pytest.mark.parametrize("make", FITS)
def test_extreme_logits_give_finite_outputs(make):
    logits, labels = skewed(count=20)
    found = make(Seen(1e4 * logits), labels)(Seen(1e4 * logits))
    assert found.isfinite().all()


@pytest.mark.parametrize("make", FITS)
def test_without_a_generator_the_seed_is_fixed(make):
    logits, labels = skewed(count=40)
    one, two = (make(Seen(logits), labels)(Seen(logits)) for _ in range(2))
    assert torch.equal(one, two)


def test_a_learned_consensus_by_hand():
    # Probabilities .9/.1 and .4/.6; mean .65/.35. Weights 1 and 2, shifts 0 and .5.
    from metamerge.ensembles.learned_consensus import LearnedConsensus

    logits = torch.tensor([[[0.9, 0.1]], [[0.4, 0.6]]]).log()
    numbers = torch.tensor([[1.0, 1.0], [2.0, 2.0], [0.0, 0.5]])
    found = LearnedConsensus(numbers, torch.ones(2))(Seen(logits))
    scores = torch.tensor([0.65, 0.35]).log() + torch.tensor([0.9 + 0.8, 0.1 + 1.2 + 0.5])
    assert torch.allclose(found[0], scores.log_softmax(0))


def test_a_fit_agrees_with_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    generator = torch.Generator().manual_seed(0)
    table = torch.randn(200, 6, generator=generator).double()
    labels = (table[:, :3] + torch.randn(200, 3, generator=generator)).argmax(1)
    strength = 1e-2
    found = fit(lambda _: lambda n: table @ n, torch.zeros(6, 3), labels, strengths=[strength])
    # sklearn minimises the sum of losses plus 1/(2C) ||w||^2
    model = LogisticRegression(C=1 / (2 * strength * 200), fit_intercept=False, tol=1e-10)
    model.fit(table.numpy(), labels.numpy())
    assert found.told["ridge"] == strength
    assert torch.allclose(found.numbers.T, torch.from_numpy(model.coef_), atol=1e-4)


def test_folds_hold_out_every_input_once_and_evenly():
    folds = fold_rows(torch.arange(43) % 3)
    assert folds.shape == (5, 43)
    assert folds.sum(0).tolist() == [1] * 43
    assert folds.sum(1).tolist() == [9, 9, 9, 8, 8]


def test_fewer_inputs_than_folds_have_a_fold_each():
    assert fold_rows(torch.tensor([1, 0, 1])).sum(1).tolist() == [1, 1, 1]


@pytest.mark.parametrize("make", [learned_consensus, stacking])
def test_unknown_features_are_refused(make):
    logits, labels = skewed(count=8)
    with pytest.raises(ConfigError, match=f"{make.__name__}: of must be one of"):
        make(Seen(logits), labels, of="votes")


@pytest.mark.parametrize("hidden", [0, 1.5, True, "8"])
def test_hidden_channels_that_are_none_are_refused(hidden):
    logits, labels = skewed(count=8)
    with pytest.raises(ConfigError, match="hidden must be a whole number"):
        convolutional_consensus(Seen(logits), labels, hidden=hidden)


def test_weights_per_member_alone_are_one_number_each():
    logits, labels = skewed(count=40)
    assert learned_consensus(Seen(logits), labels, per="member").numbers.shape == (3, 1)
    with pytest.raises(ConfigError, match="per must be one of"):
        learned_consensus(Seen(logits), labels, per="unit")


@pytest.mark.parametrize("make", FITS)
def test_two_axes_are_not_outputs_of_members(make):
    with pytest.raises(ConfigError, match=r"expected \(members, inputs, classes\)"):
        make(Seen(torch.zeros(4, 3)), torch.zeros(4, dtype=torch.long))
