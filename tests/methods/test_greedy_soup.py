import pytest
import torch
from torch import nn

from metamerge import merge
from metamerge.calibration import losses
from metamerge.errors import ConfigError
from metamerge.methods import greedy_soup
from metamerge.structure import Layout, discover_program, run, trace

# Three inputs of class 0 and one of class 1: log(1 + e^a) - 3/4 a, least at a = log(3).
THREE_TO_ONE = (torch.ones(4, 1), torch.tensor([0, 0, 0, 1]))


def test_three_members_by_hand(scalar_layout, scalar_members):
    # .5 scores .599, with 2 (.627) their mean 1.25 scores .564; with -1 that would be .5 again.
    told = {}
    fused = greedy_soup(
        scalar_members(2, -1, 0.5), layout=scalar_layout, batches=THREE_TO_ONE, report=told
    )
    assert fused["0.weight"].flatten().tolist() == [1.25, 0.0]
    assert told["taken"] == [2, 0]
    assert told["soup"] == pytest.approx(0.5644, abs=1e-4)
    assert told["members"] == pytest.approx([0.6269, 1.0633, 0.5991], abs=1e-4)


def test_a_member_that_makes_it_worse_is_left_out(scalar_layout, scalar_members):
    fused = greedy_soup(scalar_members(1, 2), layout=scalar_layout, batches=THREE_TO_ONE)
    assert fused["0.weight"][0].item() == 1.0


@pytest.mark.parametrize("numbers", [(2, 0, 2), (2, 2, 0), (0, 2, 2)])
def test_members_of_equal_loss_enter_together(numbers, scalar_layout, scalar_members):
    # 2 and 2 are the best together; then 0 makes the mean 4/3, which is better still.
    fused = greedy_soup(scalar_members(*numbers), layout=scalar_layout, batches=THREE_TO_ONE)
    assert fused["0.weight"][0].item() == pytest.approx(4 / 3)


def test_by_accuracy_a_member_is_taken_where_errors_stay_the_same(scalar_layout, scalar_members):
    # All above 0 make one error; their mean does, too. By loss, only 1 would be taken.
    told = {}
    fused = greedy_soup(
        scalar_members(9, 1, -1),
        layout=scalar_layout,
        batches=THREE_TO_ONE,
        criterion="accuracy",
        report=told,
    )
    assert told["taken"] == [1, 0, 2]
    assert fused["0.weight"][0].item() == 3.0
    assert told["members"] == [0.25, 0.25, 0.75]


def test_the_soup_has_at_most_the_loss_of_the_best(mlp_layout, mlp_members):
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(50, 5, generator=generator)
    labels = torch.randint(3, (50,), generator=generator)
    fused = greedy_soup(mlp_members, layout=mlp_layout, batches=(inputs, labels))
    assert losses([fused], mlp_layout, inputs, labels) <= losses(
        mlp_members, mlp_layout, inputs, labels
    ).min().add(1e-6)


def test_networks_are_judged_by_statistics_of_their_own():
    # Averages of running variances near 0 would turn every average away.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    member = {k: t.clone() for k, t in model.state_dict().items()}
    other = {k: t.clone() for k, t in member.items()}
    other["1.running_var"] = other["1.running_var"] * 1e-8
    program = trace(model, torch.zeros(2, 4))
    layout, told = Layout(program, discover_program(program)), {}
    batches = (torch.randn(30, 4), torch.arange(30) % 2)
    greedy_soup([member, other], layout=layout, batches=batches, report=told)
    assert told["members"][0] == told["members"][1]
    assert told["taken"] == [0, 1]


def test_members_whose_outputs_overflow_come_last(scalar_layout, scalar_members):
    batches, told = (torch.full((2, 1), 1e30), torch.tensor([0, 1])), {}
    greedy_soup(scalar_members(1e30, 1), layout=scalar_layout, batches=batches, report=told)
    assert told["taken"] == [1]


def test_through_merge_it_says_who_was_taken(digits_zoo):
    members = [{k: t[0, m] for k, t in digits_zoo.unseen.items()} for m in range(4)]
    merged = merge(
        members, method="greedy_soup", model=digits_zoo.network(), batches=digits_zoo.objective
    )
    told = merged.report["chosen"]
    assert told["soup"] <= min(told["members"])
    logits = run(digits_zoo.layout.program, merged.weights, [digits_zoo.validation[0]])
    assert float((logits.argmax(-1) == digits_zoo.validation[1]).float().mean()) > 0.4


@pytest.mark.parametrize("criterion", ["f1", None, True])
def test_unknown_criteria_are_refused(criterion, scalar_layout, scalar_members):
    with pytest.raises(ConfigError, match="criterion must be one of"):
        greedy_soup(
            scalar_members(1, 2), layout=scalar_layout, batches=THREE_TO_ONE, criterion=criterion
        )


def test_batches_without_labels_are_refused(scalar_layout, scalar_members):
    with pytest.raises(ConfigError, match="batches has no labels"):
        greedy_soup(scalar_members(1, 2), layout=scalar_layout, batches=torch.ones(1, 1))
