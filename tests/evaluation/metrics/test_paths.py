"""Mixtures of networks by hand, beside a loop in float64, and what symmetry demands."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

from evaluation.metrics import barriers, landscape, lines, mixtures, scoring, simplex
from metamerge.alignment import weight_matching
from metamerge.corrections.batch_norm import recalibrate
from metamerge.structure import Layout, discover_program, trace


def families(model, count, members, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(count, members, *t.shape, generator=generator, dtype=t.dtype)
        for key, t in model.state_dict().items()
    }


@pytest.fixture(scope="module")
def case():
    """Two families of three networks 4-5-3 in float64, inputs and classes."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    inputs = torch.randn(30, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return model, trace(model, inputs), families(model, 2, 3), inputs, torch.arange(30) % 3


def slow_loss(model, weights, inputs, targets):
    outputs = functional_call(model, weights, inputs)
    if targets.is_floating_point():
        return float((outputs - targets).square().mean())
    return float(nn.functional.cross_entropy(outputs, targets))


def test_lines_run_from_one_member_to_the_other():
    pairs, coefficients = lines(3, 3)
    assert pairs == [(0, 1), (0, 2), (1, 2)]
    assert coefficients[1].tolist() == [[1, 0, 0], [0.5, 0, 0.5], [0, 0, 1]]


def test_mixtures_of_the_simplex_sum_to_1_and_begin_with_the_average():
    found = simplex(4, 200, generator=torch.Generator().manual_seed(0))
    assert found.shape == (201, 4)
    assert found[0].tolist() == [0.25] * 4
    assert (found >= 0).all()
    assert torch.allclose(found.sum(1), torch.ones(201).double())
    # of Dirichlet(1, 1, 1, 1): mean 1/4, variance (1/4)(3/4)/5; six deviations of 200 draws
    assert (found[1:].mean(0) - 0.25).abs().max() < 6 * (3 / 80 / 200) ** 0.5


def test_a_mixture_is_the_weighted_sum_and_a_corner_is_the_member_itself():
    members = {"w": torch.tensor([[[1.0, 2.0], [3.0, 6.0]]]), "n": torch.tensor([[5, 7]])}
    found = mixtures(members, torch.tensor([[1.0, 0.0], [0.25, 0.75]]))
    assert found["w"].tolist() == [[[1.0, 2.0], [2.5, 5.0]]]
    assert found["n"].tolist() == [[5, 5]]


def test_the_barrier_of_two_linear_networks_by_hand():
    # y = w x + b with w = 1 and -1 on x = 1, target 0: losses 1 at the ends, (1 - 2t)^2 between,
    # so there is none; with target 1 the losses are 0, 4 and (2t)^2 - 4t = -4t (1 - t) < 0 above.
    model = nn.Linear(1, 1).double()
    program = trace(model, torch.ones(2, 1, dtype=torch.float64))
    weights = {
        "weight": torch.tensor([1.0, -1.0], dtype=torch.float64).reshape(1, 2, 1, 1),
        "bias": torch.zeros(1, 2, 1, dtype=torch.float64),
    }
    inputs = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    targets = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    found = landscape(program, weights, lines(2, 5)[1], inputs, targets)
    assert found.member_loss.tolist() == [[0.0, 4.0]]
    assert found.loss.tolist() == [[0.0, 0.25, 1.0, 2.25, 4.0]]
    assert found.excess.tolist() == [[0.0, -0.75, -1.0, -0.75, 0.0]]
    assert barriers(program, weights, inputs, targets).abs().max() == 0


def test_losses_are_those_of_a_loop_over_mixtures(case):
    model, program, members, inputs, targets = case
    coefficients = simplex(3, 5, generator=torch.Generator().manual_seed(0))
    found = landscape(program, members, coefficients, inputs, targets)
    for family in range(2):
        ends = [
            slow_loss(model, {k: t[family, m] for k, t in members.items()}, inputs, targets)
            for m in range(3)
        ]
        assert found.member_loss[family].tolist() == pytest.approx(ends, abs=1e-12)
        for place, row in enumerate(coefficients):
            own = {k: torch.einsum("m,m...->...", row, t[family]) for k, t in members.items()}
            loss = slow_loss(model, own, inputs, targets)
            assert float(found.loss[family, place]) == pytest.approx(loss, abs=1e-12)
            above = loss - sum(c * e for c, e in zip(row.tolist(), ends, strict=True))
            assert float(found.excess[family, place]) == pytest.approx(above, abs=1e-12)
            right = (functional_call(model, own, inputs).argmax(-1) == targets).double().mean()
            assert float(found.score[family, place]) == float(right)


@pytest.mark.parametrize("said", [1, 30 * 4 * 3 * 4, 30 * 4 * 3 * 20])
def test_less_memory_gives_the_same_landscape(case, monkeypatch, said):
    _, program, members, inputs, targets = case
    coefficients = lines(3, 5)[1]
    whole = landscape(program, members, coefficients, inputs, targets)
    monkeypatch.setattr(scoring, "SAID", said)
    parts = landscape(program, members, coefficients, inputs, targets)
    for one, other in zip(whole, parts, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


def test_families_may_number_classes_by_themselves(case):
    _, program, members, inputs, targets = case
    own = torch.stack([targets, targets.roll(1)])
    together = landscape(program, members, lines(3, 3)[1], inputs, own)
    for family in range(2):
        one = {key: t[family : family + 1] for key, t in members.items()}
        alone = landscape(program, one, lines(3, 3)[1], inputs, own[family])
        assert torch.allclose(together.loss[family], alone.loss[0], atol=1e-12)


def test_barriers_are_symmetric_and_the_highest_of_each_line(case):
    _, program, members, inputs, targets = case
    found = barriers(program, members, inputs, targets, points=9)
    assert torch.equal(found, found.mT)
    assert (found.diagonal(dim1=1, dim2=2) == 0).all()
    pairs, coefficients = lines(3, 9)
    excess = landscape(program, members, coefficients, inputs, targets).excess
    highest = excess.unflatten(1, (3, 9)).amax(2).clamp_min(0)
    for place, (first, second) in enumerate(pairs):
        assert torch.allclose(found[:, first, second], highest[:, place], atol=1e-12)
    assert found.max() > 0.1  # random networks are not connected


def test_permuted_copies_have_a_barrier_that_alignment_takes_away():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    program = trace(model, inputs)
    layout = Layout(program, discover_program(program))
    one = {k: 2 * torch.randn(1, *t.shape, generator=generator, dtype=torch.float64)
           for k, t in model.state_dict().items()}  # fmt: skip
    targets = functional_call(model, {k: t[0] for k, t in one.items()}, inputs).argmax(-1)
    other = layout.spec.permute(one, layout.spec.random(generator))
    pair = {key: torch.stack([one[key], other[key]], 1) for key in one}
    before = barriers(program, pair, inputs, targets)
    aligned = layout.spec.permute(pair, weight_matching(pair, layout.spec))
    after = barriers(program, aligned, inputs, targets)
    assert before[0, 0, 1] > 0.1
    assert after[0, 0, 1] < 1e-12


def test_running_statistics_of_mixtures_are_measured_anew():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).eval()
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(40, 4, generator=generator), torch.arange(40) % 3
    program, members = trace(model, inputs[:2]), {}
    for key, tensor in model.state_dict().items():
        noise = torch.randn(1, 2, *tensor.shape, generator=generator)
        noise = noise.abs() + 0.5 if key.endswith("var") else noise
        members[key] = noise if tensor.is_floating_point() else tensor.expand(1, 2).clone()
    middle = torch.tensor([[0.5, 0.5]])
    found = landscape(program, members, middle, inputs, targets, calibration=inputs)
    mixed = {key: t[0] for key, t in mixtures(members, middle).items()}
    measured = {key: t[0] for key, t in recalibrate(mixed, program, inputs).items()}
    expected = slow_loss(model, measured, inputs, targets)
    assert float(found.loss) == pytest.approx(expected, rel=1e-5)
    plain = landscape(program, members, middle, inputs, targets)
    assert math.isclose(
        float(plain.loss),
        slow_loss(model, {key: t[0] for key, t in mixed.items()}, inputs, targets),
        rel_tol=1e-5,
    )
    assert abs(float(plain.loss) - expected) > 1e-2
