"""Everything that a checkpoint can come as, and what arbitrary bytes come to."""

import contextlib
import io
import os
import subprocess
import sys
import types

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import nn

from metamerge.checkpoints import Checkpoint, read_checkpoints
from metamerge.checkpoints.torch_files import LEGACY_MAGIC, ZIP_MAGIC
from metamerge.errors import CheckpointError, ConfigError, IncompatibleWeights, Unreadable


def test_a_checkpoint_is_passed_through():
    checkpoint = Checkpoint("mine", {"w": torch.zeros(1)})
    assert read_checkpoints(checkpoint) == [checkpoint]


def test_a_module_is_copied():
    model = nn.Linear(2, 2)
    (checkpoint,) = read_checkpoints(model)
    with torch.no_grad():
        model.weight.fill_(7)
    assert checkpoint.name == "Linear"
    assert list(checkpoint.weights) == ["weight", "bias"]
    assert not (checkpoint.weights["weight"] == 7).any()
    assert not checkpoint.weights["weight"].requires_grad


def test_tied_parameters_of_a_module_stay_tied():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    weights = read_checkpoints(model)[0].weights
    assert weights["0.weight"].data_ptr() == weights["1.weight"].data_ptr()
    assert weights["0.weight"].data_ptr() != model[0].weight.data_ptr()


def test_a_lazy_module_without_values_is_refused_by_name():
    with pytest.raises(IncompatibleWeights, match="LazyLinear: 'weight' has no values yet"):
        read_checkpoints(nn.LazyLinear(2))


def test_any_mapping_of_tensors_is_read():
    source = types.MappingProxyType({"w": torch.arange(6).reshape(2, 3).t()})
    weights = read_checkpoints(source)[0].weights
    assert type(weights) is dict
    assert weights["w"].is_contiguous()
    assert weights["w"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_zero_size_and_scalar_tensors_pass_through():
    source = {"none": torch.zeros(0, 3), "scalar": torch.tensor(2.5)}
    weights = read_checkpoints(source)[0].weights
    assert weights["none"].shape == (0, 3)
    assert weights["scalar"] == 2.5


def test_tensors_that_share_memory_pass_through():
    tied = torch.ones(2)
    weights = read_checkpoints({"a": tied, "b": tied})[0].weights
    assert weights["a"].data_ptr() == weights["b"].data_ptr()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: {"odd": torch.eye(2).to_sparse()}, "'odd' has layout torch.sparse_coo"),
        (lambda: {"odd": torch.zeros(2, device="meta")}, "'odd' is on the meta device"),
        (lambda: {"odd": torch.zeros(2, dtype=torch.complex64)}, "'odd' has dtype torch.complex64"),
        (lambda: {"odd": torch.zeros(2).to(torch.float8_e5m2)}, "'odd' has dtype torch.float8"),
        (
            lambda: {"odd": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)},
            "'odd' is quantised",
        ),
        (lambda: {"odd": 3.0}, "'odd' is a float, not a tensor"),
        (lambda: {"odd": None}, "'odd' is a NoneType"),
        (lambda: {3: torch.zeros(1)}, "3 is a name of type int"),
    ],
    ids=["sparse", "meta", "complex", "float8", "quantised", "number", "none", "key"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_values_that_cannot_be_merged_are_named(make, match):
    with pytest.raises(IncompatibleWeights, match=f"state dict: {match}"):
        read_checkpoints(make())


def test_an_empty_state_dict_is_unreadable():
    with pytest.raises(Unreadable, match="holds no tensors"):
        read_checkpoints({})


@pytest.mark.parametrize("source", [3, None, [{}], b"a.pt", torch.zeros(1)])
def test_other_types_are_refused(source):
    with pytest.raises(ConfigError, match="is not a checkpoint"):
        read_checkpoints(source)


@pytest.mark.parametrize("uri", ["https://host/a.safetensors", "s3://bucket/a#b/0", "file:/a.pt"])
def test_other_addresses_are_to_be_downloaded_first(uri):
    with pytest.raises(ConfigError, match="Download it"):
        read_checkpoints(uri)


def test_an_empty_path_is_refused():
    with pytest.raises(ConfigError, match="empty"):
        read_checkpoints("")


def test_a_given_name_appears_instead_of_the_path(tmp_path):
    save_file({"w": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert read_checkpoints(tmp_path / "a.safetensors", name="first")[0].name == "first"
    assert read_checkpoints({"w": torch.zeros(1)}, name="second")[0].name == "second"


def test_a_path_in_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_file({"w": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert read_checkpoints("~/a.safetensors")[0].name == str(tmp_path / "a.safetensors")


def test_reading_needs_none_of_the_heavy_libraries():
    script = (
        "import sys, metamerge.checkpoints\n"
        "print([n for n in ('mlflow', 'sklearn', 'accelerate') if n in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ, check=True
    )
    assert run.stdout.strip() == "[]"


STARTS = [b"", ZIP_MAGIC, LEGACY_MAGIC, b"\x80\x02", b"\x10" + bytes(7) + b'{"a":', b"\xff" * 8]


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(start=st.sampled_from(STARTS), rest=st.binary(max_size=300), suffix=st.booleans())
def test_arbitrary_bytes_raise_nothing_but_checkpoint_errors(tmp_path, start, rest, suffix):
    path = tmp_path / ("a.safetensors" if suffix else "a.pt")
    path.write_bytes(start + rest)
    with pytest.raises(CheckpointError):
        read_checkpoints(path)


def sound_files():
    weights = {"a.weight": torch.ones(3, 2), "n": torch.tensor(3), "b": torch.ones(2).bfloat16()}
    streams = [io.BytesIO(), io.BytesIO()]
    torch.save(weights, streams[0])
    torch.save(weights, streams[1], _use_new_zipfile_serialization=False)
    return [save(weights), *(stream.getvalue() for stream in streams)]


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    content=st.sampled_from(sound_files()),
    place=st.floats(0, 1, exclude_max=True),
    change=st.binary(min_size=1, max_size=9),
    removed=st.integers(0, 9),
)
def test_damaged_files_are_read_or_refused_but_never_fail_otherwise(
    tmp_path, content, place, change, removed
):
    at = int(place * len(content))
    (tmp_path / "a.pt").write_bytes(content[:at] + change + content[at + removed :])
    with contextlib.suppress(CheckpointError, IncompatibleWeights):
        (checkpoint,) = read_checkpoints(tmp_path / "a.pt")
        assert all(tensor.numel() <= 6 for tensor in checkpoint.weights.values())
