import math

import pytest
import torch

from metamerge.errors import ConfigError
from metamerge.methods import slerp


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_half_a_right_angle():
    # 0.5 of 90 degrees: sin(45) / sin(90) = 0.7071 of each
    fused = slerp([{"w": torch.tensor([2.0, 0.0])}, {"w": torch.tensor([0.0, 2.0])}])["w"]
    assert fused.tolist() == pytest.approx([math.sqrt(2), math.sqrt(2)])


def test_the_ends_are_the_members():
    members = [{"w": draw(5, seed=i)} for i in range(2)]
    for t in (0, 1):
        assert torch.allclose(slerp(members, t=t)["w"], members[t]["w"], atol=1e-6)


def on_the_sphere(a, b, t):
    a, b = a.double(), b.double()
    angle = math.acos(float(a @ b / (a.norm() * b.norm())))
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def test_agrees_with_a_loop_in_float64():
    members = [{"a": draw(7, seed=i), "b": draw(4, seed=i + 9)} for i in range(2)]
    fused = slerp(members, t=0.3)
    for key in "ab":
        expected = on_the_sphere(members[0][key], members[1][key], 0.3)
        assert torch.allclose(fused[key].double(), expected, atol=1e-6, rtol=0)


def test_the_whole_model_can_be_one_vector():
    members = [{"a": draw(7, seed=i), "b": draw(4, seed=i + 9)} for i in range(2)]
    fused = slerp(members, t=0.3, scope="model")
    expected = on_the_sphere(*(torch.cat([m["a"], m["b"]]) for m in members), 0.3)
    assert torch.allclose(torch.cat([fused["a"], fused["b"]]).double(), expected, atol=1e-6)


@pytest.mark.parametrize("factor", [2.0, -2.0, 0.0])
def test_one_line_and_zeros_are_walked_straight(factor):
    a = draw(6)
    fused = slerp([{"w": a}, {"w": factor * a}], t=0.25)["w"]
    assert torch.allclose(fused, (0.75 + 0.25 * factor) * a, atol=1e-6)
    nothing = {"w": torch.zeros(3), "empty": torch.zeros(0), "one": torch.tensor(2.0)}
    assert all(map(torch.equal, slerp([nothing] * 2).values(), nothing.values()))


def test_running_statistics_are_averaged_with_the_shares():
    members = [{"n.running_var": torch.tensor([v, 1.0])} for v in (1.0, 3.0)]
    fused = slerp(members, t=0.25)["n.running_var"]
    assert fused.tolist() == [1.5, 1.0]


def test_huge_and_tiny_numbers_have_angles():
    for size in (1e-30, 1e30):
        first, second = (size * torch.eye(2)[i] for i in range(2))
        fused = slerp([{"w": first}, {"w": second}])["w"]
        assert (fused / size).tolist() == pytest.approx([math.sqrt(0.5)] * 2)


def test_gradients_are_finite_at_zero_and_on_one_line():
    for other in (torch.zeros(3), torch.ones(3), -torch.ones(3)):
        first = torch.ones(3, requires_grad=True)
        slerp([{"w": first}, {"w": other}])["w"].sum().backward()
        assert first.grad.isfinite().all()


def test_three_members_are_sent_to_the_karcher_mean():
    with pytest.raises(ConfigError, match=r"got 3 members, expected 2.*karcher_mean"):
        slerp([{"w": torch.ones(2)}] * 3)


@pytest.mark.parametrize("t", [-0.1, 1.1, float("nan"), "half", None, True])
def test_a_place_off_the_way_is_refused(t):
    with pytest.raises(ConfigError, match=r"slerp: t must be a number in \[0, 1\], got"):
        slerp([{"w": torch.ones(2)}] * 2, t=t)


@pytest.mark.parametrize("scope", ["layer", None, ["tensor"]])
def test_an_unknown_scope_is_refused(scope):
    with pytest.raises(ConfigError, match="scope must be one of 'tensor', 'model', got"):
        slerp([{"w": torch.ones(2)}] * 2, scope=scope)
