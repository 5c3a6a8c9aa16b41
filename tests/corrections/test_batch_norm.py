import sys
from functools import cache

import pytest
import torch
from torch import nn
from torch.func import functional_call

from metamerge import merge
from metamerge.corrections.batch_norm import batch_norm, recalibrate
from metamerge.structure import Execution, Layout, discover_program, run, trace

MODULE = sys.modules["metamerge.corrections.batch_norm"]


class Residual(nn.Module):
    """Normalisations on two branches, read by one sum, and one behind it."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(5, 6)
        self.one, self.other, self.last = (nn.BatchNorm1d(6) for _ in range(3))
        self.inner, self.leave = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.one(self.enter(x))
        x = torch.relu(x + self.other(self.inner(torch.relu(x))))
        return self.leave(self.last(x))


MODELS = {
    "linear": (
        lambda: nn.Sequential(
            nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4), nn.BatchNorm1d(4)
        ),
        (5,),
    ),
    "convolutions without bias": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 3, 3),
            nn.BatchNorm2d(3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(12, 3),
        ),
        (2, 6, 6),
    ),
    "signals": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
        ),
        (2, 6),
    ),
    "normalised inputs": (
        lambda: nn.Sequential(
            nn.BatchNorm2d(2), nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten()
        ),
        (2, 6, 6),
    ),
    "no parameters": (
        lambda: nn.Sequential(
            nn.Linear(5, 6), nn.BatchNorm1d(6, affine=False), nn.ReLU(), nn.Linear(6, 3)
        ),
        (5,),
    ),
    "residual": (Residual, (5,)),
}
COUNT = 3


@cache
def program_of(name):
    build, shape = MODELS[name]
    return trace(build(), torch.zeros(2, *shape))


def make(name, rows=40, dtype=torch.float32):
    """A program, stacked networks with wild statistics, and inputs."""
    build, shape = MODELS[name]
    generator = torch.Generator().manual_seed(0)
    model = build()
    inputs = 2 + 3 * torch.randn(rows, *shape, generator=generator, dtype=torch.float64)
    stacked = {
        key: torch.randn(COUNT, *t.shape, generator=generator, dtype=torch.float64).to(dtype)
        if t.is_floating_point()
        else torch.full((COUNT,), 7)
        for key, t in model.state_dict().items()
    }
    return model, program_of(name), stacked, inputs.to(dtype)


def normalisations_of(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def in_training(model, weights, inputs):
    """Running statistics after one batch of torch's training mode that forget all before."""
    for module in normalisations_of(model):
        module.momentum = 1.0
    model.double().load_state_dict(weights)
    model.train()(inputs)
    return {k: t.clone() for k, t in model.state_dict().items() if "running" in k}


def one_by_one(model, weights, inputs):
    """Run the network as often as it has normalisations, and set each to what it reads."""
    model.double().load_state_dict(weights)
    model.eval()
    for module in normalisations_of(model):
        read = []
        hook = module.register_forward_pre_hook(lambda _, args, read=read: read.append(args[0]))
        model(inputs)
        hook.remove()
        rows = read[0].transpose(0, 1).flatten(1).detach()
        module.running_mean.copy_(rows.mean(1))
        module.running_var.copy_(rows.var(1))
    return {k: t.clone() for k, t in model.state_dict().items() if "running" in k}


@pytest.mark.parametrize("chunk", [256, 7])
@pytest.mark.parametrize("kept", [2**28, 2000, 0])
@pytest.mark.parametrize("name", MODELS)
def test_statistics_are_those_of_what_a_normalisation_reads(name, kept, chunk, monkeypatch):
    monkeypatch.setattr(MODULE, "_CHUNK", chunk)
    monkeypatch.setattr(MODULE, "_KEPT", kept)
    model, program, stacked, inputs = make(name, dtype=torch.float64)
    measured = recalibrate(stacked, program, inputs)
    for n in range(COUNT):
        expected = one_by_one(model, {k: t[n] for k, t in stacked.items()}, inputs)
        assert expected
        for key, tensor in expected.items():
            assert torch.allclose(measured[key][n], tensor, rtol=1e-10, atol=1e-10), key
    for key, tensor in stacked.items():
        assert "running" in key or measured[key] is tensor


@pytest.mark.parametrize("name", MODELS)
def test_first_statistics_are_those_of_torch_in_training(name):
    # Behind the first, training divides by the biased variance of the batch, evaluation does not.
    model, program, stacked, inputs = make(name, dtype=torch.float64)
    measured = recalibrate(stacked, program, inputs)
    for n in range(COUNT):
        expected = in_training(model, {k: t[n] for k, t in stacked.items()}, inputs)
        for place, (key, tensor) in enumerate(expected.items()):
            close = 1e-10 if place < 2 else 3 / len(inputs)
            error = (measured[key][n] - tensor).abs().max()
            assert float(error) <= close * max(1.0, float(tensor.abs().max())), key


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_a_batch_in_training(name):
    _, program, stacked, inputs = make(name)
    measured = recalibrate(stacked, program, inputs)
    training = Execution(program, stacked, [inputs], stacked=True, training=True).run_all()
    found = run(program, measured, [inputs], stacked=True)
    # variances of the batch are biased, running ones are not: 40 rows differ by 1 / 39
    assert torch.allclose(found, training, atol=0.03 * float(training.abs().max()))


def test_two_numbers_by_hand():
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1), nn.Linear(1, 2))
    program = trace(model, torch.zeros(2, 1))
    stacked = {k: t[None].clone() for k, t in model.state_dict().items()}
    stacked["0.weight"], stacked["0.bias"] = torch.tensor([[[2.0]]]), torch.tensor([[1.0]])
    measured = recalibrate(stacked, program, torch.tensor([[-1.0], [1.0]]))  # makes -1 and 3
    assert measured["1.running_mean"].item() == 1.0
    assert measured["1.running_var"].item() == 8.0
    assert measured["1.num_batches_tracked"] is stacked["1.num_batches_tracked"]


def test_of_one_row_the_variance_is_zero():
    _, program, stacked, inputs = make("linear", rows=1)
    measured = recalibrate(stacked, program, inputs)
    assert measured["1.running_var"].abs().max() == 0
    assert run(program, measured, [inputs], stacked=True).isfinite().all()


def test_many_inputs_do_not_all_go_through_at_once(monkeypatch):
    monkeypatch.setattr(MODULE, "_CHUNK", 5)
    monkeypatch.setattr(MODULE, "_KEPT", 0)
    seen = []
    step = Execution.step

    def watch(self, node, lane=None):
        lane = step(self, node, lane)
        seen.append(lane.value.shape[1] if lane.stacked else lane.value.shape[0])
        return lane

    monkeypatch.setattr(Execution, "step", watch)
    _, program, stacked, inputs = make("residual", rows=40)
    recalibrate(stacked, program, inputs)
    assert max(seen) == 5


def test_what_is_kept_is_not_computed_again(monkeypatch):
    monkeypatch.setattr(MODULE, "_CHUNK", 5)
    names = []
    step = Execution.step

    def watch(self, node, lane=None):
        names.append(node.name)
        return step(self, node, lane)

    monkeypatch.setattr(Execution, "step", watch)
    _, program, stacked, inputs = make("residual", rows=40)
    recalibrate(stacked, program, inputs)
    assert max(names.count(name) for name in names) == 8  # once per chunk


def test_networks_without_running_statistics_are_passed_through():
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.ReLU(), nn.Linear(6, 3)
    )
    program = trace(model, torch.zeros(2, 4))
    stacked = {key: t[None] for key, t in model.state_dict().items()}
    measured = recalibrate(stacked, program, torch.randn(10, 4))
    assert measured == stacked
    assert measured is not stacked


def test_the_correction_measures_and_reads_no_member():
    _, program, stacked, inputs = make("linear")
    found = batch_norm(stacked, {}, Layout(program, discover_program(program)), inputs)
    expected = recalibrate(stacked, program, inputs)
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_nothing_that_comes_in_is_changed():
    _, program, stacked, inputs = make("convolutions without bias")
    before = {key: t.clone() for key, t in stacked.items()}
    recalibrate(stacked, program, inputs)
    assert all(torch.equal(stacked[key], tensor) for key, tensor in before.items())


def test_gradients_go_through_statistics():
    _, program, stacked, inputs = make("linear")
    stacked["0.weight"].requires_grad_()
    recalibrate(stacked, program, inputs)["4.running_var"].sum().backward()
    assert float(stacked["0.weight"].grad.abs().sum()) > 0


def members_of(name, **changed):
    model, _, stacked, inputs = make(name)
    for key in stacked:
        if key.endswith("running_var"):
            stacked[key] = stacked[key].abs() + 0.1
    stacked.update(changed)
    return model, [{k: t[n] for k, t in stacked.items()} for n in range(COUNT)], inputs


@pytest.mark.parametrize("name", ["linear", "convolutions without bias", "residual"])
def test_merge_measures_statistics_on_batches(name):
    model, members, inputs = members_of(name)
    merged = merge(members, method="average", model=model, batches=inputs)
    weights = {k: t.double() if t.is_floating_point() else t for k, t in merged.weights.items()}
    expected = one_by_one(model, weights, inputs.double())
    for key, tensor in expected.items():
        assert torch.allclose(merged.weights[key].double(), tensor, rtol=1e-4, atol=1e-4), key
    assert merged.report["corrections"]["batch_norm"]["inputs"] == 40


def test_merge_without_batches_averages_statistics():
    model, members, _ = members_of("linear")
    merged = merge(
        members, method="average", align=None, model=model, example_inputs=torch.zeros(2, 5)
    )
    mean = torch.stack([m["1.running_mean"] for m in members]).mean(0)
    assert torch.allclose(merged.weights["1.running_mean"], mean, atol=1e-6)
    assert "corrections" not in merged.report


def test_negative_variances_are_healed_by_batches():
    broken = torch.full((COUNT, 6), -1.0)
    model, members, inputs = members_of("linear", **{"1.running_var": broken})
    merged = merge(members, method="average", model=model, batches=inputs)
    assert float(merged.weights["1.running_var"].min()) > 0
    outputs = functional_call(model.eval(), merged.weights, inputs)
    assert outputs.isfinite().all()
