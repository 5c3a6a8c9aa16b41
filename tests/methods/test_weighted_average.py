import pytest
import torch

from metamerge.errors import ConfigError
from metamerge.methods import average, weighted_average

MEMBERS = [{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([5.0, -6.0])}]


def test_four_numbers():
    fused = weighted_average(MEMBERS, coefficients=[3, 1])  # 3/4 and 1/4
    assert fused["w"].tolist() == [2.0, 0.0]


def test_only_the_ratio_of_coefficients_counts():
    for scale in (1e-300, 5e307):  # the sum of the latter two is beyond float64
        fused = weighted_average(MEMBERS, coefficients=[3 * scale, scale])
        assert fused["w"].tolist() == [2.0, 0.0]


def test_coefficient_zero_leaves_a_member_out():
    assert weighted_average(MEMBERS, coefficients=[0, 2])["w"].tolist() == [5.0, -6.0]


def test_equal_coefficients_are_the_average():
    members = [{"w": torch.randn(5, generator=torch.Generator().manual_seed(i))} for i in range(4)]
    fused = weighted_average(members, coefficients=[7] * 4)
    assert torch.equal(fused["w"], average(members)["w"])


def test_a_tensor_of_coefficients_will_do():
    fused = weighted_average(MEMBERS, coefficients=torch.tensor([3, 1]))
    assert fused["w"].tolist() == [2.0, 0.0]


def test_agrees_with_a_loop_in_float64():
    generator = torch.Generator().manual_seed(0)
    members = [{"w": torch.randn(3, 2, generator=generator)} for _ in range(5)]
    coefficients = [5.0, 0.5, 0.0, 2.0, 1.0]
    total = torch.zeros(3, 2, dtype=torch.float64)
    for coefficient, member in zip(coefficients, members, strict=True):
        total += coefficient * member["w"].double()
    fused = weighted_average(members, coefficients=coefficients)["w"]
    assert torch.allclose(fused.double(), total / 8.5, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("coefficients", "told"),
    [
        ([1.0], "1 coefficients and 2 members"),
        ([1.0, 1.0, 1.0], "3 coefficients and 2 members"),
        ([1.0, -0.5], r"coefficients\[1\] is -0.5"),
        ([float("nan"), 1.0], r"coefficients\[0\] is nan"),
        ([1.0, float("inf")], r"coefficients\[1\] is inf"),
        ([0.0, 0.0], "all coefficients are 0"),
        (0.5, "expected a sequence of numbers"),
        (["a", "b"], "expected a sequence of numbers"),
    ],
)
def test_coefficients_that_make_no_sense_are_refused(coefficients, told):
    with pytest.raises(ConfigError, match=told):
        weighted_average(MEMBERS, coefficients=coefficients)
