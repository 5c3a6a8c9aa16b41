"""A folder stands for its one checkpoint; of several, none is guessed."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from metamerge.checkpoints import read_checkpoints, save_checkpoint
from metamerge.errors import Unreadable


def value_in(folder):
    return read_checkpoints(folder)[0].weights["w"].item()


def put(path, value):
    if path.suffix == ".safetensors":
        save_file({"w": torch.tensor(value)}, path)
    else:
        torch.save({"w": torch.tensor(value)}, path)


@pytest.mark.parametrize("name", ["weights.safetensors", "best.pt", "pytorch_model.bin", "a.dat"])
def test_the_only_checkpoint_file_is_read(tmp_path, name):
    put(tmp_path / name, 3.0)
    (tmp_path / "config.json").write_text("{}")
    assert value_in(tmp_path) == 3.0


def test_the_usual_name_comes_before_others(tmp_path):
    put(tmp_path / "model.safetensors", 1.0)
    put(tmp_path / "pytorch_model.bin", 2.0)
    assert value_in(tmp_path) == 1.0


def test_several_files_are_listed_instead_of_guessed(tmp_path):
    put(tmp_path / "epoch1.pt", 1.0)
    put(tmp_path / "epoch2.pt", 2.0)
    with pytest.raises(Unreadable, match=r"2 checkpoint files \(epoch1\.pt, epoch2\.pt\)"):
        read_checkpoints(tmp_path)


@pytest.mark.parametrize("content", [[], ["notes.txt"]])
def test_a_folder_without_checkpoint_is_unreadable(tmp_path, content):
    for name in content:
        (tmp_path / name).write_text("hello")
    with pytest.raises(Unreadable, match="holds no checkpoint"):
        read_checkpoints(tmp_path)


class Touch:
    """Pickles as a call that makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickles_that_lie_beside_the_weights_are_never_loaded(tmp_path):
    put(tmp_path / "model.safetensors", 1.0)
    for name in ("custom_checkpoint_0.pkl", "optimizer.bin", "scheduler.pt", "graph_cache.pt"):
        (tmp_path / name).write_bytes(pickle.dumps(Touch(tmp_path / "mark")))
    assert value_in(tmp_path) == 1.0
    assert not (tmp_path / "mark").exists()


def test_a_git_lfs_pointer_is_called_so(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    with pytest.raises(Unreadable, match="git lfs pull"):
        read_checkpoints(tmp_path)


def test_safetensors_under_another_name_are_told_by_content(tmp_path):
    save_file({"w": torch.tensor(4.0)}, tmp_path / "model.bin")
    assert value_in(tmp_path) == 4.0


def test_text_under_the_name_of_a_checkpoint_is_unreadable(tmp_path):
    (tmp_path / "model.pt").write_text("404: not found, try again later")
    with pytest.raises(Unreadable, match=r"neither a safetensors file nor one of torch\.save"):
        read_checkpoints(tmp_path)


def flip_one_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_one_flipped_bit_contradicts_the_manifest(tmp_path):
    folder = save_checkpoint({"w": torch.ones(4)}, tmp_path / "a")
    flip_one_bit(folder / "model.safetensors")
    for source in (folder, folder / "model.safetensors"):
        with pytest.raises(Unreadable, match=r"model\.safetensors: has sha256 .*manifest\.json"):
            read_checkpoints(source)


def test_one_flipped_bit_without_manifest_is_read_as_unverified(tmp_path):
    folder = save_checkpoint({"w": torch.ones(4)}, tmp_path / "a")
    (folder / "manifest.json").unlink()
    flip_one_bit(folder / "model.safetensors")
    assert read_checkpoints(folder)[0].verified is False


def test_a_file_that_the_manifest_lists_must_be_there(tmp_path):
    folder = save_checkpoint({"w": torch.ones(4)}, tmp_path / "a")
    (folder / "model.safetensors").unlink()
    put(folder / "other.pt", 1.0)
    with pytest.raises(Unreadable, match=r"lists \['model\.safetensors'\], not found"):
        read_checkpoints(folder)


@pytest.mark.parametrize(
    ("manifest", "match"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ('{"format": "metamerge-checkpoint-9"}', "known are"),
        ('{"format": "metamerge-checkpoint-1"}', "'files' must map"),
        ('{"format": "metamerge-checkpoint-1", "files": {"a": 1}}', "'files' must map"),
        ('{"format": "metamerge-checkpoint-1", "files": {}, "program": 1}', "'program' must be"),
        ('{"format": "metamerge-checkpoint-1", "files": {}, "metadata": 1}', "'metadata' must be"),
    ],
)
def test_a_damaged_manifest_is_not_ignored(tmp_path, manifest, match):
    put(tmp_path / "model.safetensors", 1.0)
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(Unreadable, match=match):
        read_checkpoints(tmp_path)


def test_the_manifest_of_another_program_is_left_alone(tmp_path):
    put(tmp_path / "model.safetensors", 1.0)
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 3, "name": "app"}))
    assert value_in(tmp_path) == 1.0
