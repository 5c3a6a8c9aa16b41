import pytest
import torch

from metamerge.errors import ConfigError
from metamerge.methods import average, task_arithmetic

BASE = {"w": torch.tensor([1.0, 2.0])}
MEMBERS = [{"w": torch.tensor([2.0, 2.0])}, {"w": torch.tensor([1.0, 6.0])}]  # (1, 0) and (0, 4)


def test_four_numbers():
    assert task_arithmetic(MEMBERS, base=BASE)["w"].tolist() == [1.5, 4.0]
    assert task_arithmetic(MEMBERS, base=BASE, scale=2)["w"].tolist() == [2.0, 6.0]


def test_coefficients_add_up_and_take_away():
    fused = task_arithmetic(MEMBERS, base=BASE, coefficients=[2, -0.5])
    assert fused["w"].tolist() == [3.0, 0.0]
    nothing = task_arithmetic(MEMBERS, base=BASE, coefficients=[0, 0])
    assert nothing["w"].tolist() == [1.0, 2.0]


def test_scale_zero_is_the_base():
    assert torch.equal(task_arithmetic(MEMBERS, base=BASE, scale=0)["w"], BASE["w"])


def test_the_mean_of_task_vectors_is_the_average():
    fused = task_arithmetic(MEMBERS, base=BASE)
    assert torch.allclose(fused["w"], average(MEMBERS)["w"])


def test_agrees_with_a_loop_in_float64():
    generator = torch.Generator().manual_seed(0)
    base, *members = ({"w": torch.randn(3, 4, generator=generator)} for _ in range(4))
    shares = [0.5, -0.2, 0.9]
    fused = task_arithmetic(members, base=base, coefficients=shares, scale=0.7)["w"]
    expected = base["w"].double()
    for share, member in zip(shares, members, strict=True):
        expected = expected + 0.7 * share * (member["w"].double() - base["w"].double())
    assert torch.allclose(fused.double(), expected, atol=1e-6, rtol=0)


def test_running_statistics_are_averaged_and_never_extrapolated():
    base = {"n.running_var": torch.tensor([5.0])}
    members = [{"n.running_var": torch.tensor([v])} for v in (1.0, 2.0)]
    fused = task_arithmetic(members, base=base, scale=10)
    assert fused["n.running_var"].tolist() == [1.5]


def test_half_precision_is_computed_in_float32():
    base = {"w": torch.tensor([60000.0]).half()}
    fused = task_arithmetic([base, base], base={"w": torch.tensor([-60000.0]).half()})
    assert fused["w"].tolist() == [60000.0]  # the task vector, 120000, is beyond float16


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"scale": float("nan")}, "scale must be a number in"),
        ({"scale": "1"}, "scale must be a number in"),
        ({"scale": True}, "scale must be a number in"),
        ({"coefficients": [1.0]}, "1 coefficients and 2 members"),
        ({"coefficients": [1.0, float("inf")]}, r"coefficients\[1\] must be a number"),
        ({"coefficients": 0.5}, "expected a sequence of numbers"),
        ({"coefficients": ["a", "b"]}, "expected a sequence of numbers"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, told):
    with pytest.raises(ConfigError, match=told):
        task_arithmetic(MEMBERS, base=BASE, **options)
