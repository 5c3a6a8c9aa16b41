import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from metamerge import merge
from metamerge.errors import ConfigError
from metamerge.methods import regression_mean
from metamerge.structure import Layout, discover_program, trace


def layout_of(model, inputs):
    program = trace(model, inputs)
    return Layout(program, discover_program(program))


def random_members(model, count=3):
    generator = torch.Generator().manual_seed(1)
    return [
        {
            key: torch.randn(t.shape, generator=generator) / max(1, t[0].numel()) ** 0.5
            for key, t in model.state_dict().items()
        }
        for _ in range(count)
    ]


def solved(grams, maps, decay):
    """The closed form of the paper; maps are ``[i, o]``."""
    scaled = [decay * g + (1 - decay) * g.diag().diag() for g in grams]
    return torch.linalg.solve(sum(scaled), sum(g @ w for g, w in zip(scaled, maps, strict=True)))


def test_two_numbers_by_hand():
    # The hidden unit is 1 in one member and 2 in the other: (1 * 1 + 4 * 6) / 5 = 5.
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    members = [
        {"0.weight": torch.tensor([[a]]), "2.weight": torch.tensor([[w]])}
        for a, w in ((1.0, 1.0), (2.0, 6.0))
    ]
    told = {}
    batches = torch.ones(3, 1)
    fused = regression_mean(members, layout=layout_of(model, batches), batches=batches, report=told)
    assert fused["0.weight"].item() == 1.5
    assert fused["2.weight"].item() == pytest.approx(5, abs=1e-5)
    assert told == {"solved": ["2.weight"], "inputs": 3, "decay": 0.9}


# the ridge of 1e-6 of the diagonal counts 1e-6 / (1 - decay) where the rest is least
@pytest.mark.parametrize(("decay", "tolerance"), [(0.0, 1e-5), (0.9, 1e-4), (0.5, 1e-5)])
def test_agrees_with_gram_matrices_in_float64(decay, tolerance, mlp, mlp_layout, mlp_members):
    inputs = torch.randn(100, 5, generator=torch.Generator().manual_seed(2))  # several chunks
    exact = [{k: t.double() for k, t in member.items()} for member in mlp_members]
    hidden = [torch.relu(F.linear(inputs.double(), w["0.weight"], w["0.bias"])) for w in exact]
    expected = {key: sum(w[key] for w in exact) / len(exact) for key in exact[0]}
    grams, maps = [h.T @ h for h in hidden], [w["2.weight"].T for w in exact]
    expected["2.weight"] = solved(grams, maps, decay).T
    fused = regression_mean(mlp_members, layout=mlp_layout, batches=inputs, decay=decay)
    for key, tensor in expected.items():
        assert torch.allclose(fused[key].double(), tensor, atol=tolerance, rtol=0), key


def test_convolutions_are_regressions_on_patches():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3, stride=2, padding=1, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(27, 3),
    )
    inputs = torch.randn(40, 2, 6, 6, generator=torch.Generator().manual_seed(2))
    members = random_members(model)
    grams, maps = [], []
    for member in members:
        exact = {k: t.double() for k, t in member.items()}
        maps_in = functional_call(
            model[:2], {k: exact[k] for k in ("0.weight", "0.bias")}, inputs.double()
        )
        rows = F.unfold(maps_in, 3, padding=1, stride=2).mT.flatten(0, 1)
        grams.append(rows.T @ rows)
        maps.append(exact["2.weight"].flatten(1).T)
    fused = regression_mean(members, layout=layout_of(model, inputs[:2]), batches=inputs)
    expected = solved(grams, maps, 0.9).T.reshape(3, 4, 3, 3)
    assert torch.allclose(fused["2.weight"].double(), expected, atol=1e-4, rtol=0)


def test_rows_beyond_the_limit_are_drawn_alike_every_time(monkeypatch):
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.Flatten())
    inputs = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    members, layout = random_members(model), layout_of(model, inputs[:2])
    whole = regression_mean(members, layout=layout, batches=inputs)
    monkeypatch.setattr(sys.modules["metamerge.methods.regression_mean"], "_ROWS", 200)
    few = [regression_mean(members, layout=layout, batches=inputs)["2.weight"] for _ in range(2)]
    assert torch.equal(*few)
    assert not torch.allclose(few[0], whole["2.weight"], atol=1e-4)


@pytest.mark.parametrize("decay", [0.9, 1.0])
def test_dead_inputs_keep_the_mean(decay):
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    members = [
        {"0.weight": torch.tensor([[a], [-1.0]]), "2.weight": torch.tensor([[w, w]])}
        for a, w in ((1.0, 1.0), (2.0, 6.0))
    ]
    batches = torch.ones(3, 1)
    fused = regression_mean(members, layout=layout_of(model, batches), batches=batches, decay=decay)
    assert fused["2.weight"][0].tolist() == pytest.approx([5, 3.5], abs=1e-5)


@pytest.mark.parametrize("decay", [0, 0.9, 1])
def test_fewer_rows_than_columns_have_a_solution(decay):
    # More columns than rows: without decay the Gram matrix has no inverse.
    model = nn.Sequential(nn.Linear(4, 30), nn.ReLU(), nn.Linear(30, 3))
    inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    layout = layout_of(model, inputs)
    fused = regression_mean(random_members(model), layout=layout, batches=inputs, decay=decay)
    assert all(t.isfinite().all() for t in fused.values())


def test_it_predicts_better_than_the_average_on_digits(digits_scores):
    own, plain = digits_scores(regression_mean)
    assert own > plain + 0.0


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan"), True, None, "half"])
def test_a_decay_out_of_range_is_refused(decay, mlp_layout, mlp_members):
    with pytest.raises(ConfigError, match=r"decay must be a number in \[0, 1\], got"):
        regression_mean(mlp_members, layout=mlp_layout, batches=torch.ones(2, 5), decay=decay)


def test_inputs_of_another_task_are_refused(mlp_layout, mlp_members):
    with pytest.raises(ConfigError, match=r"the network takes \(b, 5\)"):
        regression_mean(mlp_members, layout=mlp_layout, batches=torch.ones(2, 4))


def test_missing_batches_are_named(mlp, mlp_members):
    with pytest.raises(ConfigError, match="regression_mean needs 'batches'"):
        merge(mlp_members, method="regression_mean", model=mlp, example_inputs=torch.ones(2, 5))
