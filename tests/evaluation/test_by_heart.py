"""Null mergers and copies of training networks, by hand and on a small real zoo."""

import pytest
import torch
from torch import nn

from evaluation.by_heart import best_network, copies_nothing, mean_network, nearest_training
from evaluation.metrics import accuracy, family_logits
from metamerge.structure import trace
from zoo.training import predict
from zoo.variants import renamed


def test_the_mean_of_families_of_copies_is_that_network(digits_zoo):
    layout = digits_zoo.layout
    one = {key: t[:1, :1] for key, t in digits_zoo.train.items()}
    copies = {key: t.expand(3, 2, *t.shape[2:]) for key, t in one.items()}
    permuted = layout.spec.permute(
        copies, layout.spec.random(torch.Generator().manual_seed(0), (3, 2))
    )
    found = mean_network(permuted, layout)
    inputs = digits_zoo.validation[0]
    expected = predict(layout.program, {k: t[:, 0] for k, t in one.items()}, inputs)
    assert torch.allclose(predict(layout.program, found, inputs), expected, atol=1e-4)


@pytest.mark.parametrize("renaming", [False, True])
def test_the_best_network_is_the_one_that_is_right_most_often_by_its_own_numbers(
    digits_zoo, renaming
):
    layout, (inputs, targets) = digits_zoo.layout, digits_zoo.validation
    training, labels = digits_zoo.train, None
    scores = accuracy(family_logits(layout.program, training, inputs), targets)
    family, member = divmod(int(scores.argmax()), scores.shape[1])
    if renaming:
        generator = torch.Generator().manual_seed(0)
        labels = torch.rand(len(scores), 10, generator=generator).argsort(-1)
        training = renamed(training, layout, labels.argsort(-1))
    found = best_network(training, layout, inputs, targets, labels)
    assert all(torch.equal(found[key], t[family, member][None]) for key, t in training.items())


def test_distances_of_networks_by_hand():
    program = trace(nn.Linear(1, 2, bias=False), torch.ones(1, 1))

    def network(*margins):  # logits of the input 1 are m and -m
        return {"weight": torch.tensor([[[m], [-m]] for m in margins])}

    found = nearest_training(network(2.0, 4.0), network(1.0, 3.0, 9.0), program, torch.ones(1, 1))
    assert found.tolist() == pytest.approx([0.5, 0.25])  # |2 - 1| / 2 and |4 - 3| / 4


def test_a_copy_of_a_training_network_is_found_however_its_units_are_permuted(digits_zoo):
    layout, inputs = digits_zoo.layout, digits_zoo.validation[0]
    seen = {key: t.flatten(0, 1) for key, t in digits_zoo.train.items()}
    stolen = {key: t[:5] for key, t in seen.items()}
    stolen = layout.spec.permute(
        {k: t[:, None] for k, t in stolen.items()},
        layout.spec.random(torch.Generator().manual_seed(0), (5, 1)),
    )
    stolen = {key: t[:, 0] for key, t in stolen.items()}
    distances = nearest_training(stolen, seen, layout.program, inputs)
    assert float(distances.max()) < 1e-3
    assert not copies_nothing(distances).passed
    own = {key: t.mean(1) for key, t in digits_zoo.unseen.items()}
    assert copies_nothing(nearest_training(own, seen, layout.program, inputs)).passed


def test_distances_that_are_no_numbers_do_not_pass():
    assert not copies_nothing(torch.tensor([0.9, torch.nan])).passed
