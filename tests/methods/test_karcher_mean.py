import math

import pytest
import torch

from metamerge.errors import ConfigError
from metamerge.methods import karcher_mean, slerp


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_three_arms_of_a_corner():
    # Directions x, y, z of lengths 1, 2, 3: their mean points along (1, 1, 1) and has length 2.
    fused = karcher_mean([{"w": (i + 1) * torch.eye(3)[i]} for i in range(3)])["w"]
    assert fused.tolist() == pytest.approx([2 / math.sqrt(3)] * 3)


def test_the_mean_of_directions_is_not_the_direction_of_the_mean():
    # On a circle, angles are averaged: 0, 0 and 90 degrees make 30.
    angles = [0.0, 0.0, math.pi / 2]
    members = [{"w": torch.tensor([math.cos(a), math.sin(a)])} for a in angles]
    fused = karcher_mean(members)["w"]
    assert math.degrees(math.atan2(fused[1], fused[0])) == pytest.approx(30, abs=1e-4)


def karcher(members, steps=2000):
    """Plain gradient descent on the sphere, with logarithms and exponentials written out."""
    norms = [float(m.norm()) for m in members]
    units = [m / n for m, n in zip(members, norms, strict=True)]
    mean = sum(units) / sum(units).norm()
    for _ in range(steps):
        tangent = torch.zeros_like(mean)
        for unit in units:
            cosine = float((unit @ mean).clamp(-1, 1))
            away = unit - cosine * mean
            if float(away.norm()) > 0:
                tangent += math.acos(cosine) * away / away.norm() / len(units)
        length = tangent.norm()
        if length < 1e-15:
            break
        mean = length.cos() * mean + length.sin() * tangent / length
    return mean * sum(norms) / len(norms)


@pytest.mark.parametrize("common", [0.0, 1.0])
def test_agrees_with_gradient_descent_in_float64(common):
    members = [common + draw(6, seed=i) for i in range(4)]
    fused = karcher_mean([{"w": m} for m in members])["w"]
    assert torch.allclose(fused, karcher(members), atol=1e-9, rtol=0)


def test_two_members_of_one_length_meet_where_slerp_is_half_way():
    members = [{"w": (v := draw(9, seed=i)) / v.norm()} for i in range(2)]
    assert torch.allclose(karcher_mean(members)["w"], slerp(members)["w"], atol=1e-12)


def test_the_whole_model_can_be_one_vector():
    members = [{"a": draw(3, 2, seed=i), "b": draw(4, seed=i + 9)} for i in range(3)]
    fused = karcher_mean(members, scope="model")
    expected = karcher([torch.cat([m["a"].flatten(), m["b"]]) for m in members])
    assert torch.allclose(torch.cat([fused["a"].flatten(), fused["b"]]), expected, atol=1e-9)


def test_opposite_directions_give_the_average():
    a = draw(5)
    fused = karcher_mean([{"w": 3 * a}, {"w": -a}])["w"]
    assert torch.allclose(fused, a, atol=1e-12)


def test_zeros_have_no_direction_but_a_length():
    a = draw(5)
    fused = karcher_mean([{"w": a}, {"w": 0 * a}])["w"]
    assert torch.allclose(fused, a / 2, atol=1e-12)
    nothing = {"w": torch.zeros(3), "empty": torch.zeros(0), "one": torch.tensor(2.0)}
    assert all(map(torch.equal, karcher_mean([nothing] * 3).values(), nothing.values()))


@pytest.mark.parametrize("seed", range(5))
def test_members_all_around_the_sphere_give_something_finite_of_the_mean_length(seed):
    members = [draw(2, seed=10 * seed + i) for i in range(6)] + [-draw(2, seed=10 * seed)]
    fused = karcher_mean([{"w": m} for m in members])["w"]
    assert float(fused.norm()) == pytest.approx(sum(float(m.norm()) for m in members) / 7)


def test_running_statistics_are_averaged():
    members = [{"n.running_var": torch.tensor([v, 1.0])} for v in (1.0, 3.0)]
    assert karcher_mean(members)["n.running_var"].tolist() == [2.0, 1.0]


def test_gradients_are_finite_at_zeros_and_opposites():
    for other in (torch.zeros(3), torch.ones(3), -torch.ones(3)):
        first = torch.ones(3, requires_grad=True)
        karcher_mean([{"w": first}, {"w": other}, {"w": first}])["w"].sum().backward()
        assert first.grad.isfinite().all()


@pytest.mark.parametrize("scope", ["layer", None, 1])
def test_an_unknown_scope_is_refused(scope):
    with pytest.raises(ConfigError, match="scope must be one of 'tensor', 'model', got"):
        karcher_mean([{"w": torch.ones(2)}] * 2, scope=scope)
