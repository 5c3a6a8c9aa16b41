"""A folder of checkpoints becomes a population; its table fits it exactly or is refused."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.func import functional_call

from metamerge.errors import ConfigError, Unreadable, ZooError
from zoo.imports.checkpoint_folder import read

FILES = ("a.pt", "b.safetensors", "run/c.pth", "run/d.bin")


def network():
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


@pytest.fixture
def folder(tmp_path):
    """Four random networks in four kinds of files, one hidden file and one text."""
    torch.manual_seed(0)
    (tmp_path / "run").mkdir()
    for file in FILES:
        weights = network().state_dict()
        if file.endswith("safetensors"):
            save_file(weights, tmp_path / file)
        else:
            torch.save(weights, tmp_path / file)
    (tmp_path / "._a.pt").write_bytes(b"\0")
    (tmp_path / "notes.txt").write_text("nothing")
    return tmp_path


def table(folder, rows, header="file,test_accuracy", name="metrics.csv"):
    (folder / name).write_text("\n".join([header, *rows]) + "\n")


def accuracies(*names):
    return [f"{name},0.{position}" for position, name in enumerate(names, start=1)]


def test_read_networks_compute_what_the_files_compute(folder):
    population = read(folder)
    assert population.names == FILES
    assert population.network is population.input_shape is None
    assert population.metrics == {}
    assert population.notes == ()
    inputs = torch.randn(5, 4)
    for position in (0, 2, 3):
        original = network()
        original.load_state_dict(torch.load(folder / FILES[position], weights_only=True))
        member = {key: tensor[position] for key, tensor in population.weights.items()}
        assert torch.equal(functional_call(network(), member, (inputs,)), original(inputs))


@pytest.mark.parametrize(
    "names",
    [
        FILES,
        ("a", "b", "c", "d"),
        ("a.pt", "b.safetensors", "c.pth", "d.bin"),
        ("./a.pt", " b ", "run/c", "./run/d.bin"),
    ],
)
def test_rows_may_come_in_any_order_and_name_files_in_any_way(folder, names):
    table(folder, accuracies(*names)[::-1])
    assert read(str(folder)).metrics["test_accuracy"].tolist() == [0.1, 0.2, 0.3, 0.4]


@pytest.mark.parametrize("column", ["file", "Path", "name", "checkpoint", "model"])
def test_any_usual_column_names_the_file(folder, column):
    table(folder, accuracies(*FILES), header=f"{column},test_accuracy")
    population = read(folder)
    assert list(population.metrics) == ["test_accuracy"]
    assert population.notes == ()


def test_a_table_with_a_byte_order_mark_is_read(folder):
    table(folder, accuracies(*FILES), header="\ufefffile,test_accuracy")
    assert list(read(folder).metrics) == ["test_accuracy"]


def test_columns_that_are_not_numeric_are_left_out_with_a_note(folder):
    rows = [f"{row},{word}" for row, word in zip(accuracies(*FILES), "wxyz", strict=True)]
    table(folder, rows, header="file,test_accuracy,optimizer")
    population = read(folder)
    assert list(population.metrics) == ["test_accuracy"]
    assert "'optimizer'" in population.notes[0]


def test_a_limit_takes_the_first_files_with_their_metrics(folder):
    table(folder, accuracies(*FILES))
    population = read(folder, limit=2)
    assert population.names == FILES[:2]
    assert population.metrics["test_accuracy"].tolist() == [0.1, 0.2]


def test_rows_without_file_and_files_without_row_are_listed(folder):
    table(folder, accuracies("a.pt", "b.safetensors", "run/c.pth", "run/e.bin"))
    with pytest.raises(
        ZooError, match=r"without a file: 'run/e.bin'; .*without a row: 'run/d.bin'"
    ):
        read(folder)


def test_files_without_row_are_refused_also_beyond_the_limit(folder):
    table(folder, accuracies("a.pt"))
    with pytest.raises(ZooError, match=r"without a file: none; files without a row: 'b.safe"):
        read(folder, limit=1)


@pytest.mark.parametrize("twice", ["a.pt", "a"])
def test_two_rows_for_one_file_are_refused(folder, twice):
    table(folder, accuracies(*FILES, twice))
    with pytest.raises(ZooError, match=r"line 6.*already named on line 2"):
        read(folder)


def test_a_name_of_two_files_is_refused(folder):
    torch.save(network().state_dict(), folder / "run" / "a.pt")
    table(folder, accuracies("a", "run/a", "b", "c", "d"))
    with pytest.raises(ZooError, match=r"line 2, file 'a' is one of 'a.pt', 'run/a.pt'"):
        read(folder)
    table(folder, accuracies("a.pt", "run/a", "b", "c", "d"))
    assert len(read(folder).names) == 5


def test_two_tables_that_name_files_are_refused(folder):
    table(folder, accuracies(*FILES))
    table(folder, accuracies(*FILES), name="more.csv")
    with pytest.raises(ZooError, match=r"got 'metrics.csv', 'more.csv'"):
        read(folder)


def test_a_table_that_names_no_files_is_left_out_with_a_note(folder):
    table(folder, ["1,2"], header="epoch,loss")
    population = read(folder)
    assert population.metrics == {}
    assert population.notes[0].startswith("metrics.csv: left out")


def test_a_header_with_a_column_twice_is_refused(folder):
    table(folder, ["a.pt,1,2"], header="file,loss,loss")
    with pytest.raises(ZooError, match="'loss' more than once"):
        read(folder)


def test_another_architecture_is_refused(folder):
    torch.save(nn.Linear(4, 3).state_dict(), folder / "e.pt")
    with pytest.raises(ZooError, match=r"e\.pt: misses .*a\.pt.*folder of their own"):
        read(folder)


def test_networks_with_nan_can_be_left_out_with_their_rows(folder):
    weights = network().state_dict()
    weights["0.bias"][0] = torch.nan
    torch.save(weights, folder / "a.pt")
    table(folder, accuracies(*FILES))
    with pytest.raises(ZooError, match=r"a\.pt.*NaN"):
        read(folder)
    population = read(folder, drop_nonfinite=True)
    assert population.names == FILES[1:]
    assert population.metrics["test_accuracy"].tolist() == [0.2, 0.3, 0.4]
    assert population.notes == ("1 of 4 networks left out: weights that are not finite.",)


def test_a_folder_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(ZooError, match=r"expected checkpoints .*got none"):
        read(tmp_path)


def test_a_damaged_file_is_refused_by_name(folder):
    content = (folder / "b.safetensors").read_bytes()
    (folder / "b.safetensors").write_bytes(content[:4])
    with pytest.raises(Unreadable, match=r"b\.safetensors"):
        read(folder)


def test_a_limit_of_zero_is_refused(folder):
    with pytest.raises(ConfigError, match="limit"):
        read(folder, limit=0)
