"""Zoos of modelzoos.cc are read in their published layout, with the networks that made them."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from metamerge.errors import CheckpointError, ConfigError, Unreadable, ZooError
from metamerge.structure import trace
from zoo.imports.schuerholt import read

PARAMS = {
    "model::type": "CNN",
    "model::channels_in": 1,
    "model::o_dim": 4,  # as in the published SVHN zoos, whose networks have 10 outputs
    "model::nlin": "tanh",
    "model::dropout": 0.0,
    "model::init_type": "uniform",
    "model::use_bias": False,
    "optim::optimizer": "adam",
    "optim::lr": 0.003,
    "optim::wd": 0.0,
    "seed": 1,
    "training::batchsize": 10,
    "dataset::dump": "/somewhere/dataset.pt",
}
# Position of every layer in module_list, and its weight, as the published class lays them out.
SMALL = {0: (8, 1, 5, 5), 3: (6, 8, 5, 5), 6: (4, 6, 2, 2), 9: (20, 36), 11: (10, 20)}
SMALL_DROPOUT = dict(zip((0, 4, 8, 11, 14), SMALL.values(), strict=True))
SMALL_2 = {0: (6, 3, 5, 5), 3: (9, 6, 5, 5), 6: (6, 9, 2, 2), 9: (20, 54), 11: (10, 20)}
LARGE = {0: (16, 3, 3, 3), 4: (32, 16, 3, 3), 8: (15, 32, 3, 3), 13: (20, 60), 16: (10, 20)}
POOLED = {"CNN": 2, "CNN2": 2, "CNN3": 3}
NONLINEARITIES = {
    "leakyrelu": F.leaky_relu,
    "relu": F.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
}


def random_weights(shapes):
    weights = {}
    for position, shape in shapes.items():
        weights[f"module_list.{position}.weight"] = torch.randn(shape) / shape[1]
        weights[f"module_list.{position}.bias"] = torch.randn(shape[0])
    return weights


def results(epochs, first=0):
    lines = []
    for epoch in range(first, epochs + 1):
        measured = {"train_loss": -999, "train_acc": -999}  # what is written before epoch 1
        if epoch:
            measured = {"train_loss": 1 / epoch, "train_acc": epoch / 100}
        line = {"training_iteration": epoch, **measured, "test_loss": 2.0, "test_acc": epoch / 200}
        lines.append(json.dumps({**line, "pid": 7, "trial_id": "ab1", "config": PARAMS}))
    return "\n".join(lines) + "\n"


def add_trial(zoo, name, shapes=SMALL, epochs=(0, 2), pattern="checkpoint_{:06d}", **params):
    """One trial with random weights at several epochs; returns the weights of each."""
    folder = zoo / name
    folder.mkdir(parents=True)
    (folder / "params.json").write_text(json.dumps(PARAMS | params))
    (folder / "result.json").write_text(results(max(epochs)))
    (folder / "events.out.tfevents.1").write_bytes(b"")
    saved = {}
    for epoch in epochs:
        place = folder / pattern.format(epoch)
        place.mkdir()
        saved[epoch] = random_weights(shapes)
        torch.save(saved[epoch], place / "checkpoints")
        torch.save({"state": {}}, place / "optimizer")
    return saved


def published_forward(kind, nonlinearity, weights, inputs):
    """What the published module computes: pooling before the nonlinearity, none after the third
    convolution of the small networks."""
    names = list(weights)
    act = NONLINEARITIES[nonlinearity]
    hidden = inputs
    for layer in range(3):
        hidden = F.conv2d(hidden, weights[names[2 * layer]], weights[names[2 * layer + 1]])
        hidden = F.max_pool2d(hidden, 2) if layer < POOLED[kind] else hidden
        hidden = act(hidden)
    hidden = act(F.linear(hidden.flatten(1), weights[names[6]], weights[names[7]]))
    return F.linear(hidden, weights[names[8]], weights[names[9]])


@pytest.fixture
def zoo(tmp_path):
    """Three small networks, of epochs 0 and 2, beside what else lies in a published zoo."""
    torch.manual_seed(0)
    folder = tmp_path / "tune_zoo_mnist_uniform"
    saved = {f"trial_{seed}": add_trial(folder, f"trial_{seed}", seed=seed) for seed in (1, 2, 3)}
    (folder / "config.json").write_text("{}")
    (folder / "dataset.pt").write_bytes(b"not read")
    (folder / "empty").mkdir()
    return folder, saved


@pytest.mark.parametrize("nonlinearity", list(NONLINEARITIES))
@pytest.mark.parametrize(
    ("kind", "shapes", "dropout", "side"),
    [
        ("CNN", SMALL, 0.0, 28),
        ("CNN", SMALL_DROPOUT, 0.5, 28),
        ("CNN2", SMALL_2, 0, 28),
        ("CNN3", LARGE, 0, 32),
        ("CNN3", LARGE, 0.5, 32),
    ],
)
def test_networks_compute_what_the_published_ones_compute(
    tmp_path, kind, shapes, dropout, side, nonlinearity
):
    channels = shapes[0][1]
    params = {"type": kind, "channels_in": channels, "nlin": nonlinearity, "dropout": dropout}
    params = {f"model::{key}": value for key, value in params.items()}
    saved = [add_trial(tmp_path, name, shapes, **params)[2] for name in "ab"]
    population = read(tmp_path)
    assert population.input_shape == (channels, side, side)
    assert population.notes == ()
    network, inputs = population.network(), torch.randn(4, channels, side, side)
    assert network.state_dict().keys() == saved[0].keys()
    for position, weights in enumerate(saved):
        member = {key: tensor[position] for key, tensor in population.weights.items()}
        expected = published_forward(kind, nonlinearity, weights, inputs)
        torch.testing.assert_close(functional_call(network, member, (inputs,)), expected)


def test_the_network_can_be_traced(zoo):
    population = read(zoo[0])
    program = trace(population.network(), torch.zeros(2, *population.input_shape))
    assert set(program.parameters.values()) == set(population.weights)


def test_the_last_epoch_is_read_by_default(zoo):
    folder, saved = zoo
    population = read(str(folder))
    assert population.names == ("trial_1", "trial_2", "trial_3")
    for key, tensor in population.weights.items():
        assert torch.equal(tensor, torch.stack([saved[name][2][key] for name in saved]))
    found = {key: values.tolist() for key, values in population.metrics.items()}
    assert found == {
        "epoch": [2.0] * 3,
        "train_loss": [0.5] * 3,
        "train_accuracy": [0.02] * 3,
        "test_loss": [2.0] * 3,
        "test_accuracy": [0.01] * 3,
        "learning_rate": [0.003] * 3,
        "weight_decay": [0.0] * 3,
        "dropout": [0.0] * 3,
        "batch_size": [10.0] * 3,
        "seed": [1.0, 2.0, 3.0],
    }


def test_any_epoch_can_be_read_and_what_was_not_measured_is_unknown(zoo):
    folder, saved = zoo
    population = read(folder, epochs=0)
    key = "module_list.6.bias"
    assert torch.equal(population.weights[key][1], saved["trial_2"][0][key])
    assert "train_loss" not in population.metrics
    assert population.metrics["test_accuracy"].tolist() == [0.0] * 3


def test_numbers_without_leading_zeros_are_read(tmp_path):
    saved = add_trial(tmp_path, "a", pattern="checkpoint_{}")
    found = read(tmp_path, epochs=2).weights["module_list.0.bias"][0]
    assert torch.equal(found, saved[2]["module_list.0.bias"])


def test_results_are_found_by_epoch_not_by_line(tmp_path):
    add_trial(tmp_path, "a")
    path = tmp_path / "a" / "result.json"
    path.write_text(results(2, first=1))  # older zoos have no line for epoch 0
    assert read(tmp_path).metrics["test_accuracy"].tolist() == [0.01]
    resumed = json.dumps({"training_iteration": 2, "test_acc": 0.7, "val_acc": 0.6})
    path.write_text(results(2) + resumed + "\n")
    metrics = read(tmp_path).metrics
    assert metrics["test_accuracy"].tolist() == [0.7]
    assert metrics["validation_accuracy"].tolist() == [0.6]


def test_last_checkpoints_of_several_epochs_are_noted(zoo):
    folder, _ = zoo
    add_trial(folder, "trial_4", epochs=(0, 1))
    population = read(folder)
    assert population.metrics["epoch"].tolist() == [2, 2, 2, 1]
    assert "epochs: 1, 2" in population.notes[0]


def test_a_limit_reads_no_further(zoo):
    folder, _ = zoo
    (folder / "trial_3" / "params.json").write_text("broken")
    assert read(folder, limit=2).names == ("trial_1", "trial_2")
    with pytest.raises(Unreadable, match=r"trial_3.*params\.json"):
        read(folder)


def test_one_architecture_is_picked_from_a_mixed_zoo(zoo):
    folder, _ = zoo
    add_trial(folder, "trial_4", **{"model::nlin": "relu"})
    with pytest.raises(ZooError, match=r"trial_4.*model::nlin is 'relu', expected 'tanh'.*only="):
        read(folder)
    population = read(folder, only={"model::nlin": "relu"})
    assert population.names == ("trial_4",)
    assert isinstance(population.network()[0][2], torch.nn.ReLU)
    assert len(read(folder, only={"model::nlin": "tanh"}, limit=2).names) == 2
    with pytest.raises(ZooError, match=r"model::nlin is one of 'relu', 'tanh'"):
        read(folder, only={"model::nlin": "gelu"})


def test_dropout_that_moves_layers_is_refused_with_the_way_out(zoo):
    folder, _ = zoo
    add_trial(folder, "trial_4", SMALL_DROPOUT, **{"model::dropout": 0.5})
    with pytest.raises(ZooError, match=r"trial_4.*misses 'module_list.3.weight'.*model::dropout"):
        read(folder)
    assert read(folder, only={"model::dropout": 0.5}).names == ("trial_4",)


@pytest.mark.parametrize(
    ("params", "note"),
    [
        ({"model::type": "Resnet18"}, "model::type 'Resnet18'"),
        ({"model::type": ["CNN"]}, r"model::type \['CNN'\]"),
        ({"model::nlin": "sine"}, "model::nlin 'sine'"),
        ({"model::channels_in": 10**12}, "channels"),
        ({"model::channels_in": True}, "channels"),
        ({"model::dropout": "much"}, "rate"),
        ({"model::channels_in": 3}, r"'module_list.0.weight' has shape \(8, 1, 5, 5\)"),
        ({"model::dropout": 0.5}, "misses"),
    ],
)
def test_an_unknown_architecture_has_weights_but_no_network(tmp_path, params, note):
    add_trial(tmp_path, "a", **params)
    population = read(tmp_path)
    assert population.network is population.input_shape is None
    assert population.weights["module_list.0.weight"].shape == (1, 8, 1, 5, 5)
    assert re.search(note, population.notes[0])


@pytest.mark.parametrize("epochs", [-1, True, 2.0, "first"])
def test_an_epoch_that_is_no_number_is_refused(zoo, epochs):
    with pytest.raises(ConfigError, match="epochs must be"):
        read(zoo[0], epochs=epochs)


def test_a_missing_epoch_is_refused_with_those_there(zoo):
    folder, _ = zoo
    with pytest.raises(ZooError, match=r"trial_1: expected checkpoint_7/.*epochs 0, 2"):
        read(folder, epochs=7)
    (folder / "trial_2" / "checkpoint_000000" / "checkpoints").unlink()
    with pytest.raises(ZooError, match=r"trial_2: .*epochs 2"):
        read(folder, epochs=0)


def test_a_trial_without_checkpoints_is_refused(zoo):
    folder, _ = zoo
    (folder / "trial_0").mkdir()
    (folder / "trial_0" / "params.json").write_text(json.dumps(PARAMS))
    with pytest.raises(ZooError, match=r"trial_0: expected checkpoint_<epoch>/.*none"):
        read(folder)


@pytest.mark.parametrize("name", ["params.json", "result.json"])
def test_a_missing_file_is_refused_by_name(zoo, name):
    folder, _ = zoo
    (folder / "trial_2" / name).unlink()
    with pytest.raises(Unreadable, match=f"trial_2.*{name}"):
        read(folder)


def test_missing_and_damaged_results_are_refused(zoo):
    folder, _ = zoo
    path = folder / "trial_1" / "result.json"
    path.write_text(results(1))
    with pytest.raises(ZooError, match=r"training_iteration 2, got 0, 1"):
        read(folder)
    path.write_text(results(2)[:-20])
    with pytest.raises(Unreadable, match=r"result\.json: line 3"):
        read(folder)


def test_results_that_are_no_numbers_are_unknown(tmp_path):
    add_trial(tmp_path, "a")
    add_trial(tmp_path, "b", **{"optim::momentum": 10**400})
    line = '{"training_iteration": 2, "train_loss": NaN, "train_acc": "null", "test_loss": null}'
    (tmp_path / "a" / "result.json").write_text(line)
    metrics = read(tmp_path).metrics
    assert metrics["train_loss"].isnan().tolist() == [True, False]
    assert metrics["train_accuracy"].isnan().tolist() == [True, False]
    assert metrics["test_loss"].isnan().tolist() == [True, False]
    assert "momentum" not in metrics


def test_a_folder_without_trials_is_refused(tmp_path):
    (tmp_path / "MNIST").mkdir()
    with pytest.raises(ZooError, match=r"expected a folder per network.*tune_zoo_mnist_uniform"):
        read(tmp_path)


def test_networks_with_nan_can_be_left_out(zoo):
    folder, saved = zoo
    weights = saved["trial_1"][2]
    weights["module_list.0.bias"][0] = torch.nan
    torch.save(weights, folder / "trial_1" / "checkpoint_000002" / "checkpoints")
    with pytest.raises(ZooError, match=r"trial_1.*NaN.*drop_nonfinite=True"):
        read(folder)
    population = read(folder, drop_nonfinite=True)
    assert population.names == ("trial_2", "trial_3")
    assert population.metrics["seed"].tolist() == [2.0, 3.0]
    assert population.notes == ("1 of 3 networks left out: weights that are not finite.",)
    assert population.network is not None


class Planted:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return type(self.path).mkdir, (self.path,)


def test_a_planted_program_never_runs(zoo, tmp_path):
    folder, _ = zoo
    planted = tmp_path / "planted"
    path = folder / "trial_2" / "checkpoint_000002" / "checkpoints"
    torch.save({"module_list.0.weight": Planted(planted)}, path)
    with pytest.raises(CheckpointError, match="trial_2"):
        read(folder)
    assert not planted.exists()
