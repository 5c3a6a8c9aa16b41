"""AdamW for stacked networks beside ``torch.optim.AdamW``, one network at a time, in float64."""

from types import SimpleNamespace

import pytest
import torch

from zoo import adam
from zoo.adam import LARGE, AdamW

SHAPES = {"layer": (5, 4), "row": (1, 3), "column": (3, 1), "kernel": (3, 2, 2, 2), "bias": (5,)}
SHAPES |= {"scalar": ()}
COUNT, STEPS = 4, 6
SAME, OWN = torch.full((COUNT,), 0.03), torch.tensor([0.03, 0.01, 0.2, 1e-4])
DECAYS = {"none": 0 * SAME, "same": 10 * SAME, "own": torch.tensor([0.3, 0.0, 0.1, 2.0])}
CLOSE = {"rtol": 0, "atol": 1e-13}  # six steps of weights and moments of about 1, rounded to 1e-16


@pytest.fixture
def paths(monkeypatch):
    """Names of the paths that steps took, and for how many networks each was called."""
    taken = []

    def spy(name, count):
        original = getattr(AdamW, name)

        def call(self, *args):
            taken.append((name, count(args)))
            return original(self, *args)

        monkeypatch.setattr(AdamW, name, call)

    spy("_fused", lambda args: len(args[0]))
    spy("_batched", lambda args: len(args[0]))
    return taken


def drawn(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    made = {
        key: torch.randn(COUNT, *shape, generator=generator, dtype=torch.float64).to(dtype)
        for key, shape in SHAPES.items()
    }
    return made | {"layer": made["layer"].mT.contiguous().mT}  # as layers of a training lie


class Alone:
    """Every network with an optimizer of torch's own."""

    def __init__(self, weights, decay):
        self.networks = [
            {key: tensor[i].clone().requires_grad_() for key, tensor in weights.items()}
            for i in range(COUNT)
        ]
        self.optimizers = [
            torch.optim.AdamW(own.values(), weight_decay=float(rate), fused=False, foreach=False)
            for own, rate in zip(self.networks, decay, strict=True)
        ]

    def step(self, grads, rates, networks):
        for place, i in enumerate(networks):
            self.optimizers[i].param_groups[0]["lr"] = float(rates[place])
            for key, leaf in self.networks[i].items():
                leaf.grad = grads[key][place].clone().reshape(leaf.shape)
            self.optimizers[i].step()

    def weights(self, networks):
        return {
            key: torch.stack([self.networks[i][key].detach() for i in networks]) for key in SHAPES
        }


def compared(decay, rates, dtype=torch.float64):
    """Both after the same start: theirs, ours, and what is left of the rate at a step."""
    weights = drawn(0, dtype)
    return SimpleNamespace(
        alone=Alone(weights, decay.double()),
        ours=AdamW(weights, decay.double()),
        rates=lambda step: rates.double() * (1 - step / STEPS),
    )


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, **CLOSE, msg=lambda text, k=key: k + text)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rates", [SAME, OWN], ids=["same rates", "own rates"])
@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_every_path_is_the_adamw_of_torch(monkeypatch, paths, decay, rates, large):
    if large:
        monkeypatch.setattr(adam, "LARGE", 1)
    both = compared(DECAYS[decay], rates)
    for step in range(STEPS):
        grads, now = drawn(step + 1), both.rates(step)
        both.ours.step(grads, now)
        both.alone.step(grads, now, range(COUNT))
    assert_same(both.ours.weights, both.alone.weights(range(COUNT)))
    same = rates is SAME and decay != "own"
    expected = ("_fused" if same or large else "_batched", len(SHAPES) if same or large else COUNT)
    assert set(paths) == {expected}
    calls = 1 if same else COUNT if large else len(SHAPES)  # a step; else per network, per tensor
    assert len(paths) == STEPS * calls


@pytest.mark.parametrize("size", [LARGE - 1, LARGE])
def test_networks_get_calls_of_their_own_from_a_size_on(paths, size):
    weights = {"weight": torch.zeros(2, size - 3), "bias": torch.zeros(2, 3)}
    grads = {key: torch.ones_like(tensor) for key, tensor in weights.items()}
    AdamW(weights, torch.zeros(2)).step(grads, torch.tensor([0.1, 0.2]))
    assert {name for name, _ in paths} == {"_fused" if size == LARGE else "_batched"}


@pytest.mark.parametrize("rates", [SAME, OWN], ids=["same rates", "own rates"])
@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_networks_that_are_done_stay_as_they_are(monkeypatch, rates, large):
    if large:
        monkeypatch.setattr(adam, "LARGE", 1)
    both = compared(DECAYS["own"], rates)
    for step, active in enumerate((4, 4, 3, 3, 1, 1)):
        grads = {key: tensor[:active] for key, tensor in drawn(step + 1).items()}
        now = both.rates(step)[:active]
        both.ours.step(grads, now)
        both.alone.step(grads, now, range(active))
    assert_same(both.ours.weights, both.alone.weights(range(COUNT)))


@pytest.mark.parametrize("rates", [SAME, OWN], ids=["same rates", "own rates"])
@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("kept", [[0, 2], [1], [0, 1, 2, 3]], ids=str)
def test_networks_that_are_kept_go_on_with_their_moments_and_decays(
    monkeypatch, rates, large, kept
):
    if large:
        monkeypatch.setattr(adam, "LARGE", 1)
    both, there = compared(DECAYS["own"], rates), torch.tensor(kept)
    for step in range(STEPS):
        if step == 3:
            both.ours.keep(there)
        networks = range(COUNT) if step < 3 else kept
        grads = {key: tensor[list(networks)] for key, tensor in drawn(step + 1).items()}
        now = both.rates(step)[list(networks)]
        both.ours.step(grads, now)
        both.alone.step(grads, now, networks)
    assert_same(both.ours.weights, both.alone.weights(kept))
    assert both.ours.weights["layer"].mT.is_contiguous()


@pytest.mark.parametrize("rates", [SAME, OWN], ids=["same rates", "own rates"])
def test_weights_are_changed_in_place_and_gradients_not(rates):
    weights, grads = drawn(0), drawn(1)
    before = {key: tensor.clone() for key, tensor in grads.items()}
    start = {key: tensor.clone() for key, tensor in weights.items()}
    given = dict(weights)
    AdamW(weights, DECAYS["none"]).step(grads, rates)
    for key, tensor in weights.items():
        assert tensor is given[key]
        assert not torch.equal(tensor, start[key])
        assert torch.equal(grads[key], before[key])


def test_weights_in_another_layout_than_their_gradients_are_trained_alike():
    turned, straight = drawn(0), {key: tensor.contiguous() for key, tensor in drawn(0).items()}
    assert not turned["layer"].is_contiguous()
    optimizers = [AdamW(weights, DECAYS["own"]) for weights in (turned, straight)]
    for step in range(STEPS):
        grads = drawn(step + 1)
        grads |= {"layer": grads["layer"].contiguous()}
        for optimizer in optimizers:
            optimizer.step(grads, OWN if step % 2 else SAME)  # both paths, by turns
    assert_same(turned, straight)


def test_the_first_step_by_hand():
    """Moments 0.1 g and 0.001 g^2, corrected to g and g^2: a step of the rate against the sign."""
    weights = {"w": torch.tensor([[2.0, -1.0], [2.0, -1.0]], dtype=torch.float64)}
    grads = {"w": torch.tensor([[0.5, -4.0], [0.5, -4.0]], dtype=torch.float64)}
    AdamW(weights, torch.tensor([0.0, 0.5])).step(grads, torch.tensor([0.1, 0.1]))
    # The second decays by 1 - 0.1 * 0.5 = 0.95 first; eps is 1e-8 of gradients of 0.5.
    expected = torch.tensor([[1.9, -0.9], [1.8, -0.85]], dtype=torch.float64)
    torch.testing.assert_close(weights["w"], expected, rtol=0, atol=1e-8)
