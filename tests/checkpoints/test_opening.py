"""Whatever a path leads to, reading it ends at once and with one line that names it."""

import os
import socket
import stat

import pytest
import torch
from safetensors.torch import save_file

from metamerge.checkpoints import read_checkpoints
from metamerge.checkpoints.opening import display
from metamerge.errors import Unreadable

at_once = pytest.mark.timeout(20)


def test_a_missing_file_is_unreadable(tmp_path):
    with pytest.raises(Unreadable, match=r"none\.pt: cannot be opened \(No such file"):
        read_checkpoints(tmp_path / "none.pt")


@at_once
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ""])
def test_a_pipe_is_refused_without_waiting(tmp_path, suffix):
    os.mkfifo(tmp_path / f"pipe{suffix}")
    with pytest.raises(Unreadable, match="pipe or device"):
        read_checkpoints(tmp_path / f"pipe{suffix}")


@at_once
@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null"])
def test_a_device_is_refused(device):
    with pytest.raises(Unreadable, match=f"{device}: is a folder, pipe or device"):
        read_checkpoints(device)


@at_once
def test_a_socket_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("server")
        with pytest.raises(Unreadable, match="server"):
            read_checkpoints("server")


def test_a_file_without_permission_is_unreadable(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.zeros(1)}, path)
    path.chmod(0)

    def refuse(name, *_):
        assert stat.S_IMODE(os.stat(name).st_mode) == 0
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)  # root may read everything
    with pytest.raises(Unreadable, match=r"a\.safetensors: cannot be opened \(Permission denied\)"):
        read_checkpoints(path)


def test_an_error_of_the_disk_while_reading_is_unreadable(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.zeros(1)}, path)

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("metamerge.checkpoints.files.read_header", fail)
    with pytest.raises(Unreadable, match=r"a\.safetensors: reading failed \(Input/output error\)"):
        read_checkpoints(path)


@pytest.mark.parametrize(
    "name", ["ünï 模型.safetensors", "two\nlines.safetensors", "a#b.safetensors"]
)
def test_odd_names_are_read(tmp_path, name):
    save_file({"w": torch.ones(1)}, tmp_path / name)
    checkpoint = read_checkpoints(tmp_path / name)[0]
    assert checkpoint.weights["w"] == 1
    assert "\n" not in checkpoint.name


@pytest.mark.parametrize("name", ["two\nlines.pt", "byte\udcff.pt", "x" * 300, "null\0.pt"])
def test_messages_about_odd_names_stay_on_one_printable_line(tmp_path, name):
    with pytest.raises(Unreadable) as caught:
        read_checkpoints(tmp_path / name)
    str(caught.value).encode("utf-8")
    assert str(caught.value).isprintable()


def test_printable_names_are_shown_as_they_are():
    assert display("ünï 模型.pt") == "ünï 模型.pt"
