"""Trained mergers on disk."""

import json

import pytest
import torch

from metamerge.checkpoints import save_checkpoint
from metamerge.errors import CheckpointError, ConfigError, IncompatibleWeights, Unreadable
from metamerge.mergers import (
    AutoencoderConfig,
    AutoencoderMerger,
    GNNConfig,
    GNNMerger,
    load_merger,
    read_card,
    save_merger,
)

SHAPES = ((1, 8, 8),)
CARD = {"options": {"seed": 3}, "validation": {"accuracy": 0.75}, "note": "größer"}


def make(config):
    """A merger of either kind, with noise on every parameter."""
    made = GNNMerger if isinstance(config, GNNConfig) else AutoencoderMerger
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        merger = made(config)
        for parameter in merger.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return merger.requires_grad_(False)


CONFIGS = {
    "gnn": GNNConfig(probes=48, shapes=SHAPES, width=12, rounds=1, prior=3),
    "autoencoder": AutoencoderConfig(probes=48, shapes=SHAPES, width=12, rounds=1, size=9),
    "bottleneck": AutoencoderConfig(probes=48, shapes=SHAPES, width=12, skip=False),
}


@pytest.fixture(params=CONFIGS)
def merger(request):
    return make(CONFIGS[request.param])


@pytest.fixture
def folder(merger, tmp_path):
    return save_merger(merger, tmp_path / "merger", CARD)


def rewrite(folder, change):
    """Change the metadata of a saved merger; its checksums stay right."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest["metadata"])
    path.write_text(json.dumps(manifest))


def test_a_merger_comes_back_as_it_was_saved(merger, folder, mlp_case):
    loaded = load_merger(folder)
    assert loaded.config == merger.config
    assert type(loaded) is type(merger)
    assert not loaded.training
    state = loaded.state_dict()
    assert list(state) == list(merger.state_dict())
    assert all(torch.equal(state[key], tensor) for key, tensor in merger.state_dict().items())
    expected = merger(mlp_case.members, mlp_case.layout).weights
    found = loaded(mlp_case.members, mlp_case.layout).weights
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_parts_that_are_switched_off_stay_off(tmp_path):
    bare = make(GNNConfig(shapes=SHAPES, gate=False, prior=0))
    loaded = load_merger(save_merger(bare, tmp_path / "bare", {}))
    assert loaded.gate is None
    assert list(loaded.state_dict()) == list(bare.state_dict())


def test_the_card_comes_back(folder):
    assert read_card(folder) == CARD


def test_a_merger_replaces_an_older_one(folder):
    save_merger(make(GNNConfig(shapes=SHAPES, width=6)), folder, {"newer": True})
    assert load_merger(folder).config.width == 6
    assert read_card(folder) == {"newer": True}


@pytest.mark.parametrize("read", [load_merger, read_card])
def test_a_missing_folder_is_refused_with_the_way_to_train_one(tmp_path, read):
    with pytest.raises(ConfigError, match=r"accelerate launch trainers/merger\.py"):
        read(tmp_path / "nothing")


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "merger").write_text("no folder")
    with pytest.raises(ConfigError, match=r"accelerate launch trainers/merger\.py"):
        load_merger(tmp_path / "merger")


@pytest.mark.parametrize("read", [load_merger, read_card])
def test_another_checkpoint_is_no_merger(tmp_path, read):
    save_checkpoint({"0.weight": torch.zeros(2)}, tmp_path / "other", metadata={"epochs": 3})
    with pytest.raises(Unreadable, match="is no merger"):
        read(tmp_path / "other")


@pytest.mark.parametrize("kind", ["transformer", None, ["gnn"]])
def test_a_kind_that_nobody_knows_is_refused(folder, kind):
    rewrite(folder, lambda metadata: metadata.update(kind=kind))
    with pytest.raises(Unreadable, match="is no merger"):
        load_merger(folder)


@pytest.mark.parametrize(("name", "expected"), [("start", "fused"), ("spare", 0)])
def test_what_mergers_did_not_choose_before_is_what_they_did(folder, name, expected):
    rewrite(folder, lambda metadata: metadata["config"].pop(name))
    assert getattr(load_merger(folder).config, name) == expected


def test_what_is_wrong_with_a_configuration_is_said(folder):
    rewrite(folder, lambda metadata: metadata["config"].update(invention=1))
    with pytest.raises(Unreadable, match=r"unknown: \['invention'\].*version of metamerge that"):
        load_merger(folder)


def test_an_empty_folder_is_no_merger(tmp_path):
    with pytest.raises(Unreadable):
        load_merger(tmp_path)


def test_a_damaged_file_is_refused(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)
    with pytest.raises(Unreadable, match="damaged"):
        load_merger(folder)


def test_a_file_that_ends_too_early_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError):
        load_merger(folder)


def test_weights_of_another_configuration_are_refused(folder):
    rewrite(folder, lambda metadata: metadata["config"].update(width=13))
    with pytest.raises(IncompatibleWeights, match=r"embed\.weight"):
        load_merger(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda metadata: metadata.pop("config"),
        lambda metadata: metadata.update(config=None),
        lambda metadata: metadata.update(config=[]),
        lambda metadata: metadata["config"].update(invention=1),
        lambda metadata: metadata["config"].pop("shapes"),
        lambda metadata: metadata["config"].update(width="wide"),
        lambda metadata: metadata["config"].update(probes=-1),
        lambda metadata: metadata.update(
            kind="autoencoder" if "prior" in metadata["config"] else "gnn"
        ),
    ],
)
def test_a_configuration_that_is_none_is_refused(folder, change):
    rewrite(folder, change)
    with pytest.raises(Unreadable, match="its configuration is not that of a merger"):
        load_merger(folder)


def test_loading_leaves_the_callers_random_numbers_alone(folder):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load_merger(folder)
    assert torch.equal(torch.rand(3), expected)
