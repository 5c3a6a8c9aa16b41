"""A population is whole, of one architecture, and read without running what a file carries."""

import os

import pytest
import torch
from torch import nn

from metamerge.errors import CheckpointError, ConfigError, ZooError
from zoo.imports.population import (
    Population,
    check_request,
    fitting_network,
    listed,
    stack_files,
)


def network():
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def save(folder, count=3, change=None):
    """Files of ``count`` random networks; ``change`` alters the last of them."""
    members, files = [], []
    for position in range(count):
        weights = {
            k: torch.randn_like(t) if t.ndim else t for k, t in network().state_dict().items()
        }
        if change and position == count - 1:
            weights = change(weights)
        members.append(weights)
        files.append(folder / f"{position}.pt")
        torch.save(weights, files[-1])
    return members, files


def test_stacked_files_hold_what_each_file_held(tmp_path):
    members, files = save(tmp_path)
    weights, kept = stack_files(files)
    assert kept == [0, 1, 2]
    assert list(weights) == list(members[0])
    for name, tensor in weights.items():
        assert tensor.dtype == members[0][name].dtype
        assert torch.equal(tensor, torch.stack([member[name] for member in members]))


def test_the_order_of_names_in_a_file_does_not_matter(tmp_path):
    members, files = save(tmp_path, change=lambda w: dict(reversed(w.items())))
    weights, _ = stack_files(files)
    assert list(weights) == list(members[0])
    assert torch.equal(weights["0.weight"][2], members[2]["0.weight"])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda w: {k: t for k, t in w.items() if k != "0.bias"}, r"misses '0.bias', expected"),
        (lambda w: w | {"head": torch.ones(1)}, r"adds 'head', expected"),
        (lambda w: w | {"0.bias": torch.ones(5)}, r"'0.bias' has shape \(5,\), expected \(2,\)"),
        (lambda w: w | {"0.bias": w["0.bias"].double()}, r"dtype torch.float64, expected torch.fl"),
    ],
)
def test_a_file_of_another_architecture_is_refused(tmp_path, change, match):
    _, files = save(tmp_path, change=change)
    with pytest.raises(ZooError, match=match) as caught:
        stack_files(files, way_out="Take another.")
    assert "2.pt" in str(caught.value)
    assert "as in" in str(caught.value)
    assert "0.pt" in str(caught.value)
    assert str(caught.value).endswith("Take another.")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_or_left_out(tmp_path, value):
    members, files = save(tmp_path, change=lambda w: w | {"0.bias": torch.tensor([value, 0.0])})
    with pytest.raises(ZooError, match=r"2\.pt.*'0.bias'.*drop_nonfinite=True"):
        stack_files(files)
    weights, kept = stack_files(files, drop_nonfinite=True)
    assert kept == [0, 1]
    assert torch.equal(weights["0.bias"], torch.stack([m["0.bias"] for m in members[:2]]))


def test_a_first_file_that_is_not_finite_can_be_left_out(tmp_path):
    members, files = save(tmp_path, change=lambda w: w | {"0.bias": torch.full((2,), torch.nan)})
    weights, kept = stack_files(files[::-1], drop_nonfinite=True)
    assert kept == [1, 2]
    assert torch.equal(weights["0.bias"], torch.stack([members[1]["0.bias"], members[0]["0.bias"]]))


def test_files_that_all_hold_nan_are_refused(tmp_path):
    _, files = save(tmp_path, 1, change=lambda w: w | {"0.bias": torch.full((2,), torch.nan)})
    with pytest.raises(ZooError, match="all 1 networks"):
        stack_files(files, drop_nonfinite=True)


class Planted:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_planted_program_never_runs(tmp_path):
    planted = tmp_path / "planted"
    _, files = save(tmp_path, change=lambda w: w | {"0.bias": Planted(planted)})
    with pytest.raises(CheckpointError):
        stack_files(files)
    assert not planted.exists()


def test_more_networks_than_fit_into_memory_are_refused(tmp_path):
    _, files = save(tmp_path)

    class Endless(list):
        def __len__(self):
            return 2**50

    with pytest.raises(ZooError, match=r"do not fit into memory.*limit"):
        stack_files(Endless(files))


@pytest.mark.parametrize("limit", [0, -1, True, 2.0, "3"])
def test_a_limit_that_is_no_number_of_networks_is_refused(tmp_path, limit):
    with pytest.raises(ConfigError, match="limit"):
        check_request(tmp_path, limit)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ZooError, match="expected a folder"):
        check_request(tmp_path / "absent", None)


def test_a_network_is_given_only_where_it_holds_the_weights(tmp_path):
    _, files = save(tmp_path)
    weights, _ = stack_files(files)
    assert fitting_network(network, weights) == (network, ())
    found, notes = fitting_network(lambda: nn.Linear(3, 2), weights)
    assert found is None
    assert "adds" in notes[0]


def test_looking_at_a_network_uses_no_random_numbers(tmp_path):
    _, files = save(tmp_path)
    state = torch.get_rng_state()
    fitting_network(network, stack_files(files)[0])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"names": ()}, "0 networks"),
        ({"weights": {}}, "0 tensors"),
        ({"names": ("a",)}, r"weights 'w'.*expected \(1, ...\)"),
        ({"metrics": {"loss": torch.zeros(2)}}, r"metric 'loss' is torch.float32"),
        ({"metrics": {"loss": torch.zeros(3, dtype=torch.float64)}}, r"\(3,\).*\(2,\)"),
    ],
)
def test_a_population_of_unequal_lengths_is_refused(change, match):
    whole = {
        "names": ("a", "b"),
        "weights": {"w": torch.zeros(2, 4)},
        "metrics": {"loss": torch.zeros(2, dtype=torch.float64)},
        "network": None,
        "input_shape": None,
    }
    assert Population(**whole).notes == ()
    with pytest.raises(ZooError, match=match):
        Population(**whole | change)


def test_long_lists_are_cut():
    assert listed(list(range(12))) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"
