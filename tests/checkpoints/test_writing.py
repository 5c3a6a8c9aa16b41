"""Checkpoints are written whole or not at all, and nothing else is ever deleted."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from metamerge.checkpoints import check_output, read_checkpoints, save_checkpoint
from metamerge.errors import ConfigError, IncompatibleWeights


def ones(value=1.0):
    return {"w": torch.full((2, 3), value), "n": torch.tensor(5)}


def value_in(folder):
    return read_checkpoints(folder)[0].weights["w"].unique().item()


def content_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_written_is_read_back(tmp_path):
    folder = save_checkpoint(
        ones(), tmp_path / "runs" / "a", metadata={"epoch": 3}, program={"nodes": []}
    )
    (found,) = read_checkpoints(folder)
    assert folder == tmp_path / "runs" / "a"
    assert found.weights.keys() == ones().keys()
    assert all(torch.equal(found.weights[k], ones()[k]) for k in ones())
    assert found.metadata == {"epoch": 3}
    assert found.program == {"nodes": []}
    assert found.verified


def test_the_folder_holds_two_files_that_others_can_read(tmp_path):
    folder = save_checkpoint(ones(), tmp_path / "a")
    assert sorted(os.listdir(folder)) == ["manifest.json", "model.safetensors"]
    assert load_file(folder / "model.safetensors").keys() == ones().keys()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format"] == "metamerge-checkpoint-1"
    assert manifest["program"] is None


def test_the_same_weights_give_the_same_bytes(tmp_path):
    weights = ones() | {f"t{i}": torch.ones(i) for i in range(20)}
    for name in ("a", "b"):
        save_checkpoint(weights, tmp_path / name, metadata={"x": 1, "y": 2})
    assert content_of(tmp_path / "a") == content_of(tmp_path / "b")


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_get_the_mode_that_the_umask_asks_for(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        folder = save_checkpoint(ones(), tmp_path / "a")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {mode}
    assert folder.stat().st_mode & 0o777 == 0o777 & ~mask


def test_tied_and_overlapping_tensors_are_written_out_each(tmp_path):
    tied = torch.arange(6.0)
    save_checkpoint({"a": tied, "b": tied, "c": tied[2:], "d": tied[:3]}, tmp_path / "a")
    found = read_checkpoints(tmp_path / "a")[0].weights
    assert torch.equal(found["a"], tied)
    assert torch.equal(found["b"], tied)
    assert torch.equal(found["c"], tied[2:])
    assert torch.equal(found["d"], tied[:3])


def test_the_weights_in_memory_are_left_as_they_are(tmp_path):
    weights = {"w": torch.arange(6.0).reshape(2, 3).t()}
    save_checkpoint(weights, tmp_path / "a")
    assert not weights["w"].is_contiguous()
    assert torch.equal(read_checkpoints(tmp_path / "a")[0].weights["w"], weights["w"])


@pytest.mark.parametrize(
    "weights",
    [{}, {"w": 3.0}, {"__metadata__": torch.zeros(1)}, {"w": torch.zeros(1, device="meta")}],
)
def test_weights_that_cannot_be_stored_are_refused_before_anything_is_written(tmp_path, weights):
    with pytest.raises(IncompatibleWeights, match="save_checkpoint"):
        save_checkpoint(weights, tmp_path / "a")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("metadata", [{"x": object()}, {"x": float("nan")}, {"x": {1, 2}}])
def test_metadata_that_is_no_json_is_refused_before_anything_is_written(tmp_path, metadata):
    with pytest.raises(ConfigError, match="must be JSON"):
        save_checkpoint(ones(), tmp_path / "a", metadata=metadata)
    assert os.listdir(tmp_path) == []


def test_an_existing_checkpoint_is_kept_unless_told_otherwise(tmp_path):
    save_checkpoint(ones(1.0), tmp_path / "a")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        save_checkpoint(ones(2.0), tmp_path / "a")
    assert value_in(tmp_path / "a") == 1.0
    save_checkpoint(ones(2.0), tmp_path / "a", overwrite=True)
    assert value_in(tmp_path / "a") == 2.0
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_empty_folder_is_filled(tmp_path, overwrite):
    (tmp_path / "a").mkdir()
    save_checkpoint(ones(), tmp_path / "a", overwrite=overwrite)
    assert value_in(tmp_path / "a") == 1.0


def test_overwriting_never_deletes_files_of_others(tmp_path):
    save_checkpoint(ones(1.0), tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("keep me")
    with pytest.raises(ConfigError, match=r"notes\.txt"):
        save_checkpoint(ones(2.0), tmp_path / "a", overwrite=True)
    assert (tmp_path / "a" / "notes.txt").read_text() == "keep me"
    assert value_in(tmp_path / "a") == 1.0


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(ConfigError, match="is a file"):
        save_checkpoint(ones(), tmp_path / "a", overwrite=True)
    assert (tmp_path / "a").read_text() == "mine"


@pytest.mark.parametrize("place", ["", "a", "deep/er"])
def test_writing_into_a_zoo_is_refused(tmp_path, place):
    (tmp_path / "manifest.json").write_text(
        '{"format": "metamerge-zoo-2", "files": {}, "groups": {}}'
    )
    with pytest.raises(ConfigError, match="zoo"):
        save_checkpoint(ones(), tmp_path / place, overwrite=True)
    assert os.listdir(tmp_path) == ["manifest.json"]


@pytest.mark.parametrize("source", ["a", "a/model.safetensors", "link", "a/../a"])
def test_an_output_that_holds_what_is_read_is_refused(tmp_path, source):
    save_checkpoint(ones(), tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with pytest.raises(ConfigError, match="which is read"):
        check_output(tmp_path / "a", overwrite=True, sources=[{}, tmp_path / source])


def test_an_output_beside_what_is_read_is_accepted(tmp_path):
    save_checkpoint(ones(), tmp_path / "a")
    assert check_output(tmp_path / "b", sources=[str(tmp_path / "a"), {}]) == tmp_path / "b"
    assert not (tmp_path / "b").exists()


def test_a_place_that_cannot_be_written_to_is_refused_before_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda place, _: Path(place) != tmp_path)  # root may do all
    with pytest.raises(PermissionError, match="cannot be written to"):
        check_output(tmp_path / "new" / "a")


def test_a_broken_manifest_further_up_is_no_hindrance(tmp_path):
    (tmp_path / "manifest.json").write_text("{")
    save_checkpoint(ones(), tmp_path / "a")
    assert value_in(tmp_path / "a") == 1.0


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    tensors=st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda key: key != "__metadata__"),
        st.tuples(
            st.lists(st.integers(0, 3), max_size=3),
            st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool]),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_any_weights_survive_the_round_trip(tmp_path, tensors):
    weights = {k: torch.randint(0, 2, shape).to(dtype) for k, (shape, dtype) in tensors.items()}
    found = read_checkpoints(save_checkpoint(weights, tmp_path / "a", overwrite=True))[0].weights
    assert found.keys() == weights.keys()
    for key, tensor in weights.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor)
