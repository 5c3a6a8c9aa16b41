"""Full disks, races and kills leave the old checkpoint or the new one, and no other trace."""

import errno
import os
import resource
import subprocess
import sys

import pytest
import torch

from metamerge.checkpoints import read_checkpoints, save_checkpoint
from metamerge.errors import ConfigError


def ones(value=1.0):
    return {"w": torch.full((2, 3), value), "n": torch.tensor(5)}


def value_in(folder):
    return read_checkpoints(folder)[0].weights["w"].unique().item()


def failing(code):
    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    return fail


FAILURES = {
    "sync": ("os.fsync", errno.ENOSPC),
    "library": ("metamerge.checkpoints.writing.save_file", errno.ENOSPC),
    "manifest": ("metamerge.checkpoints.writing.write_text", errno.ENOSPC),
    "folder": ("pathlib.Path.mkdir", errno.EROFS),
    "rename": ("metamerge.checkpoints.writing._put_in_place", errno.EIO),
}


@pytest.mark.parametrize("step", FAILURES)
@pytest.mark.parametrize("old", [True, False], ids=["over an old one", "new"])
def test_a_failing_disk_leaves_the_old_checkpoint_and_nothing_else(
    tmp_path, monkeypatch, step, old
):
    if old:
        save_checkpoint(ones(1.0), tmp_path / "a")
    name, code = FAILURES[step]
    monkeypatch.setattr(name, failing(code))
    with pytest.raises(OSError, match=os.strerror(code)):
        save_checkpoint(ones(2.0), tmp_path / "a", overwrite=True)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == (["a"] if old else [])
    assert not old or value_in(tmp_path / "a") == 1.0


def test_a_disk_that_really_ends_leaves_the_old_checkpoint_and_nothing_else(tmp_path):
    save_checkpoint(ones(1.0), tmp_path / "a")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"cannot be written"):
            save_checkpoint({"w": torch.zeros(10**6)}, tmp_path / "a", overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == ["a"]
    assert value_in(tmp_path / "a") == 1.0


def test_a_checkpoint_that_appears_meanwhile_is_kept(tmp_path, monkeypatch):
    real = os.rename

    def late(source, target):
        monkeypatch.setattr(os, "rename", real)
        save_checkpoint(ones(1.0), tmp_path / "a")
        real(source, target)

    monkeypatch.setattr(os, "rename", late)
    with pytest.raises(ConfigError, match="by someone else"):
        save_checkpoint(ones(2.0), tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"]
    assert value_in(tmp_path / "a") == 1.0


KILLED = """
import os, random, signal, sys, time
import torch
from metamerge.checkpoints import save_checkpoint, read_checkpoints

torch.set_num_threads(1)
target, rounds = sys.argv[1], int(sys.argv[2])
delays = random.Random(0)
for _ in range(rounds):
    child = os.fork()
    if child == 0:
        value = 0.0
        while True:
            value += 1
            save_checkpoint({"w": torch.full((500_000,), value)}, target, overwrite=True)
    time.sleep(delays.uniform(0.0, 0.06))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if os.path.lexists(target):
        (found,) = read_checkpoints(target)
        assert found.verified and found.weights["w"].unique().numel() == 1
        print(found.weights["w"][0].item())
"""


def test_a_killed_process_leaves_the_old_or_the_new_checkpoint_complete(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "a"), "25"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.split()) > 5  # saves did complete between the kills
    left = set(os.listdir(tmp_path)) - {"a"}
    assert all(name.startswith(".a.") and name.endswith(".partial") for name in left)
