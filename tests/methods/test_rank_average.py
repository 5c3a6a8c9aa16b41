import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from metamerge.errors import ConfigError, NonFinite
from metamerge.methods import rank_average

ONE_OF_CLASS_0 = (torch.ones(1, 1), torch.tensor([0]))


def test_four_numbers(scalar_layout, scalar_members):
    # The loss log(1 + exp(-a)) falls with a: 16 gets 1/2, 8 gets 1/4, 4 and 0 get 1/8.
    members = scalar_members(8, 0, 16, 4)
    fused = rank_average(members, layout=scalar_layout, batches=ONE_OF_CLASS_0)
    assert fused["0.weight"].tolist() == [[8 + 2 + 0.5], [0.0]]


def test_labels_decide_who_is_best(scalar_layout, scalar_members):
    batches = (torch.ones(1, 1), torch.tensor([1]))  # now the loss rises with a
    fused = rank_average(scalar_members(8, 0, 16, 4), layout=scalar_layout, batches=batches)
    assert fused["0.weight"][0].item() == 0 / 2 + 4 / 4 + 8 / 8 + 16 / 8


def test_members_of_equal_loss_share(scalar_layout, scalar_members):
    # Without an input every loss is the same, so the order of members must not decide.
    batches = (torch.zeros(1, 1), torch.tensor([0]))
    fused = rank_average(scalar_members(8, 0, 16, 4), layout=scalar_layout, batches=batches)
    assert fused["0.weight"][0].item() == 7.0


def test_agrees_with_a_loop_in_float64(mlp, mlp_layout, mlp_members):
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(600, 5, generator=generator)  # more than one chunk
    labels = torch.randint(3, (600,), generator=generator)
    losses = []
    for member in mlp_members:
        exact = {key: tensor.double() for key, tensor in member.items()}
        logits = functional_call(mlp, exact, inputs.double())
        losses.append(float(F.cross_entropy(logits, labels)))
    expected = {key: torch.zeros(t.shape).double() for key, t in mlp_members[0].items()}
    left = 1.0
    for rank, index in enumerate(sorted(range(5), key=losses.__getitem__)):
        share = left if rank == 4 else left / 2
        left -= share
        for key, tensor in mlp_members[index].items():
            expected[key] += share * tensor.double()
    fused = rank_average(mlp_members, layout=mlp_layout, batches=(inputs, labels))
    for key, tensor in expected.items():
        assert torch.allclose(fused[key].double(), tensor, atol=1e-6, rtol=0)


def test_batches_without_labels_are_refused(scalar_layout, scalar_members):
    with pytest.raises(ConfigError, match=r"batches has no labels"):
        rank_average(scalar_members(1, 2), layout=scalar_layout, batches=torch.ones(1, 1))


def test_labels_of_another_task_are_refused(scalar_layout, scalar_members):
    batches = (torch.ones(1, 1), torch.tensor([2]))
    with pytest.raises(ConfigError, match="labels reach 2, the network has classes 0 to 1"):
        rank_average(scalar_members(1, 2), layout=scalar_layout, batches=batches)


def test_inputs_of_another_task_are_refused(scalar_layout, scalar_members):
    batches = (torch.ones(1, 3), torch.tensor([0]))
    with pytest.raises(ConfigError, match=r"shape \(1, 3\), the network takes \(b, 1\)"):
        rank_average(scalar_members(1, 2), layout=scalar_layout, batches=batches)


def test_a_member_whose_loss_overflows_is_named(scalar_layout, scalar_members):
    batches = (torch.full((1, 1), 1e30), torch.tensor([1]))
    with pytest.raises(NonFinite, match=r"weights\[1\] has a loss of (inf|nan)"):
        rank_average(scalar_members(1, 1e30), layout=scalar_layout, batches=batches)
