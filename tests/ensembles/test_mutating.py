"""``mutant()`` from checkpoints to a module."""

import pytest
import torch
from torch import nn

from metamerge import merge
from metamerge.ensembles import mutant
from metamerge.errors import ConfigError


def nets(count=3, norm=False):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        between = [nn.GroupNorm(1, 6)] if norm else []
        return [
            nn.Sequential(nn.Linear(5, 6), *between, nn.ReLU(), nn.Linear(6, 3)).eval()
            for _ in range(count)
        ]


INPUTS = torch.linspace(-2, 2, 200).reshape(40, 5)
LABELS = torch.arange(40) % 3


def test_a_mutant_is_an_ordinary_network_that_can_be_saved_and_merged(tmp_path):
    members = nets()
    wide = mutant(members)
    module = wide.to_module(members[0])
    expected = torch.stack([member(INPUTS) for member in members]).mean(0)
    assert torch.allclose(module(INPUTS), expected, atol=1e-6)
    assert (module[0].out_features, wide.report["widths"]) == (18, {"0": 18})
    wide.save(tmp_path / "wide")
    again = merge([tmp_path / "wide", module], method="average")  # knows its program
    assert torch.allclose(again.weights["0.weight"].sum(), wide.weights["0.weight"].sum())


@pytest.mark.parametrize("criterion", ["taylor", "magnitude"])
def test_a_pruned_mutant_has_a_members_size(criterion):
    members = nets()
    small = mutant(members, width=1.0, criterion=criterion, batches=(INPUTS, LABELS))
    sizes = {key: tensor.shape for key, tensor in small.weights.items()}
    assert sizes == {key: tensor.shape for key, tensor in members[0].state_dict().items()}
    assert small.report["criterion"] == criterion
    small.to_module(members[0])
    by_group = mutant(members, width={"0": 7}, criterion="magnitude")
    assert by_group.weights["0.bias"].shape == (7,)


def test_what_is_missing_or_cannot_be_had_is_refused():
    with pytest.raises(ConfigError, match="taylor needs batches"):
        mutant(nets(), width=1.0)
    with pytest.raises(ConfigError, match="up to the number of members"):
        mutant(nets(), width=4.0, criterion="magnitude")
    with pytest.raises(ConfigError, match="criterion"):
        mutant(nets(), criterion="tailor")
    with pytest.raises(ConfigError, match="can be cut in several ways"):
        mutant(nets(norm=True), width=1.0, criterion="magnitude")
