"""Refit of one unit, worked out on paper."""

import pytest
import torch
from torch import nn

from metamerge.corrections.refit import fold, mean_target, mixed_target, refit


def test_mixing_by_hand():
    # One unit on two rows. Members -1, 1 and 6, 0: means 0 and 3, spreads 1 and 3. Mixed 1 : 3 they
    # are 4.25, 0.25: mean 2.25, spread 2, to be stretched to (1 + 3 * 3) / 4 = 2.5.
    observed = torch.tensor([[-1.0, 1.0], [6.0, 0.0]])[None, :, :, None]
    mixing = torch.tensor([0.25, 0.75])[None, :, None]
    mixed = mixed_target(observed, mixing)
    assert mixed.shape == (1, 2, 1)
    assert mixed.flatten().tolist() == pytest.approx([4.75, -0.25])
    doubled = mixed_target(observed, mixing, 2.0)
    assert doubled.flatten().tolist() == pytest.approx([7.25, -2.75])
    # Where spreads are known to be 2 and 6 (of variances 4 and 36), it is stretched to 5.
    known = mixed_target(observed, mixing, known=torch.tensor([4.0, 36.0])[None, :, None])
    assert known.flatten().tolist() == pytest.approx([7.25, -2.75])
    # Evenly mixed: 2.5, 0.5, mean 1.5 and spread 1, stretched to 2.
    assert mean_target(None, observed).value.flatten().tolist() == pytest.approx([3.5, -0.5])
    assert mean_target(None, observed).strength == 1


def test_folding_by_hand():
    # Unit 2x + 1 of mean 5 doubled about its mean, and the mean moved to 7: 4x - 1, since x is 2.
    weight, bias = torch.tensor([[[2.0]]]), torch.tensor([[1.0]])
    factor, mean, wanted = (torch.tensor([[value]]) for value in (2.0, 5.0, 7.0))
    scaled, moved = fold(weight, bias, factor, mean, wanted)
    assert (scaled.item(), moved.item()) == (4, -1)
    assert fold(weight, None, factor, mean, wanted)[1] is None


def single_chain(make_setting, bias):
    """Inputs 0, 1, 2 pass one hidden unit unchanged; members read 2h (+ 1) and 4h (+ 3) off it."""
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1, bias=bias))
    setting = make_setting(model, (1,))
    setting.inputs = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    members = {
        "0.weight": torch.ones(1, 2, 1, 1),
        "0.bias": torch.zeros(1, 2, 1),
        "2.weight": torch.tensor([2.0, 4.0]).reshape(1, 2, 1, 1),
    }
    if bias:
        members["2.bias"] = torch.tensor([1.0, 3.0]).reshape(1, 2, 1)
    members = {key: t.double() for key, t in members.items()}
    fused = {key: t[:, 0] * (key.startswith("0")) for key, t in members.items()}
    return setting, members, fused


@pytest.mark.parametrize(("ridge", "slope"), [(0.0, 3), (0.5, 2), (1.0, 1.5), (2.0, 1)])
def test_a_line_through_three_points_by_hand(make_setting, ridge, slope):
    # The target is 3h + 2. About the means, h'h = 2 and 3 * mean(h^2) = 2: slope 6 / (2 + 2r). The
    # line passes through the means 1 and 5 whatever its slope.
    setting, members, fused = single_chain(make_setting, bias=True)
    fitted = refit(fused, members, setting.layout, setting.inputs, ridge=ridge)
    assert fitted["0.weight"].item() == pytest.approx(1)
    assert fitted["0.bias"].item() == pytest.approx(0, abs=1e-12)
    assert fitted["2.weight"].item() == pytest.approx(slope, rel=1e-6)
    assert fitted["2.bias"].item() == pytest.approx(5 - slope, rel=1e-6)


@pytest.mark.parametrize(("ridge", "slope"), [(0.0, 3), (0.5, 2), (2.0, 1)])
def test_a_line_through_the_origin_by_hand(make_setting, ridge, slope):
    # Without a bias nothing is centred: h'h = 5 = 3 * mean(h^2), the target 3h gives 15 / (5 + 5r).
    setting, members, fused = single_chain(make_setting, bias=False)
    fitted = refit(fused, members, setting.layout, setting.inputs, ridge=ridge)
    assert fitted["2.weight"].item() == pytest.approx(slope, rel=1e-6)
