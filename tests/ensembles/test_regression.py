import pytest
import torch
from torch import nn

from metamerge.ensembles import Seen, ensemble, stacked_mean, weighted_mean
from metamerge.errors import ConfigError

# Errors 1 and -2 on every input: mean squares 1 and 4.
TARGETS = torch.tensor([[0.0], [2.0], [4.0]])
OUTPUTS = torch.stack([TARGETS + 1, TARGETS - 2])


def test_inverse_errors_of_a_few_numbers():
    assert weighted_mean(Seen(OUTPUTS), TARGETS).weights.tolist() == pytest.approx([0.8, 0.2])


def test_a_softmax_of_relative_errors():
    found = weighted_mean(Seen(OUTPUTS), TARGETS, by="softmax").weights
    assert torch.allclose(found, torch.tensor([-1.0, -4.0]).softmax(0))


def test_the_weighted_mean_is_one():
    made = weighted_mean(Seen(OUTPUTS), TARGETS)
    assert torch.allclose(made(Seen(OUTPUTS)), 0.8 * OUTPUTS[0] + 0.2 * OUTPUTS[1])


def noisy(seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randn(300, 2, generator=generator) * torch.tensor([1.0, 50.0])
    noise = torch.randn(4, 300, 2, generator=generator) * torch.tensor([1.0, 50.0])
    spread = torch.tensor([0.1, 0.5, 1.0, 2.0])[:, None, None]
    return targets + noise * spread, targets


@pytest.mark.parametrize("sign", ["positive", "any"])
def test_stacking_beats_the_mean_where_members_are_of_different_worth(sign):
    made = stacked_mean(Seen(noisy()[0]), noisy()[1], sign=sign)
    outputs, targets = noisy(seed=1)

    def error(said):
        return float((said - targets).square().mean())

    assert error(made(Seen(outputs))) < 0.2 * error(outputs.mean(0))


def test_least_squares_agree_with_scipy():
    from scipy.optimize import lsq_linear

    outputs, targets = noisy()
    report = {}
    found = stacked_mean(Seen(outputs), targets, report=report).weights
    scale = targets.double().std(0, correction=0)
    table = (outputs.double() / scale).flatten(1).T
    pull = (report["ridge"] * table.square().sum() / 4) ** 0.5
    rows = torch.cat([table, pull * torch.eye(4).double()]).numpy()
    aims = torch.cat([(targets.double() / scale).flatten(), pull * torch.full((4,), 0.25)]).numpy()
    expected = torch.from_numpy(lsq_linear(rows, aims, bounds=(0, torch.inf), tol=1e-12).x)
    assert torch.allclose(found.double(), expected, atol=1e-5)


def test_weights_are_not_negative_unless_they_may_be():
    base = torch.randn(100, 1, generator=torch.Generator().manual_seed(0))
    outputs = torch.stack([base, -base, base.flip(0)])
    assert float(stacked_mean(Seen(outputs), base).weights.min()) >= 0
    assert float(stacked_mean(Seen(outputs), base, sign="any").weights.min()) < 0


def test_a_constant_target_and_exact_members_give_finite_weights():
    outputs = torch.ones(2, 5, 1)
    for make in (weighted_mean, stacked_mean):
        made = make(Seen(outputs), torch.ones(5, 1))
        assert torch.allclose(made(Seen(outputs)), torch.ones(5, 1))


def test_one_target_is_enough():
    made = stacked_mean(Seen(OUTPUTS[:, :1]), TARGETS[:1])
    assert made(Seen(OUTPUTS)).isfinite().all()


def test_targets_of_networks_with_one_output_may_have_one_axis():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        members = [nn.Linear(3, 1) for _ in range(3)]
        inputs = torch.randn(50, 3)
    with torch.no_grad():
        targets = members[1](inputs)[:, 0]
    made = ensemble(members, kind="stacked_mean", batches=(inputs, targets))
    assert made.report["chosen"]["weights"] == pytest.approx([0, 1, 0], abs=1e-2)


def test_options_that_do_not_exist_are_refused():
    with pytest.raises(ConfigError, match="weighted_mean: by must be one of"):
        weighted_mean(Seen(OUTPUTS), TARGETS, by="rank")
    with pytest.raises(ConfigError, match="stacked_mean: sign must be one of"):
        stacked_mean(Seen(OUTPUTS), TARGETS, sign="negative")
    with pytest.raises(ConfigError, match=r"targets have shape \(3,\)"):
        weighted_mean(Seen(OUTPUTS), TARGETS[:, 0])
