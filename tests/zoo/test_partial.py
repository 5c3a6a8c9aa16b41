"""Training of subsets: what is fixed stays to the bit, what is live moves as it would."""

import pytest
import torch

from metamerge.errors import ConfigError
from metamerge.structure import Layout, discover_program
from metamerge.subsets import Live, find_kernels, masks
from zoo.architectures import build, program_of
from zoo.masks import FAMILIES, FULL, Curvature, Masks, Recipe
from zoo.partial import Data, Descent, PartialTraining, train_partly
from zoo.tasks import load_task
from zoo.training import init_networks, train_networks

SEEDS = [0, 1]


@pytest.fixture(scope="module")
def digits():
    return load_task("digits")


@pytest.fixture(scope="module")
def made(digits):
    def network():
        return build("convnet", (1, 8, 8), 10, widths=(3, 4))

    program = program_of(network(), (1, 8, 8))
    weights = init_networks(network, SEEDS)
    kernels = find_kernels(Layout(program, discover_program(program)))
    curvatures = [
        Curvature(lambda w: sum(t.pow(4).sum() for t in w.values()), own, kernels, probes=1)
        for own in ({k: t[i] for k, t in weights.items()} for i in range(2))
    ]
    return program, Masks(kernels, weights, SEEDS, curvatures)


def training(made, digits, name, **settings):
    program, drawn = made
    recipe = Recipe.parse(name)
    data = Data(digits.inputs, digits.targets, [torch.arange(1000)] * 2, SEEDS)
    told = {"steps": 6, "batch_size": 20, "lr": 0.01, "period": recipe.period, **settings}
    draws = lambda number: drawn.draw(recipe, number)  # noqa: E731
    return PartialTraining(program, drawn.weights, data, draws, Descent(**told))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != FULL])
def test_what_is_fixed_stays_to_the_bit_and_what_is_live_moves(made, digits, name, optimizer):
    start = {key: tensor.clone() for key, tensor in made[1].weights.items()}
    own = training(made, digits, name, optimizer=optimizer, weight_decay=0.1)
    seen = masks(start, own.subset)
    end = train_partly(own, (), lambda *_: None)
    for key, live in seen.items():
        same = end[key] == start[key]
        assert same[~live].all()
        assert not live.any() or float(same[live].float().mean()) < 0.5  # ReLUs leave some at rest
        assert torch.equal(made[1].weights[key], start[key])


def test_all_weights_are_trained_as_the_zoo_trains_them(made, digits):
    program, drawn = made
    data = [torch.arange(1000)] * 2
    expected = train_networks(
        program, drawn.weights, digits.inputs, digits.targets, data,
        epochs=6 * 20 / 1000, batch_size=20, lr=0.01, seed=SEEDS,
    ).weights  # fmt: skip
    found = train_partly(training(made, digits, FULL), (), lambda *_: None)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-5)  # float32, 6 steps


def test_plain_descent_by_hand(made, digits):
    own = training(made, digits, "first", optimizer="sgd", steps=1, lr=0.5, weight_decay=0.1)
    before = {key: tensor.clone() for key, tensor in own.live.items()}
    leaves = {key: tensor.clone().requires_grad_() for key, tensor in before.items()}
    rows = own.orders[:, :20]
    outputs = own.passes.run(own.weights, leaves, digits.inputs[rows])
    grads = torch.autograd.grad(
        own.loss(outputs, digits.targets[rows]).sum(), list(leaves.values())
    )
    own.step()
    for (key, tensor), grad in zip(before.items(), grads, strict=True):
        torch.testing.assert_close(own.live[key], tensor * (1 - 0.5 * 0.1) - 0.5 * grad)


def test_masks_rotate(made, digits):
    """Halves alternate every two steps: after two steps only the first half has moved."""
    own = training(made, digits, "first~2")
    start, halves = own.weights, [masks(own.weights, own.draws(i)) for i in range(2)]
    kept = {}
    train_partly(own, (2, 4), lambda step, weights, _: kept.update({step: dict(weights)}))
    key = "3.weight"  # four kernels
    assert torch.equal(halves[0][key], ~halves[1][key])
    assert torch.equal(kept[2][key][~halves[0][key]], start[key][~halves[0][key]])
    assert torch.equal(kept[4][key][halves[0][key]], kept[2][key][halves[0][key]])
    assert not torch.equal(kept[4][key][halves[1][key]], kept[2][key][halves[1][key]])


def test_losses_are_means_since_the_last_mark(made, digits):
    steps = [float(training(made, digits, "random").step()[0])]
    own = training(made, digits, "random")
    steps = [own.step()[0] for _ in range(6)]
    told = {}
    again = training(made, digits, "random")
    train_partly(again, (0, 2, 6), lambda step, _, losses: told.update({step: losses[0]}))
    assert told[0] == steps[0]
    torch.testing.assert_close(told[2], sum(steps[:2]) / 2)
    torch.testing.assert_close(told[6], sum(steps[2:]) / 4)


def test_random_masks_are_of_a_seed_and_a_draw(made):
    recipe = Recipe.parse("random@0.5~3")
    draws = [made[1].draw(recipe, number)["3.weight"].index for number in (0, 0, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert len({tuple(own.flatten().tolist()) for own in draws}) > 1
    assert not torch.equal(draws[0][0], draws[0][1]) or not torch.equal(draws[2][0], draws[2][1])


def test_halves_by_saliency_are_each_other_s_rest(made):
    """Of a loss that sums fourth powers, the largest weights are the most salient ones."""
    largest, smallest = (
        masks(made[1].weights, made[1].draw(Recipe.parse(name)))["3.weight"][0]
        for name in ("salient-weights", "unsalient-weights")
    )
    assert torch.equal(largest, ~smallest)
    size = made[1].weights["3.weight"][0].abs()
    assert size[largest].min() >= size[smallest].max()


def test_layers_and_dense_ones_by_name(made):
    draw = {name: made[1].draw(Recipe.parse(name)) for name in FAMILIES}
    assert list(draw["upper"]) == ["3.weight", "3.bias", "7.weight", "7.bias"]
    assert list(draw["lower"]) == ["0.weight", "0.bias", "3.weight", "3.bias"]
    assert "7.weight" not in draw["first-conv"]
    assert draw["first-conv+dense"]["7.weight"] == Live()
    assert draw["first"]["7.weight"].index.tolist() == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("frist", "expected family"),
        ("random@", "expected family"),
        ("random@1.5", "share 1.5"),
        ("upper~20", "does not rotate"),
    ],
)
def test_names_that_are_none_are_refused(name, told):
    with pytest.raises(ConfigError, match=told):
        Recipe.parse(name)
