"""Batched training beside a loop over modules and torch's own AdamW."""

from copy import deepcopy
from math import ceil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from metamerge.structure import trace
from metamerge.weights import stack
from zoo.training import cross_entropy, distillation, init_networks, predict, train_networks

ROWS = [torch.arange(7), torch.arange(5, 17), torch.tensor([3, 19, 8, 8, 2])]
OPTIONS = {"epochs": 2.5, "batch_size": 4, "lr": 0.03, "seed": 3}
NETWORKS = {
    "linear layers": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 3)
    ),
    "convolutions": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)
    ),
}


def make_images(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(20, 1, 6, 6, generator=generator, dtype=torch.float64)
    return inputs.to(dtype), torch.randint(3, (20,), generator=generator)


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    return NETWORKS[request.param]


def start_of(network, dtype=torch.float64):
    model = network().to(dtype)
    program = trace(model, make_images(dtype)[0])
    return program, {k: t.to(dtype) for k, t in init_networks(network, [1, 2, 3]).items()}


def furthest(found, expected):
    assert found.keys() == expected.keys()
    return max(float((found[key] - expected[key]).abs().max()) for key in expected)


def part(weights, index):
    return {key: tensor[index : index + 1] for key, tensor in weights.items()}


def one(weights, index):
    return {key: tensor[index] for key, tensor in weights.items()}


def order_of(rows, seed, steps, batch_size):
    """Rows of one network, batch by batch: every pass shuffled anew by the network's own seed."""
    generator = torch.Generator().manual_seed(seed)
    passes = ceil(steps * batch_size / len(rows))
    shuffled = torch.rand(passes, len(rows), generator=generator).argsort(1)
    return rows[shuffled].flatten()[: steps * batch_size].split(batch_size)


def own_seed(index, seed=3):
    """Seed of one network where a training has one for all."""
    return seed * 1_000_003 + index


def trained_alone(
    network, state, images, rows, *, seed, epochs=2.5, lr=0.03, decay=0.0, batch_size=4,
    held_back=None, patience=0, loss=F.cross_entropy,
):  # fmt: skip
    """One module in training mode, torch.optim.AdamW, and a rate that falls to zero.

    ``trail`` has the weights after every number of steps, ``losses`` and ``held_back`` a mean per
    epoch; an epoch ends with the step after which as many rows were met as there are.
    """
    model = network().double()
    model.load_state_dict(state)
    inputs, targets = images
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=decay
    )
    steps = ceil(epochs * len(rows) / batch_size)
    found = SimpleNamespace(trail=[deepcopy(model.state_dict())], losses={}, held_back={}, best=0)
    smallest, epochs_since = torch.inf, 0
    for step, batch in enumerate(order_of(rows, seed, steps, batch_size)):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        value = loss(model.train()(inputs[batch]), targets[batch])
        value.backward()
        optimizer.step()
        found.trail.append(deepcopy(model.state_dict()))
        epoch, after = (met * batch_size // len(rows) for met in (step, step + 1))
        found.losses.setdefault(epoch, []).append(float(value))
        if held_back is None or (after == epoch and step + 1 < steps):
            continue
        with torch.no_grad():
            judged = float(loss(model.eval()(inputs[held_back]), targets[held_back]))
        found.held_back[epoch] = judged
        epochs_since = 0 if judged < smallest else epochs_since + 1
        if judged < smallest:
            smallest, found.best = judged, step + 1
        if patience and epochs_since == patience:
            break
    found.made = len(found.trail) - 1
    found.steps = found.best if patience else found.made
    found.weights = found.trail[found.steps]
    found.losses = {epoch: sum(values) / len(values) for epoch, values in found.losses.items()}
    return found


def curve(values, length):
    """Values by epoch as a training has them: NaN where there is none."""
    return torch.tensor([values.get(epoch, torch.nan) for epoch in range(length)])


# ---------------------------------------------------------------------------- training


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_networks_trained_side_by_side_equal_each_trained_alone_by_torch(network, decay):
    program, start = start_of(network)
    images = make_images()
    found = train_networks(program, start, *images, ROWS, weight_decay=decay, **OPTIONS).weights
    alone = [
        trained_alone(network, one(start, i), images, ROWS[i], seed=own_seed(i), decay=decay)
        for i in range(3)
    ]
    expected = stack([own.weights for own in alone])
    assert furthest(expected, start) > 0.05
    # All in float64 but the rate: 6e-8 of at most 8 steps of 0.03.
    assert furthest(found, expected) < 1e-7


@pytest.mark.parametrize("chunk", [1, 2])
def test_the_size_of_chunks_does_not_matter(network, chunk):
    program, start = start_of(network)
    expected = train_networks(program, start, *make_images(), ROWS, **OPTIONS).weights
    found = train_networks(program, start, *make_images(), ROWS, chunk=chunk, **OPTIONS).weights
    assert furthest(found, expected) < 1e-12


def test_in_float32_side_by_side_equals_alone_to_rounding(network):
    program, start = start_of(network, torch.float32)
    images = make_images(torch.float32)
    together = train_networks(program, start, *images, ROWS, **OPTIONS).weights
    alone = train_networks(program, start, *images, ROWS, chunk=1, **OPTIONS).weights
    # Sums in another order change gradients by some 1e-6 of their size, and each of at most 8 steps
    # moves a weight by about its rate, 0.03, whatever the size of the gradient.
    assert furthest(together, alone) < 8 * 0.03 * 1e-4


def test_a_network_does_not_depend_on_those_beside_it(network):
    program, start = start_of(network)
    together = train_networks(program, start, *make_images(), ROWS, **OPTIONS).weights
    first = train_networks(program, part(start, 0), *make_images(), ROWS[:1], **OPTIONS).weights
    assert furthest(first, part(together, 0)) < 1e-12


def test_a_network_sees_its_own_rows_alone(network):
    program, start = start_of(network)
    inputs, targets = make_images()
    expected = train_networks(program, start, inputs, targets, ROWS, **OPTIONS).weights
    others = torch.ones(20, dtype=torch.bool)
    others[ROWS[1]] = False
    inputs[others] = torch.rand(int(others.sum()), 1, 6, 6, dtype=torch.float64)
    targets[others] = (targets[others] + 1) % 3
    found = train_networks(program, start, inputs, targets, ROWS, **OPTIONS).weights
    assert furthest(part(found, 1), part(expected, 1)) < 1e-12
    assert furthest(part(found, 0), part(expected, 0)) > 1e-4


def test_training_changes_neither_weights_nor_images(network):
    program, start = start_of(network)
    images = make_images()
    before = [t.clone() for t in (*start.values(), *images)]
    trained = train_networks(program, start, *images, ROWS, **OPTIONS).weights
    assert all(torch.equal(*pair) for pair in zip(before, (*start.values(), *images), strict=True))
    addresses = {tensor.data_ptr() for tensor in start.values()}
    assert addresses.isdisjoint(tensor.data_ptr() for tensor in trained.values())
    assert not any(tensor.requires_grad for tensor in trained.values())


def test_the_seed_decides_the_order_of_rows(network):
    program, start = start_of(network)
    one, same, other = (
        train_networks(program, start, *make_images(), ROWS, **{**OPTIONS, "seed": seed}).weights
        for seed in (3, 3, 4)
    )
    assert furthest(one, same) == 0
    assert furthest(one, other) > 1e-4


def test_networks_with_equal_weights_and_rows_meet_them_in_orders_of_their_own(network):
    program, start = start_of(network)
    twins = {key: tensor[[0, 0]] for key, tensor in start.items()}
    trained = train_networks(program, twins, *make_images(), [ROWS[1]] * 2, **OPTIONS).weights
    assert furthest(part(trained, 0), part(trained, 1)) > 1e-4


def test_no_epochs_give_the_start(network):
    program, start = start_of(network)
    trained = train_networks(program, start, *make_images(), ROWS, epochs=0).weights
    assert furthest(trained, start) == 0


def test_progress_counts_networks_that_are_done(network):
    program, start = start_of(network)
    told = []
    train_networks(
        program, start, *make_images(), ROWS, chunk=2, progress=told.append, **OPTIONS
    ).weights
    assert told == [2, 3]


def test_batch_normalisation_is_trained_as_a_module_in_training_mode_is():
    def network():
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.ReLU(), nn.Flatten(),
            nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Linear(6, 3),
        )  # fmt: skip

    inputs, targets = make_images()
    program = trace(network().double().eval(), inputs)
    start = {
        k: t.double() if t.is_floating_point() else t
        for k, t in init_networks(network, [1, 2]).items()
    }
    found = train_networks(program, start, inputs, targets, ROWS[:2], **OPTIONS).weights
    for index in range(2):
        state = one(start, index)
        expected = trained_alone(
            network, state, (inputs, targets), ROWS[index], seed=own_seed(index)
        ).weights
        for key, tensor in expected.items():
            assert torch.allclose(found[key][index], tensor, atol=1e-7), key
        assert not torch.equal(expected["1.running_mean"], state["1.running_mean"])
        assert found["5.num_batches_tracked"][index] == ceil(2.5 * len(ROWS[index]) / 4)


def test_frozen_tensors_keep_their_values():
    program, start = start_of(NETWORKS["linear layers"])
    key = next(iter(start))
    trained = train_networks(program, start, *make_images(), ROWS, frozen=[key], **OPTIONS).weights
    kept = [name for name in start if torch.equal(trained[name], start[name])]
    assert kept == [key]


def test_targets_may_be_probabilities_common_to_all_or_of_each_network(network):
    program, start = start_of(network)
    inputs, targets = make_images()
    sharp = F.one_hot(targets, 3).double()
    expected = train_networks(program, start, inputs, targets, ROWS, **OPTIONS).weights
    options = {**OPTIONS, "loss": distillation, "chunk": 2}  # chunks must pick their targets
    common = train_networks(program, start, inputs, sharp, ROWS, **options).weights
    assert furthest(common, expected) < 1e-9
    own = torch.stack([sharp, sharp.roll(1, -1), sharp.roll(2, -1)])
    each = train_networks(program, start, inputs, own, ROWS, **options).weights
    assert furthest(part(each, 0), part(expected, 0)) < 1e-9
    for index in (1, 2):
        turned = (targets + index) % 3
        labelled = train_networks(program, start, inputs, turned, ROWS, **OPTIONS).weights
        assert furthest(part(each, index), part(labelled, index)) < 1e-9


def test_trained_members_know_their_segments_and_little_else(digits_zoo):
    inputs, targets = digits_zoo.split.task.inputs, digits_zoo.split.task.targets
    flat = {key: tensor.flatten(0, 1) for key, tensor in digits_zoo.train.items()}
    right = predict(digits_zoo.layout.program, flat, inputs).argmax(-1) == targets  # [n, rows]
    own = torch.stack([right[i, digits_zoo.segments[i]].float().mean() for i in range(len(right))])
    assert own.mean() > 0.88  # measured: 0.93
    assert right[:, digits_zoo.split.rows("validation")].float().mean() < 0.7


# ---------------------------------------------------------------------------- losses


def test_losses_are_those_of_torch_for_every_network():
    logits = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(24).reshape(4, 6) % 3
    expected = torch.stack([F.cross_entropy(logits[i], targets[i]) for i in range(4)])
    assert torch.allclose(cross_entropy(logits, targets), expected, atol=1e-6)
    soft = torch.rand(4, 6, 3).softmax(-1)
    expected = torch.stack([F.cross_entropy(logits[i], soft[i]) for i in range(4)])
    assert torch.allclose(distillation(logits, soft), expected, atol=1e-6)


# ---------------------------------------------------------------------------- init


def test_networks_are_initialised_as_the_factory_does(network):
    found = init_networks(network, [5, 9])
    for index, seed in enumerate((5, 9)):
        torch.manual_seed(seed)
        expected = network().state_dict()
        assert {k: t.shape[1:] for k, t in found.items()} == {
            k: t.shape for k, t in expected.items()
        }
        assert all(torch.equal(found[key][index], t) for key, t in expected.items())


def test_equal_seeds_give_equal_networks_in_memory_of_their_own(network):
    found = init_networks(network, [5, 9, 5])
    for tensor in found.values():
        assert torch.equal(tensor[0], tensor[2])
        assert not torch.equal(tensor[0], tensor[1])
        tensor[0] += 1
        assert not torch.equal(tensor[0], tensor[2])


def test_the_callers_random_numbers_are_left_alone(network):
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    init_networks(network, [5, 9])
    assert torch.equal(torch.rand(4), expected)


# ---------------------------------------------------------------------------- prediction


@pytest.mark.parametrize("budget", [1, 2 * 20 * 36, 2**26])
def test_predictions_do_not_depend_on_the_memory_at_hand(network, budget):
    program, start = start_of(network)
    inputs = make_images()[0]
    found = predict(program, start, inputs, budget=budget)
    model = network().double()
    for index in range(3):
        own = {key: tensor[index] for key, tensor in start.items()}
        assert torch.allclose(found[index], functional_call(model, own, inputs), atol=1e-12)
    assert not found.requires_grad
