"""Batched training beside a loop over modules and torch's own AdamW."""

from copy import deepcopy
from functools import cache
from math import ceil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from metamerge.structure import trace
from metamerge.weights import stack
from zoo import architectures
from zoo.adam import Moments
from zoo.training import (
    cross_entropy,
    distillation,
    init_networks,
    predict,
    squared_error,
    train_networks,
)

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


@cache  # tracing takes longer than a training
def program_of(network, dtype):
    return trace(network().to(dtype).eval(), make_images(dtype)[0])


def start_of(network, dtype=torch.float64):
    start = init_networks(network, [1, 2, 3])
    start = {k: t.to(dtype) if t.is_floating_point() else t for k, t in start.items()}
    return program_of(network, dtype), start


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
        found.losses.setdefault(epoch, []).append(value.item())
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
    train_networks(program, start, *make_images(), ROWS, chunk=2, progress=told.append, **OPTIONS)
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


# ---------------------------------------------------------------------------- each its own way

MORE = NETWORKS | {
    "batch normalisation": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    ),
    # 8,800 parameters: where rates differ, every network has a call of the optimizer of its own
    "large layers": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(36, 220), nn.ReLU(), nn.Linear(220, 3)
    ),
}
OWN = {
    "epochs": torch.tensor([14.0, 9.5, 12.0]),
    "lr": torch.tensor([0.02, 0.005, 0.01]),
    "weight_decay": torch.tensor([0.0, 0.5, 0.1]),
}
SEEDS = [11, 5, 2**60]
HELD_BACK = [torch.arange(12, 17), torch.arange(4), torch.tensor([0, 1, 5, 6, 7, 9, 10])]
PATIENT = {"held_back": HELD_BACK, "patience": 2}


@pytest.fixture(scope="module", params=MORE)
def another(request):
    network = MORE[request.param]
    return network, *start_of(network)


def own_options(index):
    return {
        "epochs": float(OWN["epochs"][index]),
        "lr": float(OWN["lr"][index]),
        "decay": float(OWN["weight_decay"][index]),
        "seed": SEEDS[index],
    }


def each_alone(network, start, **changes):
    """The three networks trained by torch, one after the other."""
    held_back = changes.pop("held_back", [None] * 3)
    return [
        trained_alone(
            network, one(start, i), make_images(), ROWS[i],
            held_back=held_back[i], **own_options(i), **changes,
        )
        for i in range(3)
    ]  # fmt: skip


def assert_as_alone(found, alone):
    """Weights to 1e-6: rates are rounded to 6e-8 of them, in up to 42 steps that build on others.

    Losses and curves are told in float32.
    """
    assert furthest(found.weights, stack([own.weights for own in alone])) < 1e-6
    assert found.steps.tolist() == [own.steps for own in alone]
    for name in ("losses", "held_back"):
        told = getattr(found, name)
        expected = torch.stack([curve(getattr(own, name), told.shape[1]) for own in alone])
        torch.testing.assert_close(told, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_epochs_rates_decays_and_seeds_of_their_own_give_what_each_gives_alone(another):
    network, program, start = another
    found = train_networks(program, start, *make_images(), ROWS, batch_size=4, seed=SEEDS, **OWN)
    alone = each_alone(network, start)
    assert_as_alone(found, alone)
    assert found.losses.isnan().sum(1).tolist() == [0, 4, 2]  # epochs after their last
    assert found.held_back.isnan().all()
    assert found.snapshots == {}


def test_one_number_is_that_number_for_every_network(another):
    _, program, start = another
    common = {"epochs": 2.5, "lr": 0.03, "weight_decay": 0.2}
    same = {name: torch.full((3,), value) for name, value in common.items()}
    found, expected = (
        train_networks(program, start, *make_images(), ROWS, batch_size=4, **options)
        for options in (same, common)
    )
    assert furthest(found.weights, expected.weights) < 1e-6  # 0.03 in float32 is another number


def test_networks_without_epochs_stay_at_their_start_beside_others():
    program, start = start_of(NETWORKS["linear layers"])
    found = train_networks(
        program, start, *make_images(), ROWS,
        epochs=torch.tensor([2.0, 0.0, 3.0]), snapshots=2, **PATIENT,
    )  # fmt: skip
    assert furthest(part(found.weights, 1), part(start, 1)) == 0
    assert furthest(part(found.weights, 0), part(start, 0)) > 0
    assert found.steps[1] == 0
    assert found.losses[1].isnan().all()
    assert found.held_back[1].isnan().all()
    assert all(torch.equal(t[1, 1], start[key][1]) for key, t in found.snapshots.items())


def test_equal_seeds_weights_and_rows_give_equal_networks(another):
    _, program, start = another
    twins = {key: tensor[[0, 0, 0]] for key, tensor in start.items()}
    trained = train_networks(
        program, twins, *make_images(), [ROWS[1]] * 3, epochs=2, batch_size=4, seed=[7, 8, 7]
    ).weights
    assert furthest(part(trained, 0), part(trained, 2)) < 1e-12
    assert furthest(part(trained, 0), part(trained, 1)) > 1e-4


def test_one_seed_for_all_gives_each_network_one_of_its_own():
    program, start = start_of(NETWORKS["linear layers"])
    options = {"epochs": 2, "batch_size": 4}
    found = train_networks(program, start, *make_images(), ROWS, seed=3, **options)
    seeds = [own_seed(i) for i in range(3)]
    expected = train_networks(program, start, *make_images(), ROWS, seed=seeds, **options)
    assert furthest(found.weights, expected.weights) == 0


# ---------------------------------------------------------------------------- early stopping


def test_early_stopping_equals_a_loop_over_networks(another):
    network, program, start = another
    found = train_networks(
        program, start, *make_images(), ROWS, batch_size=4, seed=SEEDS, **OWN, **PATIENT
    )
    alone = each_alone(network, start, **PATIENT)
    assert_as_alone(found, alone)
    planned = [ceil(float(OWN["epochs"][i]) * len(ROWS[i]) / 4) for i in range(3)]
    stopped = [own.made < steps for own, steps in zip(alone, planned, strict=True)]
    assert any(stopped)
    assert any(own.steps < own.made for own in alone)  # best weights, not the last


def test_rows_held_back_without_patience_only_watch(another):
    network, program, start = another
    options = {"batch_size": 4, "seed": SEEDS, **OWN}
    found = train_networks(program, start, *make_images(), ROWS, held_back=HELD_BACK, **options)
    assert_as_alone(found, each_alone(network, start, held_back=HELD_BACK))
    unwatched = train_networks(program, start, *make_images(), ROWS, **options)
    assert furthest(found.weights, unwatched.weights) == 0
    assert torch.equal(found.steps, unwatched.steps)


def test_those_that_stop_leave_the_others_alone(another):
    _, program, start = another
    options = {"batch_size": 4, "epochs": 12, "lr": 0.03, "snapshots": 4, **PATIENT}
    together = train_networks(program, start, *make_images(), ROWS, seed=SEEDS, **options)
    for i in range(3):
        single = options | {"held_back": HELD_BACK[i : i + 1], "seed": SEEDS[i : i + 1]}
        alone = train_networks(program, part(start, i), *make_images(), ROWS[i : i + 1], **single)
        assert furthest(alone.weights, part(together.weights, i)) < 1e-9
        assert furthest(alone.snapshots, part(together.snapshots, i)) < 1e-9
        assert alone.steps[0] == together.steps[i]
        assert torch.allclose(alone.held_back[0], together.held_back[i], equal_nan=True)
    judged = (~together.held_back.isnan()).sum(1).tolist()
    stops = [ceil(count * len(rows) / 4) for count, rows in zip(judged, ROWS, strict=True)]
    assert len(set(stops)) == 3  # each drops out at a step of its own
    assert min(judged) < 12


@pytest.mark.parametrize("block", [1, 3])
def test_rows_held_back_may_be_judged_in_blocks(monkeypatch, block):
    program, start = start_of(NETWORKS["convolutions"])
    options = {"batch_size": 4, "epochs": 6, **PATIENT}
    expected = train_networks(program, start, *make_images(), ROWS, **options)
    monkeypatch.setattr("zoo.chunks._JUDGED", block)
    found = train_networks(program, start, *make_images(), ROWS, **options)
    assert torch.allclose(found.held_back, expected.held_back, equal_nan=True)
    assert furthest(found.weights, expected.weights) < 1e-12


def test_a_loss_that_only_rises_keeps_the_weights_of_the_first_epoch():
    """Held back rows with the other label: every step towards one is a step away from the other."""

    def network():
        return nn.Linear(1, 2)

    inputs, targets = torch.ones(8, 1, dtype=torch.float64), torch.tensor([0] * 4 + [1] * 4)
    program = trace(network().double(), inputs)
    start = {key: tensor.double() for key, tensor in init_networks(network, [1]).items()}
    for patience in (1, 3):
        found = train_networks(
            program, start, inputs, targets, [torch.arange(4)], epochs=9, batch_size=2,
            held_back=[torch.arange(4, 8)], patience=patience,
        )  # fmt: skip
        assert found.steps.tolist() == [2]  # one epoch of four rows
        judged = found.held_back[0][~found.held_back[0].isnan()]
        assert len(judged) == 1 + patience
        assert (judged.diff() > 0).all()


def test_a_loss_that_only_falls_stops_nobody():
    program, start = start_of(NETWORKS["linear layers"])
    options = {"epochs": 5, "batch_size": 4, "lr": 1e-3}
    found = train_networks(
        program, start, *make_images(), ROWS, held_back=ROWS, patience=1, **options
    )
    last = train_networks(program, start, *make_images(), ROWS, **options)
    assert (found.held_back.diff(dim=1) < 0).all()
    assert furthest(found.weights, last.weights) == 0
    assert torch.equal(found.steps, last.steps)


# ---------------------------------------------------------------------------- on the way


@pytest.mark.parametrize("count", [1, 4, 60])  # the last takes more than there are steps
def test_snapshots_begin_with_the_start_and_are_spaced_evenly(another, count):
    network, program, start = another
    found = train_networks(
        program, start, *make_images(), ROWS, batch_size=4, seed=SEEDS, snapshots=count, **OWN
    ).snapshots
    alone = each_alone(network, start)
    expected = [
        stack([own.trail[place * own.steps // count] for place in range(count)]) for own in alone
    ]
    assert furthest(found, stack(expected)) < 1e-6
    assert furthest({key: tensor[:, 0] for key, tensor in found.items()}, start) == 0


def test_snapshots_after_an_early_stop_are_the_final_weights(another):
    network, program, start = another
    found = train_networks(
        program, start, *make_images(), ROWS,
        batch_size=4, seed=SEEDS, snapshots=5, **OWN, **PATIENT,
    )  # fmt: skip
    frozen_at = []
    for i, own in enumerate(each_alone(network, start, **PATIENT)):
        planned = ceil(float(OWN["epochs"][i]) * len(ROWS[i]) / 4)
        cuts = [place * planned // 5 for place in range(5)]
        expected = stack([own.trail[min(cut, own.steps)] for cut in cuts])
        assert furthest({key: t[i] for key, t in found.snapshots.items()}, expected) < 1e-6
        frozen_at.append(sum(cut > own.steps for cut in cuts))
    assert any(frozen_at)


def test_snapshots_share_no_memory_with_anything():
    program, start = start_of(NETWORKS["linear layers"])
    trained = train_networks(program, start, *make_images(), ROWS, snapshots=2, **OPTIONS)
    kept = {key: tensor.clone() for key, tensor in trained.weights.items()}
    for tensor in (*trained.snapshots.values(), *start.values()):
        tensor.zero_()
    assert furthest(trained.weights, kept) == 0


# ---------------------------------------------------------------------------- what networks see


class Watch:
    """A transform that writes down what it was asked for and changes nothing."""

    def __init__(self):
        self.asked = []

    def __call__(self, inputs, targets, networks, step):
        self.asked.append((inputs, targets, networks.tolist(), step))
        return inputs, targets


def test_a_transform_is_told_rows_networks_and_steps():
    program, start = start_of(NETWORKS["linear layers"])
    inputs, targets = make_images()
    watch = Watch()
    options = {"epochs": 3, "batch_size": 4, "seed": SEEDS}
    trained = train_networks(program, start, inputs, targets, ROWS, transform=watch, **options)
    assert [step for *_, step in watch.asked] == list(range(9))  # 3 * 12 / 4 of the longest
    orders = [
        order_of(own, seed, steps, 4)
        for own, seed, steps in zip(ROWS, SEEDS, trained.steps.tolist(), strict=True)
    ]
    for given, labels, networks, step in watch.asked:
        assert sorted(networks) == [i for i in range(3) if step < trained.steps[i]]
        for place, i in enumerate(networks):
            assert torch.equal(given[place], inputs[orders[i][step]])
            assert torch.equal(labels[place], targets[orders[i][step]])
    unseen = train_networks(program, start, inputs, targets, ROWS, **options)
    assert furthest(trained.weights, unseen.weights) == 0


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_a_transform_of_rows_held_back_is_told_no_step(chunk):
    program, start = start_of(NETWORKS["linear layers"])
    inputs, targets = make_images()
    watch = Watch()
    train_networks(
        program, start, inputs, targets, ROWS,
        epochs=2, batch_size=4, held_back=HELD_BACK, chunk=chunk, transform=watch,
    )  # fmt: skip
    judged = [call[:3] for call in watch.asked if call[3] is None]
    for given, labels, networks in judged:
        for place, i in enumerate(networks):
            assert torch.equal(given[place], inputs[HELD_BACK[i]])
            assert torch.equal(labels[place], targets[HELD_BACK[i]])
    assert sorted(i for *_, networks in judged for i in networks) == [0, 0, 1, 1, 2, 2]


def test_networks_learn_what_the_transform_shows_them(another):
    """Each network has turned labels and mirrored images, told apart by its number alone."""
    _, program, start = another
    inputs, targets = make_images()

    def transform(images, labels, networks, step):
        assert images.shape[:2] == labels.shape
        turned = torch.stack([images[k].roll(i, -1) for k, i in enumerate(networks.tolist())])
        return turned, (labels + networks[:, None]) % 3

    options = {"batch_size": 4, "epochs": 12, "lr": 0.03, "snapshots": 2, **PATIENT}
    found = train_networks(
        program, start, inputs, targets, ROWS, seed=SEEDS, transform=transform, **options
    )
    for i in range(3):
        single = options | {"held_back": HELD_BACK[i : i + 1], "seed": SEEDS[i : i + 1]}
        alone = train_networks(
            program, part(start, i), inputs.roll(i, -1), (targets + i) % 3, ROWS[i : i + 1],
            **single,
        )  # fmt: skip
        assert furthest(alone.weights, part(found.weights, i)) < 1e-9
        assert alone.steps[0] == found.steps[i]
        assert torch.allclose(alone.held_back[0], found.held_back[i], equal_nan=True)
    assert found.held_back.isnan().any()  # some have stopped, and the others kept their numbers


def test_regressions_are_trained_on_their_squared_error(another):
    network, program, start = another
    inputs, _ = make_images()
    values = torch.randn(20, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found = train_networks(
        program, start, inputs, values, ROWS, loss=squared_error, held_back=HELD_BACK, **OPTIONS
    )
    alone = [
        trained_alone(
            network, one(start, i), (inputs, values), ROWS[i],
            seed=own_seed(i), held_back=HELD_BACK[i], loss=F.mse_loss,
        )
        for i in range(3)
    ]  # fmt: skip
    assert_as_alone(found, alone)


# ---------------------------------------------------------------------------- architectures


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_residual_networks_equal_each_trained_alone_by_torch(norm):
    def network():
        return architectures.build("resnet20", (1, 6, 6), 3, widths=(2, 3), norm=norm)

    program, start = start_of(network)
    options = {"epochs": 2, "batch_size": 4, "lr": 0.01}
    found = train_networks(
        program, start, *make_images(), ROWS, held_back=HELD_BACK, seed=SEEDS, **options
    )
    alone = [
        trained_alone(
            network, one(start, i), make_images(), ROWS[i],
            seed=SEEDS[i], held_back=HELD_BACK[i], **options,
        )
        for i in range(3)
    ]  # fmt: skip
    assert_as_alone(found, alone)
    assert furthest(found.weights, start) > 0.01


CHUNKED = {
    "mlp": {"widths": (9, 7)},
    "cnn": {"widths": (3, 4)},
    "resnet20 with layer norm": {"widths": (2, 3), "norm": "layer"},
    "resnet20 with batch norm": {"widths": (2, 3), "norm": "batch"},
}


@pytest.mark.parametrize("name", CHUNKED)
def test_chunks_change_nothing_of_what_is_told(name):
    def network():
        return architectures.build(name.split()[0], (1, 6, 6), 3, **CHUNKED[name])

    program, start = start_of(network)
    options = {"batch_size": 4, "seed": SEEDS, "snapshots": 2, **OWN, **PATIENT}
    options |= {"epochs": OWN["epochs"] / 3, "patience": 1}
    whole, *others = (
        train_networks(program, start, *make_images(), ROWS, chunk=chunk, **options)
        for chunk in (None, 1, 2)
    )
    for found in others:
        # Sums in another order, 1e-16 of weights, through 14 steps that build on others.
        assert furthest(found.weights, whole.weights) < 1e-9
        assert furthest(found.snapshots, whole.snapshots) < 1e-9
        assert torch.equal(found.steps, whole.steps)
        for told, expected in ((found.losses, whole.losses), (found.held_back, whole.held_back)):
            torch.testing.assert_close(told, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_frozen_layers_equal_modules_whose_layers_are_frozen(another):
    network, program, start = another
    last = [key for key in start if key.startswith(f"{len(network()) - 1}.")]

    def half_frozen():
        model = network()
        model[-1].requires_grad_(False)
        return model

    options = {"epochs": 2, "batch_size": 4, "lr": 0.03}
    found = train_networks(
        program, start, *make_images(), ROWS, seed=SEEDS, frozen=last, weight_decay=0.3, **options
    ).weights
    alone = [
        trained_alone(
            half_frozen, one(start, i), make_images(), ROWS[i], seed=SEEDS[i], decay=0.3, **options
        ).weights
        for i in range(3)
    ]
    assert furthest(found, stack(alone)) < 1e-6
    for key in last:
        assert torch.equal(found[key], start[key])


def test_batch_statistics_that_are_named_frozen_run_all_the_same():
    network = MORE["batch normalisation"]
    program, start = start_of(network)
    buffers = [name for name, _ in network().named_buffers()]
    found, expected = (
        train_networks(program, start, *make_images(), ROWS, frozen=frozen, **OPTIONS).weights
        for frozen in (buffers, ())
    )
    assert furthest(found, expected) == 0
    assert furthest(
        {key: found[key] for key in buffers}, {key: start[key] for key in buffers}
    ) > 0.01  # fmt: skip


@pytest.mark.parametrize("name", ["linear layers", "convolutions", "batch normalisation"])
def test_in_bfloat16_networks_learn_about_as_well(name):
    """Three patterns in noise of half their contrast."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(300) % 3
    patterns = torch.rand(3, 1, 6, 6, generator=generator)
    inputs = patterns[targets] + 0.15 * torch.randn(300, 1, 6, 6, generator=generator)
    network = MORE[name]
    program = trace(network().eval(), inputs)
    rows, held_back = [torch.arange(0, 200), torch.arange(50, 200)], [torch.arange(200, 250)] * 2
    low, full = (
        train_networks(
            program, init_networks(network, [1, 2]), inputs, targets, rows,
            epochs=4, precision=precision, held_back=held_back,
        )
        for precision in (torch.bfloat16, None)
    )  # fmt: skip
    for trained in (low, full):
        found = predict(program, trained.weights, inputs[200:]).argmax(-1)
        assert (found == targets[200:]).float().mean(1).min() > 0.95
    assert {t.dtype for t in low.weights.values()} == {t.dtype for t in full.weights.values()}
    # Another arithmetic, of eight bits: logits of about 4 are off by 2**-6 or so.
    for told, expected in ((low.losses, full.losses), (low.held_back, full.held_back)):
        assert 1e-5 < (told - expected).abs().max() < 2**-6


# ---------------------------------------------------------------------------- losses


def test_losses_are_those_of_torch_for_every_network():
    logits = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(24).reshape(4, 6) % 3
    expected = torch.stack([F.cross_entropy(logits[i], targets[i]) for i in range(4)])
    assert torch.allclose(cross_entropy(logits, targets), expected, atol=1e-6)
    soft = torch.rand(4, 6, 3).softmax(-1)
    expected = torch.stack([F.cross_entropy(logits[i], soft[i]) for i in range(4)])
    assert torch.allclose(distillation(logits, soft), expected, atol=1e-6)
    values = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(1))
    expected = torch.stack([F.mse_loss(logits[i], values[i]) for i in range(4)])
    assert torch.allclose(squared_error(logits, values), expected, atol=1e-6)


def test_the_squared_error_by_hand():
    outputs = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]])
    targets = torch.tensor([[[1.0, 0.0], [0.0, 4.0]], [[1.0, 1.0], [1.0, 3.0]]])
    assert squared_error(outputs, targets).tolist() == [(4 + 9) / 4, (1 + 1 + 1 + 9) / 4]


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


# ------------------------------------------------------------------------------- in several legs


def trained_in_legs(network, legs, first, last):
    """The same full batch in every step; each leg goes on with the moments of the one before."""
    program, weights = start_of(network)
    moments, rows = Moments.none_yet(weights), [torch.arange(6)] * 3
    for epochs, rate, end in zip(legs, first, last, strict=True):
        trained = train_networks(
            program, weights, *make_images(), rows,
            epochs=epochs, batch_size=6, lr=rate, last_lr=end, moments=moments,
        )  # fmt: skip
        weights, moments = trained.weights, trained.moments
    return weights, moments


def test_two_legs_with_moments_are_one_training(network):
    whole, kept = trained_in_legs(network, [6], [0.03], [0.0])
    legs, other = trained_in_legs(network, [2, 4], [0.03, 0.02], [0.02, 0.0])
    assert furthest(legs, whole) < 1e-12  # sums of six rows in another order
    assert furthest(other.second, kept.second) < 1e-12
    assert kept.steps.tolist() == other.steps.tolist() == [6, 6, 6]


def test_networks_may_have_made_different_numbers_of_steps(network):
    whole, kept = trained_in_legs(network, [6], [0.03], [0.03])
    legs = (torch.tensor([1.0, 2.0, 4.0]), torch.tensor([5.0, 4.0, 2.0]))
    apart, other = trained_in_legs(network, legs, [0.03, 0.03], [0.03, 0.03])
    assert furthest(apart, whole) < 1e-12
    assert furthest(other.first, kept.first) < 1e-12
    assert other.steps.tolist() == [6, 6, 6]


def test_moments_are_not_changed_and_not_made_unasked(network):
    program, weights = start_of(network)
    given = Moments.none_yet(weights)
    rows = [torch.arange(6)] * 3
    trained = train_networks(program, weights, *make_images(), rows, epochs=1, moments=given)
    assert all(not tensor.any() for kept in given[:2] for tensor in kept.values())
    assert given.steps.tolist() == [0, 0, 0]
    assert trained.moments.steps.tolist() == [1, 1, 1]
    assert train_networks(program, weights, *make_images(), rows, epochs=1).moments is None
