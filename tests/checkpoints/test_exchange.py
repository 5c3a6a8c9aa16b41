"""Two folders swap their names, by the kernel or by renames."""

import os

import pytest

from metamerge.checkpoints import exchange


@pytest.mark.parametrize("by_kernel", [True, False])
def test_folders_swap_their_names(tmp_path, monkeypatch, by_kernel):
    if not by_kernel:
        monkeypatch.setattr(exchange, "_exchanged_by_kernel", lambda *_: False)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"was_{name}").touch()
    exchange.exchange(tmp_path / "a", tmp_path / "b")
    assert os.listdir(tmp_path / "a") == ["was_b"]
    assert os.listdir(tmp_path / "b") == ["was_a"]
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_a_swap_that_fails_half_way_is_undone(tmp_path, monkeypatch):
    monkeypatch.setattr(exchange, "_exchanged_by_kernel", lambda *_: False)
    (tmp_path / "b").mkdir()
    with pytest.raises(FileNotFoundError):
        exchange.exchange(tmp_path / "missing", tmp_path / "b")
    assert os.listdir(tmp_path) == ["b"]
