"""Damaged and hostile safetensors files are told before anything is allocated for them."""

import json
import struct
import tracemalloc

import pytest
import torch
from safetensors.torch import save_file

from metamerge.checkpoints import read_checkpoints
from metamerge.checkpoints.opening import open_regular
from metamerge.checkpoints.safetensors_files import read_header, read_row, read_tensor
from metamerge.errors import IncompatibleWeights, TooLarge, Truncated, Unreadable


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def packed(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def read(tmp_path, content, **options):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    return read_checkpoints(path, **options)[0]


def refuse(tmp_path, error, match, content, **options):
    with pytest.raises(error, match=match) as caught:
        read(tmp_path, content, **options)
    assert "a.safetensors" in str(caught.value)


def test_an_empty_file_is_unreadable(tmp_path):
    refuse(tmp_path, Unreadable, "is empty", b"")


def test_seven_bytes_are_unreadable(tmp_path):
    refuse(tmp_path, Unreadable, "has 7 bytes", b"1234567")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100 * 10**6 + 1])
def test_an_enormous_header_is_refused_without_allocating_it(tmp_path, length):
    tracemalloc.start()
    refuse(tmp_path, TooLarge, f"{length}", struct.pack("<Q", length) + b"{}")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_a_header_longer_than_the_file_is_truncated(tmp_path):
    refuse(tmp_path, Truncated, "at least 1008 bytes, got 10", struct.pack("<Q", 1000) + b"{}")


@pytest.mark.parametrize(
    "text", [b"{broken", b'{"a": "\xff\xfe"}', b"[]", b"7", b"[" * 100_000, b'{"a": ' * 50_000]
)
def test_a_header_that_is_no_json_object_is_unreadable(tmp_path, text):
    refuse(tmp_path, Unreadable, "JSON", packed(text))


def test_a_repeated_name_is_unreadable(tmp_path):
    one = json.dumps(entry())
    text = f'{{"w": {one}, "w": {one}}}'.encode()
    refuse(tmp_path, Unreadable, "'w' appears twice", packed(text, bytes(8)))


@pytest.mark.parametrize(
    "shape", [[-1, -2], [-2], [2**62, 2**62], [2**64], [1] * 65, [2.0], [True], ["2"], "2", None]
)
def test_an_impossible_shape_is_unreadable(tmp_path, shape):
    header = {"w": entry() | {"shape": shape}}
    refuse(tmp_path, Unreadable, "'w' has an impossible shape", packed(header, bytes(8)))


def test_a_shape_without_data_is_unreadable(tmp_path):
    refuse(tmp_path, Unreadable, "needs 4398046511104 bytes", packed({"w": entry(shape=[2**40])}))


def test_a_consistent_claim_beyond_the_limit_is_too_large(tmp_path):
    header = {"w": entry(shape=[2**40], offsets=[0, 2**42])}
    refuse(tmp_path, TooLarge, "limit", packed(header))


@pytest.mark.parametrize("offsets", [[8, 0], [-8, 0], [0], [0, 4, 8], [0, 8.0], "08", None])
def test_impossible_offsets_are_unreadable(tmp_path, offsets):
    header = {"w": entry() | {"data_offsets": offsets}}
    refuse(tmp_path, Unreadable, "'w'", packed(header, bytes(8)))


def test_overlapping_tensors_are_unreadable(tmp_path):
    header = {"v": entry(), "w": entry(offsets=[4, 12])}
    refuse(tmp_path, Unreadable, "'w' overlaps", packed(header, bytes(12)))


def test_a_hole_between_tensors_is_unreadable(tmp_path):
    header = {"v": entry(), "w": entry(offsets=[12, 20])}
    refuse(tmp_path, Unreadable, "'w' follows a hole", packed(header, bytes(20)))


def test_bytes_after_the_last_tensor_are_unreadable(tmp_path):
    refuse(tmp_path, Unreadable, "has 3 bytes after", packed({"w": entry()}, bytes(11)))


def test_missing_data_is_truncated(tmp_path):
    refuse(tmp_path, Truncated, "ends early", packed({"w": entry()}, bytes(7)))


@pytest.mark.parametrize("cut", [1, 4, 100, 1000])
def test_every_shortened_file_is_refused(tmp_path, cut):
    save_file({"w": torch.ones(400)}, tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    refuse(tmp_path, Truncated, "ends early", content[:-cut])


def test_a_file_that_shrinks_after_its_header_was_read_is_truncated(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(100_000)}, path)
    with open_regular(path) as file:
        header = read_header(file, "a.safetensors", 10**6)
        with open(path, "r+b") as other:
            other.truncate(500)
        with pytest.raises(Truncated, match="ends early"):
            read_tensor(file, header.entries["w"], "a.safetensors")


def test_an_unknown_dtype_is_unreadable(tmp_path):
    refuse(tmp_path, Unreadable, "unknown dtype 'F99'", packed({"w": entry("F99")}, bytes(8)))


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F4", "C64"])
def test_a_dtype_that_cannot_be_merged_is_incompatible(tmp_path, dtype):
    header = {"w": entry(dtype, [8], [0, 8])}
    refuse(tmp_path, IncompatibleWeights, f"'w' has dtype {dtype}", packed(header, bytes(8)))


@pytest.mark.parametrize("fields", [{}, {"dtype": "F32"}, entry() | {"more": 1}, [], 3])
def test_an_entry_with_other_fields_is_unreadable(tmp_path, fields):
    refuse(tmp_path, Unreadable, "'w' needs exactly", packed({"w": fields}, bytes(8)))


def test_metadata_that_is_no_text_is_unreadable(tmp_path):
    header = {"__metadata__": {"a": 1}, "w": entry()}
    refuse(tmp_path, Unreadable, "__metadata__", packed(header, bytes(8)))


def test_tensors_beyond_the_limit_are_too_large(tmp_path):
    refuse(tmp_path, TooLarge, "limit is 7", packed({"w": entry()}, bytes(8)), max_bytes=7)


def test_a_file_without_tensors_is_unreadable(tmp_path):
    refuse(tmp_path, Unreadable, "holds no tensors", packed({}))


def test_all_dtypes_and_shapes_are_read_as_the_library_wrote_them(tmp_path):
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32]
    dtypes += [torch.int16, torch.int8, torch.uint8, torch.bool]
    tensors = {str(d): torch.tensor([[0, 1, 1], [1, 0, 1]]).to(d) for d in dtypes}
    tensors |= {"scalar": torch.tensor(3.5), "none": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"made": "here"})
    checkpoint = read_checkpoints(tmp_path / "a.safetensors")[0]
    assert checkpoint.metadata == {"made": "here"}
    assert not checkpoint.verified
    assert checkpoint.weights.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert checkpoint.weights[name].dtype == tensor.dtype
        assert torch.equal(checkpoint.weights[name], tensor)


def test_a_bool_byte_other_than_one_counts_as_true(tmp_path):
    header = {"w": entry("BOOL", [3], [0, 3])}
    weights = read(tmp_path, packed(header, b"\x00\x02\xff")).weights
    assert weights["w"].dtype == torch.bool
    assert weights["w"].view(torch.uint8).tolist() == [0, 1, 1]


@pytest.mark.parametrize("index", [(0,), (1,), (0, 2), (1, 0), (1, 2)])
def test_a_row_is_the_same_as_indexing_the_whole_tensor(tmp_path, index):
    tensor = torch.arange(2 * 3 * 4).reshape(2, 3, 4)
    save_file({"pad": torch.zeros(7), "w": tensor}, tmp_path / "a.safetensors")
    with open_regular(tmp_path / "a.safetensors") as file:
        entries = read_header(file, "a", 10**6).entries
        assert torch.equal(read_row(file, entries["w"], index, "a"), tensor[index])
