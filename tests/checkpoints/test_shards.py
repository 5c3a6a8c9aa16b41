"""Shards: an index is believed only as far as its files bear it out."""

import json

import pytest
import torch
from safetensors.torch import save_file

from metamerge.checkpoints import read_checkpoints
from metamerge.errors import CheckpointError, TooLarge, Unreadable, Unsafe

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write_index(folder, weight_map, name="model.safetensors.index.json"):
    content = {"metadata": {"total_size": 12}, "weight_map": weight_map}
    (folder / name).write_text(json.dumps(content))
    return folder / name


@pytest.fixture
def sharded(tmp_path):
    save_file({"b": torch.tensor(2.0)}, tmp_path / ONE)
    save_file({"a": torch.tensor([1.0, 1.0])}, tmp_path / TWO)
    write_index(tmp_path, {"b": ONE, "a": TWO})
    return tmp_path


def test_shards_are_joined_in_the_order_of_the_index(sharded):
    for source in (sharded, sharded / "model.safetensors.index.json"):
        checkpoint = read_checkpoints(source)[0]
        assert list(checkpoint.weights) == ["b", "a"]
        assert checkpoint.weights["a"].tolist() == [1.0, 1.0]
        assert checkpoint.metadata == {"total_size": 12}


def test_a_tensor_named_in_no_shard_is_listed(sharded):
    write_index(sharded, {"b": ONE, "a": TWO, "c": TWO})
    with pytest.raises(Unreadable, match=r"not in their shard: \['c'\]"):
        read_checkpoints(sharded)


def test_a_tensor_in_another_shard_than_the_index_says_is_listed(sharded):
    write_index(sharded, {"b": TWO, "a": ONE})
    with pytest.raises(Unreadable, match=r"not in their shard: \['b', 'a'\]"):
        read_checkpoints(sharded)


def test_a_tensor_that_the_index_does_not_name_is_listed(sharded):
    save_file({"b": torch.tensor(2.0), "stray": torch.tensor(0.0)}, sharded / ONE)
    with pytest.raises(Unreadable, match=r"not in the index: \['stray'\]"):
        read_checkpoints(sharded)


def test_a_tensor_in_two_shards_is_listed(sharded):
    save_file({"b": torch.tensor(2.0), "a": torch.tensor([1.0, 1.0])}, sharded / TWO)
    with pytest.raises(Unreadable, match=r"\['b'\] are in another shard too"):
        read_checkpoints(sharded)


def test_a_missing_shard_is_listed(sharded):
    (sharded / TWO).unlink()
    with pytest.raises(Unreadable, match=f"1 shards are missing.*{TWO}"):
        read_checkpoints(sharded)


@pytest.mark.parametrize(
    "shard",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "C:\\x.safetensors",
        "C:x.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "..",
        "",
        "x.bin",
        "x\0.safetensors",
    ],
)
def test_a_shard_outside_the_folder_is_refused(sharded, shard):
    save_file({"b": torch.tensor(2.0)}, sharded.parent / "x.safetensors")
    write_index(sharded, {"b": shard, "a": TWO})
    with pytest.raises(Unsafe, match="its own folder"):
        read_checkpoints(sharded)


def test_a_link_that_leads_out_of_the_folder_is_refused(sharded):
    outside = sharded.parent / "outside.safetensors"
    (sharded / ONE).rename(outside)
    (sharded / ONE).symlink_to(outside)
    with pytest.raises(Unsafe, match=ONE):
        read_checkpoints(sharded)


def test_a_link_to_the_whole_folder_is_followed(sharded):
    (sharded.parent / "link").symlink_to(sharded)
    assert list(read_checkpoints(sharded.parent / "link")[0].weights) == ["b", "a"]


def test_a_single_file_beside_an_index_is_ambiguous(sharded):
    save_file({"a": torch.zeros(2), "b": torch.tensor(0.0)}, sharded / "model.safetensors")
    with pytest.raises(Unreadable, match="ambiguous"):
        read_checkpoints(sharded)


def test_two_indexes_are_listed_instead_of_guessed(sharded):
    write_index(sharded, {"b": ONE, "a": TWO}, "other.safetensors.index.json")
    with pytest.raises(Unreadable, match=r"other\.safetensors\.index\.json"):
        read_checkpoints(sharded)


@pytest.mark.parametrize("weight_map", [None, {}, [], {"a": 1}, {"a": None}])
def test_an_index_without_a_map_of_names_is_unreadable(sharded, weight_map):
    write_index(sharded, weight_map)
    with pytest.raises(Unreadable, match="weight_map"):
        read_checkpoints(sharded)


@pytest.mark.parametrize("text", ["", "{", '{"weight_map": {"a": "x", "a": "y"}}', "\udcff"])
def test_an_index_that_is_no_clean_json_is_unreadable(sharded, text):
    index = sharded / "model.safetensors.index.json"
    index.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(Unreadable, match="not valid JSON"):
        read_checkpoints(sharded)


def test_a_damaged_shard_is_refused(sharded):
    (sharded / ONE).write_bytes((sharded / ONE).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=ONE):
        read_checkpoints(sharded)


def test_the_limit_holds_for_all_shards_together(sharded):
    assert read_checkpoints(sharded, max_bytes=12)
    with pytest.raises(TooLarge, match="12 bytes"):
        read_checkpoints(sharded, max_bytes=11)
