from math import log

import pytest
import torch
from torch import nn
from torch.func import functional_call

from metamerge import merge
from metamerge.errors import ConfigError, IncompatibleWeights
from metamerge.methods import _squared_gradients, fisher_average
from metamerge.structure import Layout, discover_program, trace

ONE = torch.ones(1, 1)


def exact_fisher(model, member, inputs, labels=None):
    """The mean square of gradients, input by input and class by class."""
    total = {key: torch.zeros_like(t) for key, t in member.items()}
    for index, x in enumerate(inputs):
        leaves = {key: t.clone().requires_grad_() for key, t in member.items()}
        log_p = functional_call(model, leaves, x[None])[0].log_softmax(-1)
        classes = range(len(log_p)) if labels is None else [int(labels[index])]
        for c in classes:
            gradients = torch.autograd.grad(log_p[c], list(leaves.values()), retain_graph=True)
            weight = float(log_p[c].detach().exp()) if labels is None else 1.0
            for key, gradient in zip(leaves, gradients, strict=True):
                total[key] += weight * gradient.square() / len(inputs)
    return total


def test_two_members_by_hand(scalar_layout, scalar_members):
    # Class 0 has probability 1/2 and 3/4; p (1 - p) is 4/16 and 3/16, so log(3) counts 3/7.
    fused = fisher_average(
        scalar_members(0, log(3)), layout=scalar_layout, batches=ONE, normalise=False
    )
    assert fused["0.weight"].flatten().tolist() == pytest.approx([3 / 7 * log(3), 0], abs=1e-5)


def test_a_member_does_not_count_more_for_larger_gradients(scalar_layout, scalar_members):
    fused = fisher_average(scalar_members(0, log(3)), layout=scalar_layout, batches=ONE)
    assert fused["0.weight"][0].item() == pytest.approx(log(3) / 2, abs=1e-6)


def test_labels_by_hand(scalar_layout, scalar_members):
    # Gradients at class 0 are 1 - p = 1/2 and 1/4: squares 4/16 and 1/16.
    batches, told = (ONE, torch.tensor([0])), {}
    fused = fisher_average(
        scalar_members(0, log(3)),
        layout=scalar_layout,
        batches=batches,
        fisher="empirical",
        normalise=False,
        report=told,
    )
    assert fused["0.weight"][0].item() == pytest.approx(log(3) / 5, abs=1e-5)
    assert told["shares"] == [0.8, 0.2]
    assert told["root_mean_square"] == pytest.approx([0.25, 0.0625])


def test_drawn_classes_come_near_the_expectation(scalar_layout, scalar_members):
    # 1/16 with probability 3/4, 9/16 with 1/4: standard error .0034 around 3/16
    told = {}
    fisher_average(
        scalar_members(0, log(3)),
        layout=scalar_layout,
        batches=torch.ones(4000, 1),
        fisher="sampled",
        report=told,
    )
    assert told["root_mean_square"][0] == pytest.approx(1 / 4)
    assert told["root_mean_square"][1] == pytest.approx(3 / 16, abs=3 * 0.0034)


def test_of_zero_information_the_plain_average_comes(scalar_layout, scalar_members):
    fused = fisher_average(scalar_members(1, 2), layout=scalar_layout, batches=torch.zeros(3, 1))
    assert fused["0.weight"].flatten().tolist() == [1.5, 0.0]


@pytest.mark.parametrize("fisher", ["expected", "empirical"])
@pytest.mark.parametrize("normalise", [True, False])
def test_agrees_with_a_loop_in_float64(fisher, normalise, mlp, mlp_layout, mlp_members):
    generator = torch.Generator().manual_seed(2)
    inputs, labels = torch.randn(20, 5, generator=generator), torch.arange(20) % 3
    fisher_of = []
    for member in mlp_members:
        exact = {key: t.double() for key, t in member.items()}
        known = labels if fisher == "empirical" else None
        fisher_of.append(exact_fisher(mlp, exact, inputs.double(), known))
    sizes = [torch.cat([t.flatten() for t in own.values()]) for own in fisher_of]
    sizes = torch.stack([s.square().mean().sqrt() for s in sizes])
    sizes = sizes if normalise else sizes.mean().expand(len(sizes))
    fused = fisher_average(
        mlp_members,
        layout=mlp_layout,
        batches=(inputs, labels),
        fisher=fisher,
        normalise=normalise,
        floor=1e-3,
    )
    for key in fused:
        weight = [own[key] / size + 1e-3 for own, size in zip(fisher_of, sizes, strict=True)]
        total = sum(w * m[key].double() for w, m in zip(weight, mlp_members, strict=True))
        assert torch.allclose(fused[key].double(), total / sum(weight), atol=1e-5, rtol=0), key


def test_chunks_do_not_change_the_result(monkeypatch, mlp_layout, mlp_members):
    inputs = torch.randn(20, 5, generator=torch.Generator().manual_seed(2))
    whole = fisher_average(mlp_members, layout=mlp_layout, batches=inputs)
    monkeypatch.setattr(_squared_gradients, "ENTRIES", 1)
    parts = fisher_average(mlp_members, layout=mlp_layout, batches=inputs)
    assert all(torch.allclose(whole[key], parts[key], atol=1e-6) for key in whole)


class Positions(nn.Module):
    """A linear map at every position, then a mean over them."""

    def __init__(self):
        super().__init__()
        self.enter, self.inner, self.leave = nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.leave(self.inner(torch.relu(self.enter(x))).mean(1))


class Temperature(nn.Module):
    """A parameter without axes."""

    def __init__(self):
        super().__init__()
        self.leave = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.scale * self.leave(x)


NETWORKS = {
    "temperature": (Temperature, (4,)),
    "positions": (Positions, (6, 4)),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(3, 4, 3, stride=2, bias=False),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16, 3),
        ),
        (2, 6, 6),
    ),
    "normalised": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3),
            nn.BatchNorm2d(3),
            nn.ReLU(),
            nn.Flatten(),
            nn.LayerNorm(48),
            nn.Linear(48, 3),
        ),
        (2, 6, 6),
    ),
    "grouped": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(64, 3)),
        (2, 6, 6),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_of_every_input_are_squared_by_themselves(name):
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = build().eval().double()
    parameters = {key: t.detach() for key, t in model.named_parameters()}
    program = trace(build(), torch.zeros(2, *shape))
    layout = Layout(program, discover_program(program))
    inputs = torch.randn(7, *shape).double()

    def pick(probabilities, rows):
        for c in range(3):
            yield torch.full(probabilities.shape[:2], c), probabilities[..., c]

    stacked = {k: torch.stack([t, t]).detach() for k, t in model.state_dict().items()}
    found = _squared_gradients.squared_gradients(stacked, layout, inputs, pick)
    assert found.keys() == parameters.keys()
    for key, tensor in exact_fisher(model, parameters, inputs).items():
        for own in found[key]:
            assert torch.allclose(own / len(inputs), tensor, rtol=1e-8, atol=1e-12), key


def test_it_predicts_better_than_the_average_on_digits(digits_scores):
    own, plain = digits_scores(fisher_average)
    assert own > plain + 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fisher": "exact"}, "fisher must be one of .* got 'exact'"),
        ({"fisher": None}, "fisher must be one of .* got None"),
        ({"normalise": "yes"}, "normalise must be one of False, True, got 'yes'"),
        ({"floor": 0.0}, r"floor must be a number in \(0, inf\), got 0.0"),
        ({"floor": float("nan")}, r"floor must be a number in \(0, inf\), got nan"),
        ({"floor": True}, r"floor must be a number in \(0, inf\), got True"),
        ({"floor": None}, r"floor must be a number in \(0, inf\), got None"),
        ({"fisher": "empirical"}, "batches has no labels"),
    ],
)
def test_options_out_of_their_range_are_refused(options, message, scalar_layout, scalar_members):
    with pytest.raises(ConfigError, match=message):
        fisher_average(scalar_members(1, 2), layout=scalar_layout, batches=ONE, **options)


def test_labels_of_another_task_are_refused(scalar_layout, scalar_members):
    with pytest.raises(ConfigError, match="labels reach 2, the network has classes 0 to 1"):
        fisher_average(
            scalar_members(1, 2),
            layout=scalar_layout,
            batches=(ONE, torch.tensor([2])),
            fisher="empirical",
        )


def test_networks_that_are_no_classifiers_are_refused(image_layout):
    layout, members = image_layout
    with pytest.raises(IncompatibleWeights, match="expected logits"):
        fisher_average(members, layout=layout, batches=torch.zeros(2, 1, 4, 4))


def test_missing_batches_are_named(scalar_members):
    model = nn.Sequential(nn.Linear(1, 2, bias=False))
    with pytest.raises(ConfigError, match="fisher_average needs 'batches'"):
        merge(scalar_members(1, 2), method="fisher_average", model=model, example_inputs=ONE)
