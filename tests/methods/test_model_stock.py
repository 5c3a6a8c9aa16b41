import math

import pytest
import torch

from metamerge.methods import model_stock

ZERO = {"w": torch.zeros(2)}


def test_two_members_sixty_degrees_apart():
    # cos 60 = 1/2: the ratio is 2 * 0.5 / (1 + 0.5) = 2/3 of their average (3/4, sqrt(3)/4).
    own = [{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.5, math.sqrt(3) / 2])}]
    report = {}
    fused = model_stock(own, base=ZERO, report=report)["w"]
    assert fused.tolist() == pytest.approx([0.5, math.sqrt(3) / 6])
    assert report == {"ratio": pytest.approx(2 / 3, abs=1e-6)}


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_outcome_is_the_point_on_the_way_to_the_average_nearest_to_the_centre(count):
    # The paper's geometry: members are a centre plus noise at right angles to it and each other.
    axes = torch.eye(count + 1, dtype=torch.float64)
    centre, noise = 2 * axes[0], 3 * axes[1:]
    own = [{"w": centre + n} for n in noise]
    fused = model_stock(own, base={"w": torch.zeros_like(centre)})["w"]
    mean = sum(member["w"] for member in own) / count
    assert torch.allclose(fused, (centre @ mean) / (mean @ mean) * mean, atol=1e-12, rtol=0)


def test_right_angles_stay_at_the_base_and_one_direction_is_the_average():
    base = {"w": torch.tensor([3.0, 4.0])}
    apart = [{"w": base["w"] + torch.eye(2)[i]} for i in range(2)]
    assert torch.allclose(model_stock(apart, base=base)["w"], base["w"])
    along = [{"w": base["w"] + i * torch.ones(2)} for i in (1, 3)]
    assert torch.allclose(model_stock(along, base=base)["w"], base["w"] + 2, atol=1e-6)


def test_members_that_contradict_each_other_stay_at_the_base():
    own = [{"w": torch.tensor([1.0, 0.1])}, {"w": torch.tensor([-1.0, 0.1])}]
    assert torch.allclose(model_stock(own, base=ZERO)["w"], ZERO["w"])


def test_agrees_with_the_equation_in_float64():
    generator = torch.Generator().manual_seed(0)
    base, shared, *noise = (
        torch.randn(5, 6, generator=generator, dtype=torch.float64) for _ in range(6)
    )
    own = [base + shared + n for n in noise]
    fused = model_stock([{"w": w} for w in own], base={"w": base})["w"]
    vectors = [(w - base).flatten() for w in own]
    cosines = [
        float(a @ b / (a.norm() * b.norm())) for i, a in enumerate(vectors) for b in vectors[:i]
    ]
    cosine = sum(cosines) / len(cosines)
    ratio = 4 * cosine / (1 + 3 * cosine)
    expected = ratio * sum(own) / 4 + (1 - ratio) * base
    assert torch.allclose(fused, expected, atol=1e-12, rtol=0)


def test_tiny_task_vectors_have_the_angles_of_large_ones():
    base = {"w": torch.zeros(2, dtype=torch.float64)}
    own = [{"w": torch.tensor([1.0, 0.0]).double()}, {"w": torch.tensor([1.0, 1.0]).double()}]
    large = model_stock(own, base=base)["w"]
    tiny = model_stock([{"w": 1e-9 * m["w"]} for m in own], base=base)["w"]
    assert torch.allclose(1e9 * tiny, large, atol=1e-12)


def test_every_tensor_has_a_ratio_of_its_own_and_statistics_are_averaged():
    base = {"a": torch.zeros(2), "b": torch.zeros(2), "n.running_var": torch.ones(2)}
    own = [
        {"a": torch.ones(2), "b": torch.eye(2)[i], "n.running_var": torch.full((2,), 1.0 + 2 * i)}
        for i in range(2)
    ]
    fused = model_stock(own, base=base)
    assert fused["a"].tolist() == pytest.approx([1.0, 1.0])
    assert fused["b"].tolist() == pytest.approx([0.0, 0.0])
    assert fused["n.running_var"].tolist() == [2.0, 2.0]


def test_members_like_the_base_come_back():
    base = {"w": torch.ones(3), "empty": torch.zeros(0), "one": torch.tensor(2.0)}
    fused = model_stock([base, base], base=base)
    assert all(torch.equal(fused[key], tensor) for key, tensor in base.items())
    half_moved = model_stock([base, {**base, "w": torch.zeros(3)}], base=base)
    assert torch.equal(half_moved["w"], base["w"])  # one did not move: no angle, no step
