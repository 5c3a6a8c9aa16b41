"""The Small CNN Zoo is read in its published layout and computes what TensorFlow computed."""

import gzip
import os

import numpy as np
import pytest
import torch
from torch.func import functional_call

from metamerge.errors import ConfigError, Unreadable, ZooError
from metamerge.structure import trace
from zoo.imports.unterthiner import read

WIDTHS = (3, 4, 5)
CLASSES = 10
STEPS = (0, 1, 86)
LAST = tuple(f"weights.npy[{row}]" for row in (2, 5, 8, 11))
ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "selu": lambda x: 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * np.expm1(x)),
}
COLUMNS = (
    "config.activation",
    "config.b_init",
    "config.dataset",
    "config.dropout",
    "config.learning_rate",
    "modeldir",
    "step",
    "test_accuracy",
    "test_loss",
    "train_accuracy",
    "train_loss",
    "laststep",
)


def shapes(channels=1):
    """Variables in the published order: of every layer the bias, then the kernel."""
    found, fan_in = {}, channels
    for layer, width in zip(("conv2d", "conv2d_1", "conv2d_2"), WIDTHS, strict=True):
        found[f"sequential/{layer}/bias:0"] = (width,)
        found[f"sequential/{layer}/kernel:0"] = (3, 3, fan_in, width)
        fan_in = width
    return found | {
        "sequential/dense/bias:0": (CLASSES,),
        "sequential/dense/kernel:0": (fan_in, CLASSES),
    }


def write_layout(folder, variables):
    start, lines = 0, ["varname,start_idx,end_idx,size,shape"]
    for name, shape in variables.items():
        size = int(np.prod(shape))
        lines.append(f'{name},{start},{start + size},{size},"{shape}"')
        start += size
    (folder / "layout.csv").write_text("\n".join(lines) + "\n")
    return start


def rows_of(networks, activation="relu", dataset="mnist", steps=STEPS):
    """One row per network and step, as pandas writes them, with the index in front."""
    rows = []
    for network in range(networks):
        for step in steps:
            score = f"0.{network}{step % 10}"
            values = [activation, "zeros", dataset, "0.1", f"0.0{network + 1}", f"/model/{network}"]
            values += [step, score, "", score, "1.5", step == steps[-1]]
            rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def write_metrics(folder, rows, drop=(), pack=False):
    columns = [column for column in COLUMNS if column not in drop]
    lines = [",".join(["", *columns])]
    lines += [
        ",".join([str(n), *(str(row[column]) for column in columns)]) for n, row in enumerate(rows)
    ]
    text = ("\n".join(lines) + "\n").encode()
    name = "metrics.csv.gz" if pack else "metrics.csv"
    (folder / name).write_bytes(gzip.compress(text, mtime=0) if pack else text)


def write_zoo(folder, networks=4, channels=1, **options):
    rows = rows_of(networks, **options)
    width = write_layout(folder, shapes(channels))
    generator = np.random.default_rng(0)
    array = generator.normal(0, 0.4, (len(rows), width)).astype(np.float32)
    np.save(folder / "weights.npy", array)
    write_metrics(folder, rows)
    return array, rows


@pytest.fixture
def zoo(tmp_path):
    """Four small networks at three steps each."""
    return tmp_path, *write_zoo(tmp_path)


def tensorflow_forward(row, variables, images, activation):
    """Keras' network, slowly and in float64: images [n, h, w, c], kernels HWIO, padding valid."""
    cut, start = {}, 0
    for name, shape in variables.items():
        size = int(np.prod(shape))
        cut[name] = row[start : start + size].astype(np.float64).reshape(shape)
        start += size
    hidden = images
    for layer in ("conv2d", "conv2d_1", "conv2d_2"):
        kernel = cut[f"sequential/{layer}/kernel:0"]
        bias = cut[f"sequential/{layer}/bias:0"]
        side = (hidden.shape[1] - 3) // 2 + 1
        out = np.zeros((len(hidden), side, side, len(bias)))
        for i in range(side):
            for j in range(side):
                patch = hidden[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3, :]
                for o in range(len(bias)):
                    out[:, i, j, o] = (patch * kernel[..., o]).sum((1, 2, 3)) + bias[o]
        hidden = activation(out)
    mean = hidden.mean((1, 2))
    return mean @ cut["sequential/dense/kernel:0"] + cut["sequential/dense/bias:0"]


@pytest.mark.parametrize(
    ("activation", "dataset", "side", "channels"),
    [
        ("relu", "mnist", 28, 1),
        ("tanh", "fashion_mnist", 28, 1),
        ("sigmoid", "svhn_cropped", 32, 1),
        ("selu", "cifar10", 32, 3),
    ],
)
def test_networks_compute_what_tensorflow_computed(tmp_path, activation, dataset, side, channels):
    array, _ = write_zoo(tmp_path, 3, channels, activation=activation, dataset=dataset)
    population = read(tmp_path)
    assert population.input_shape == (channels, side, side)
    images = np.random.default_rng(1).uniform(-1, 1, (2, side, side, channels))
    network = population.network().double()
    assert list(network.state_dict()) == list(population.weights)
    inputs = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    for position, row in enumerate((2, 5, 8)):
        member = {key: tensor[position].double() for key, tensor in population.weights.items()}
        expected = tensorflow_forward(array[row], shapes(channels), images, ACTIVATIONS[activation])
        found = functional_call(network, member, (inputs,)).detach().numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


def test_the_network_can_be_traced(zoo):
    population = read(zoo[0])
    program = trace(population.network(), torch.zeros(2, *population.input_shape))
    assert set(program.parameters.values()) == set(population.weights)


def test_weights_are_copies_of_the_last_rows(zoo):
    folder, array, _ = zoo
    population = read(str(folder))
    assert population.names == LAST
    last = torch.from_numpy(array[[2, 5, 8, 11], :3])
    assert torch.equal(population.weights["conv2d.bias"], last)
    assert all(tensor.dtype == torch.float32 for tensor in population.weights.values())


def test_metrics_are_the_numeric_columns_without_their_prefix(zoo):
    population = read(zoo[0])
    names = ["dropout", "learning_rate", "step", "test_accuracy", "test_loss", "train_accuracy"]
    assert list(population.metrics) == [*names, "train_loss"]
    assert population.metrics["learning_rate"].tolist() == [0.01, 0.02, 0.03, 0.04]
    assert population.metrics["test_accuracy"].tolist() == [0.06, 0.16, 0.26, 0.36]
    assert population.metrics["test_loss"].isnan().all()
    left_out = "'config.activation', 'config.b_init', 'config.dataset'"
    assert population.notes == (
        f"metrics.csv: columns that hold no numbers are left out: {left_out}.",
    )


def test_a_packed_table_is_read(zoo):
    folder, _, rows = zoo
    (folder / "metrics.csv").unlink()
    write_metrics(folder, rows, pack=True)
    assert len(read(folder).names) == 4


def test_the_last_step_is_found_without_a_column_for_it(zoo):
    folder, _, rows = zoo
    write_metrics(folder, rows, drop=["laststep"])
    assert read(folder).names == LAST
    write_metrics(folder, [*rows[:-1], rows[-1] | {"step": 1}], drop=["laststep"])
    with pytest.raises(ZooError, match=r"lines 12 and 13 are both step 1 of '/model/3'"):
        read(folder)


def test_the_last_step_may_be_given_as_a_number(zoo):
    folder, _, rows = zoo
    write_metrics(folder, [row | {"laststep": 86} for row in rows])
    assert read(folder).names == LAST


def test_networks_of_one_unnamed_folder_are_told_apart_by_their_mark(zoo):
    folder, _, rows = zoo
    write_metrics(folder, [row | {"modeldir": "path"} for row in rows])
    assert len(read(folder).names) == 4


def test_any_step_can_be_read(zoo):
    folder, array, _ = zoo
    population = read(folder, step=1)
    assert population.names[1] == "weights.npy[4]"
    assert population.metrics["step"].tolist() == [1.0] * 4
    assert torch.equal(population.weights["conv2d.bias"][1], torch.from_numpy(array[4, :3]))
    with pytest.raises(ZooError, match=r"step 7; there are steps 0.0, 1.0, 86.0"):
        read(folder, step=7)


def test_a_limit_takes_the_first_rows(zoo):
    assert read(zoo[0], limit=2).names == ("weights.npy[2]", "weights.npy[5]")


def test_one_activation_is_picked_or_asked_for(zoo):
    folder, _, rows = zoo
    rows = [row | {"config.activation": "tanh"} if n >= 6 else row for n, row in enumerate(rows)]
    write_metrics(folder, rows)
    with pytest.raises(ZooError, match=r"'relu', 'tanh'.*activation='relu'"):
        read(folder, limit=1)
    population = read(folder, activation="tanh")
    assert population.names == ("weights.npy[8]", "weights.npy[11]")
    assert isinstance(population.network()[1], torch.nn.Tanh)
    with pytest.raises(ZooError, match=r"no network has activation 'selu'; there are 'relu'"):
        read(folder, activation="selu")


def test_an_unknown_activation_has_weights_but_no_network(tmp_path):
    write_zoo(tmp_path, activation="sine")
    population = read(tmp_path)
    assert population.network is population.input_shape is None
    assert "activation 'sine'" in population.notes[-1]


@pytest.mark.parametrize("dataset", ["kmnist", ""])
def test_an_unknown_data_set_has_a_network_but_no_shape(tmp_path, dataset):
    write_zoo(tmp_path, dataset=dataset)
    population = read(tmp_path)
    assert population.network is not None
    assert population.input_shape is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(3, 3, 3, 4)", "(3, 3, 4, 3)"),  # channels that do not follow each other
        ("(3, 3, 3, 4)", "(12, 9)"),  # a dense layer between convolutions
        ("sequential/conv2d_1/", "sequential/forward/"),  # a name that torch keeps for itself
        ("sequential/conv2d_1/bias", "sequential/other/bias"),
    ],
)
def test_layers_of_another_network_have_weights_but_no_network(zoo, old, new):
    folder = zoo[0]
    layout = folder / "layout.csv"
    layout.write_text(layout.read_text().replace(old, new))
    population = read(folder)
    assert population.network is None
    assert population.notes[-1].startswith("No network: ")


@pytest.mark.parametrize("name", ["weights.npy", "metrics.csv", "layout.csv"])
def test_a_missing_file_is_refused_by_name(zoo, name):
    (zoo[0] / name).unlink()
    with pytest.raises(Unreadable, match=name):
        read(zoo[0])


@pytest.mark.parametrize("column", ["config.activation", "step", "modeldir"])
def test_a_missing_column_is_refused_by_name(zoo, column):
    folder, _, rows = zoo
    write_metrics(folder, rows, drop=[column, "laststep"])
    with pytest.raises(ZooError, match=f"no column '{column}'"):
        read(folder)


@pytest.mark.parametrize(("column", "value"), [("step", "late"), ("step", ""), ("laststep", "no")])
def test_a_column_with_other_values_is_refused(zoo, column, value):
    folder, _, rows = zoo
    write_metrics(folder, [*rows[:-1], rows[-1] | {column: value}])
    with pytest.raises(ZooError, match=f"column '{column}'"):
        read(folder)


def test_other_numbers_of_rows_are_refused(zoo):
    folder, array, _ = zoo
    np.save(folder / "weights.npy", array[:-1])
    with pytest.raises(ZooError, match=r"weights\.npy: 11 rows, the table of metrics has 12"):
        read(folder)


def test_rows_of_another_width_are_refused(zoo):
    folder, array, _ = zoo
    np.save(folder / "weights.npy", array[:, :-1])
    with pytest.raises(ZooError, match=r"layout\.csv: the variables end at column"):
        read(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content[:-4],
        lambda content: content[:100],
        lambda content: content[:5],
        lambda content: b"",
        lambda content: b"PK\x03\x04" + content,
        lambda content: content.replace(b"(12, ", b"(99, "),
        lambda content: content.replace(b"'shape'", b"'shapo'"),
    ],
    ids=["cut", "header cut", "magic cut", "empty", "zip", "claims more", "other header"],
)
def test_a_damaged_array_is_refused(zoo, change):
    path = zoo[0] / "weights.npy"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ZooError, match=r"weights\.npy: expected an array saved by numpy.save"):
        read(zoo[0])


class Planted:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("raw", [False, True], ids=["npy of objects", "bare pickle"])
def test_a_pickled_array_never_runs(zoo, tmp_path, raw):
    folder, planted = zoo[0], tmp_path / "planted"
    np.save(folder / "weights.npy", np.array([Planted(planted)], dtype=object), allow_pickle=True)
    if raw:
        content = (folder / "weights.npy").read_bytes()
        (folder / "weights.npy").write_bytes(content[content.index(b"\x80") :])
    with pytest.raises(ZooError, match="without Python objects"):
        read(folder)
    assert not planted.exists()


@pytest.mark.parametrize(
    "change",
    [lambda array: array.astype(np.float64), lambda array: array[None], lambda array: array[0]],
)
def test_an_array_of_another_kind_is_refused(zoo, change):
    folder, array, _ = zoo
    np.save(folder / "weights.npy", change(array))
    with pytest.raises(ZooError, match="expected float32"):
        read(folder)


@pytest.mark.parametrize("change", [np.asfortranarray, lambda array: array.astype(">f4")])
def test_the_order_of_numbers_and_bytes_does_not_matter(zoo, change):
    folder, array, _ = zoo
    expected = read(folder).weights
    np.save(folder / "weights.npy", change(array))
    found = read(folder).weights
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_networks_with_nan_can_be_left_out(zoo):
    folder, array, _ = zoo
    array[5, 7] = np.nan
    np.save(folder / "weights.npy", array)
    with pytest.raises(ZooError, match="row 5 holds NaN"):
        read(folder)
    population = read(folder, drop_nonfinite=True)
    assert population.names == ("weights.npy[2]", "weights.npy[8]", "weights.npy[11]")
    assert population.metrics["learning_rate"].tolist() == [0.01, 0.03, 0.04]
    assert population.notes[0] == "1 of 4 networks left out: weights that are not finite."
    np.save(folder / "weights.npy", array * np.float32(np.nan))
    with pytest.raises(ZooError, match="all chosen networks"):
        read(folder, drop_nonfinite=True)


def test_a_nan_at_another_step_does_no_harm(zoo):
    folder, array, _ = zoo
    array[4, 7] = np.nan
    np.save(folder / "weights.npy", array)
    assert len(read(folder).names) == 4


@pytest.mark.parametrize("step", [-1, True, 1.0, "first"])
def test_a_step_that_is_no_number_is_refused(zoo, step):
    with pytest.raises(ConfigError, match="step must be"):
        read(zoo[0], step=step)


def test_a_limit_of_zero_is_refused(zoo):
    with pytest.raises(ConfigError, match="limit"):
        read(zoo[0], limit=0)
