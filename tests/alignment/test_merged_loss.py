from math import exp, log

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metamerge.alignment.merged_loss import logits, merged, merged_loss
from metamerge.errors import ConfigError, IncompatibleWeights
from metamerge.structure import Layout, PermutationSpec, trace


def layout_of(model, *shape):
    return Layout(trace(model.eval(), torch.zeros(2, *shape)), PermutationSpec({}, {}))


@pytest.fixture(scope="module")
def linear():
    return layout_of(nn.Linear(1, 2, bias=False), 1)


MEMBERS = {"weight": torch.tensor([[[[1.0], [0.0]], [[0.0], [3.0]]]])}  # f = 1, m = 2
INPUTS = torch.tensor([[1.0], [2.0]])


def test_one_merged_network_by_hand(linear):
    # At 1/4 and 3/4 the weights are 1/4 and 9/4; class 1 leads by 2 on input 1, by 4 on input 2.
    fused = merged(MEMBERS, torch.tensor([[0.25, 0.75]]))
    assert fused["weight"].flatten().tolist() == [0.25, 2.25]
    loss = merged_loss(MEMBERS, linear, INPUTS, torch.tensor([1, 0]))(fused)
    expected = (log(1 + exp(-2)) + log(1 + exp(4))) / 2
    assert loss.tolist() == pytest.approx([expected], rel=1e-6)


def test_without_labels_it_is_the_cross_entropy_to_the_soft_vote(linear):
    judge = merged_loss(MEMBERS, linear, INPUTS, None)
    votes = [[1 / (1 + exp(-x)), 1 / (1 + exp(3 * x))] for x in (1, 2)]  # of class 0
    targets = torch.tensor([[sum(v) / 2, 1 - sum(v) / 2] for v in votes])
    assert torch.allclose(judge.targets[0], targets, rtol=1e-6)
    fused = {"weight": torch.tensor([[[0.5], [1.5]]])}
    scores = (INPUTS @ fused["weight"][0].T).log_softmax(-1)
    assert float(judge(fused)) == pytest.approx(float(-(targets * scores).sum(1).mean()), rel=1e-6)


def test_labels_may_come_with_the_batches_or_beside_them(linear):
    labels = torch.tensor([1, 0])
    one = merged_loss(MEMBERS, linear, (INPUTS, labels), None)
    other = merged_loss(MEMBERS, linear, [INPUTS[:1], INPUTS[1:]], labels)
    assert torch.equal(one.targets, other.targets)
    assert torch.equal(one.inputs, other.inputs)


def test_many_inputs_are_judged_whole_and_drawn_in_part(linear):
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(700, 1, generator=generator), torch.arange(700) % 2
    judge = merged_loss(MEMBERS, linear, inputs, labels)
    fused = {key: t[:, 0] for key, t in MEMBERS.items()}
    expected = F.cross_entropy(inputs @ fused["weight"][0].T, labels)
    assert float(judge(fused)) == pytest.approx(float(expected), rel=1e-5)
    part = judge.drawn(torch.Generator().manual_seed(1))
    assert len(part.inputs) == part.targets.shape[1] < 700
    assert len(part.inputs.unique()) == len(part.inputs)
    assert torch.equal(part.inputs, judge.drawn(torch.Generator().manual_seed(1)).inputs)
    few = merged_loss(MEMBERS, linear, inputs[:9], labels[:9])
    assert few.drawn(generator) is few


def test_batch_normalisation_uses_the_statistics_of_the_inputs():
    layout = layout_of(nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2)), 1)
    networks = {
        "0.weight": torch.tensor([[[2.0], [-3.0]]]),
        "0.bias": torch.tensor([[5.0, 1.0]]),
        "1.weight": torch.ones(1, 2),
        "1.bias": torch.zeros(1, 2),
        "1.running_mean": torch.full((1, 2), 100.0),
        "1.running_var": torch.full((1, 2), 1e6),
        "1.num_batches_tracked": torch.tensor([3]),
    }
    found = logits(layout.program, networks, torch.tensor([[1.0], [3.0]]))
    expected = torch.tensor([[[-1.0, 1.0], [1.0, -1.0]]])
    assert torch.allclose(found, expected, atol=1e-5)
    assert logits(layout.program, networks, torch.tensor([[1.0]])).isfinite().all()


def test_counters_of_merged_networks_are_the_largest_members():
    found = merged({"steps": torch.tensor([[5, 8]])}, torch.tensor([[0.5, 0.5]]))
    assert found["steps"].tolist() == [8]


def test_labels_of_another_task_are_refused(linear):
    with pytest.raises(ConfigError, match="labels reach 2, the network has classes 0 to 1"):
        merged_loss(MEMBERS, linear, INPUTS, torch.tensor([0, 2]))


def test_outputs_that_are_no_logits_are_refused():
    layout = layout_of(nn.Conv2d(1, 1, 1), 1, 2, 2)
    members = {"weight": torch.ones(1, 2, 1, 1, 1, 1), "bias": torch.ones(1, 2, 1)}
    with pytest.raises(IncompatibleWeights, match=r"\(3, 1, 2, 2\), expected logits"):
        merged_loss(members, layout, torch.zeros(3, 1, 2, 2), None)
