import pytest
import torch

from metamerge.methods import average


def test_four_numbers():
    fused = average([{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, -6.0])}])
    assert fused["w"].tolist() == [2.0, -2.0]


def test_agrees_with_a_loop_in_float64():
    generator = torch.Generator().manual_seed(0)
    members = [
        {"w": torch.randn(3, 2, generator=generator), "s": torch.tensor(0.3 * k)} for k in range(7)
    ]
    fused = average(members)
    for key in ("w", "s"):
        total = torch.zeros(members[0][key].shape, dtype=torch.float64)
        for member in members:
            total += member[key].double()
        assert torch.allclose(fused[key].double(), total / 7, atol=1e-6, rtol=0)


def test_half_precision_does_not_overflow_on_the_way():
    members = [{"w": torch.tensor([60000.0], dtype=torch.float16)} for _ in range(3)]
    assert average(members)["w"].item() == 60000.0


def test_half_precision_does_not_stall_on_the_way():
    members = [{"w": torch.ones(1, dtype=torch.bfloat16)}] * 600  # 1/600 is lost beside 1/2
    assert average(members)["w"].item() == 1.0


def test_float64_keeps_its_precision():
    members = [{"w": torch.tensor([1 + 2e-12 * k], dtype=torch.float64)} for k in range(2)]
    assert average(members)["w"].item() == 1 + 1e-12


def test_step_counters_and_masks_take_the_maximum():
    members = [
        {"steps": torch.tensor(5), "mask": torch.tensor([True, False])},
        {"steps": torch.tensor(8), "mask": torch.tensor([False, False])},
    ]
    fused = average(members)
    assert fused["steps"].item() == 8
    assert fused["mask"].tolist() == [True, False]


def test_names_may_stand_in_another_order():
    one = {"a": torch.tensor([1.0]), "b": torch.tensor([2.0])}
    fused = average([one, {"b": torch.tensor([4.0]), "a": torch.tensor([3.0])}])
    assert list(fused) == ["a", "b"]
    assert (fused["a"].item(), fused["b"].item()) == (2.0, 3.0)


def test_empty_tensors_pass_through():
    assert average([{"w": torch.zeros(0, 3)}] * 2)["w"].shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.bool])
def test_of_tensors_that_count_the_maximum_is_taken_whatever_their_dtype(dtype):
    members = [{"steps": torch.tensor(numbers).to(dtype)} for numbers in ([1, 0], [0, 1], [1, 1])]
    fused = average(members)["steps"]
    assert fused.dtype == dtype
    assert fused.to(torch.int64).tolist() == [1, 1]
