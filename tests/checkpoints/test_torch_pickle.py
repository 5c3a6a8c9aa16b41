"""Nothing that a torch file carries is ever run: code, programs and foreign objects are refused."""

import argparse
import os
import pickle
import subprocess

import numpy as np
import pytest
import torch
from torch import nn

from metamerge.errors import Unreadable, Unsafe

both_formats = pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])


class Attack:
    """Pickles as a call that makes a file."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def weights():
    return {"a.weight": torch.randn(4, 3), "steps": torch.tensor(5), "mask": torch.tensor([True])}


ATTACKS = {
    "os.system": lambda mark: Attack(os.system, f"touch {mark}"),
    "subprocess": lambda mark: Attack(subprocess.call, ["touch", str(mark)]),
    "eval": lambda mark: Attack(eval, f"open({str(mark)!r}, 'w')"),
    "open": lambda mark: Attack(open, str(mark), "w"),
}


@both_formats
@pytest.mark.parametrize("kind", ATTACKS)
@pytest.mark.parametrize("place", ["alone", "beside"])
def test_code_in_a_checkpoint_is_refused_and_never_runs(
    tmp_path, saved, refuse, as_zip, kind, place
):
    mark = tmp_path / "mark"
    attack = ATTACKS[kind](mark)
    content = attack if place == "alone" else weights() | {"x": attack}
    refuse(Unsafe, "could run code", saved(content, tmp_path / "a.pt", as_zip))
    assert not mark.exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_bare_pickle_is_refused_and_never_runs(tmp_path, refuse, protocol, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(pickle.dumps(ATTACKS["open"](tmp_path / "mark"), protocol))
    refuse(Unsafe, "pickle", path)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("protocol", [0, 1])
def test_a_pickle_of_an_old_protocol_is_refused_and_never_runs(tmp_path, refuse, protocol):
    path = tmp_path / "a.pt"
    path.write_bytes(pickle.dumps(ATTACKS["open"](tmp_path / "mark"), protocol))
    refuse(Unreadable, "neither", path)
    assert not (tmp_path / "mark").exists()


@both_formats
def test_a_torch_file_under_the_name_of_safetensors_is_refused(tmp_path, saved, refuse, as_zip):
    refuse(Unsafe, "under the name", saved(weights(), tmp_path / "a.safetensors", as_zip))


@both_formats
@pytest.mark.parametrize(
    "content",
    [
        nn.Linear(2, 2),
        {"state_dict": {"w": torch.zeros(1)}, "args": argparse.Namespace(lr=1)},
        {"w": np.zeros(3)},
        {"w": torch.zeros(1), "s": {1}},
    ],
    ids=["module", "namespace", "numpy", "set"],
)
def test_other_objects_are_refused_with_advice_to_export(tmp_path, saved, refuse, as_zip, content):
    refuse(Unsafe, "state_dict", saved(content, tmp_path / "a.pt", as_zip))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_program_is_refused_with_advice_to_export(tmp_path, refuse):
    path = tmp_path / "a.pt"
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(path)
    refuse(Unsafe, "TorchScript.*state_dict", path)


def test_a_nested_key_is_refused_before_it_is_hashed(tmp_path, saved, refuse, rewritten):
    path = saved({"w": torch.zeros(1)}, tmp_path / "a.pt")
    doubled = b"".join(b"q%ch%c\x86" % (i, i) for i in range(18))  # memo, get, pair
    build = (
        b"\x80\x02})" + doubled + b"K\x01s."
    )  # {((..), (..)): 1}: n levels take 2^n steps to hash
    rewritten(path, lambda r: {k: build if k.endswith("data.pkl") else v for k, v in r.items()})
    refuse(Unreadable, "not a pickle as torch.save writes it", path)
