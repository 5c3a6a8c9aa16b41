"""Networks that torch.export.save wrote: their weights are read, nothing of them is run."""

import json
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from metamerge.checkpoints import read_checkpoints
from metamerge.errors import CheckpointError, TooLarge, Unreadable, Unsafe


class Tied(nn.Module):
    """Parameters of two dtypes, buffers, weights that two layers share, one seen transposed."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.seen = nn.Parameter(torch.randn(4, 3).T)
        self.scale = nn.Parameter(torch.randn(2).half())

    def forward(self, x):
        mixed = self.second(self.norm(self.first(x)))  # [rows, 4]
        return mixed @ self.seen.T * self.scale.float().sum()


@pytest.fixture
def exported(tmp_path):
    network = Tied().eval()
    rows = ({0: torch.export.Dim("rows")},)
    program = torch.export.export(network, (torch.zeros(3, 4),), dynamic_shapes=rows)
    torch.export.save(program, tmp_path / "network.pt2")
    return tmp_path / "network.pt2", network.state_dict()


def rewritten(path: Path, change) -> Path:
    """The same archive with its list of weights changed."""
    other = path.with_name("other.pt2")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(other, "w") as new:
        for record in old.infolist():
            content = old.read(record)
            if record.filename.endswith("weights_config.json"):
                told = json.loads(content)
                change(told["config"])
                content = json.dumps(told).encode()
            new.writestr(record.filename, content)
    return other


def test_every_tensor_is_that_of_the_state_dict(exported):
    path, weights = exported
    (found,) = read_checkpoints(path)
    assert found.weights.keys() == weights.keys()
    for key, tensor in weights.items():
        assert found.weights[key].dtype == tensor.dtype
        assert torch.equal(found.weights[key], tensor)


def test_a_folder_with_one_is_read_as_well(exported):
    path, weights = exported
    assert read_checkpoints(path.parent)[0].weights.keys() == weights.keys()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda c: c["scale"].update(use_pickle=True), Unsafe),
        (lambda c: c["scale"].update(path_name="../../model.json"), Unreadable),
        (lambda c: c["scale"]["tensor_meta"].update(dtype=99), Unreadable),
        (lambda c: c["scale"]["tensor_meta"].update(layout=1), Unreadable),
        (lambda c: c["scale"]["tensor_meta"].update(sizes=[{"as_int": 3}]), TooLarge),
        (lambda c: c["scale"]["tensor_meta"].update(sizes=[{"as_int": -1}]), Unreadable),
        (lambda c: c["scale"]["tensor_meta"].update(sizes=7), Unreadable),
        (lambda c: c["scale"]["tensor_meta"].update(storage_offset={"as_int": 1}), Unreadable),
        (
            lambda c: c["scale"]["tensor_meta"].update(
                sizes=[{"as_int": 2**40}], strides=[{"as_int": 0}]
            ),
            TooLarge,
        ),
        (lambda c: c.update(scale=None), Unreadable),
        (lambda c: c.update(scale=[]), Unreadable),
    ],
)
def test_a_list_that_lies_is_refused(exported, change, error):
    with pytest.raises(error, match=r"other\.pt2"):
        read_checkpoints(rewritten(exported[0], change))


def test_files_that_end_early_are_refused(exported):
    path, _ = exported
    content = path.read_bytes()
    for share in (0.2, 0.5, 0.9, 0.99):
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(CheckpointError):
            read_checkpoints(path)
