"""Read the weights of a network that ``torch.export.save`` wrote (.pt2), as raw bytes.

Such a file lists its tensors in JSON; nothing of it is run, and its pickled example is not opened.
MLflow keeps networks like that.
"""

import pickle
from typing import Any, BinaryIO

import torch
from torch import Tensor

from metamerge.checkpoints.archives import EXPORT, Records, read_record
from metamerge.checkpoints.opening import parse_json_object
from metamerge.checkpoints.plain import plain_weights
from metamerge.checkpoints.torch_outline import StorageOutline, check_within, count
from metamerge.errors import Unreadable, Unsafe
from metamerge.weights import Weights

LIST = "data/weights/model_weights_config.json"
"""Record that lists the weights, below the archive's own folder."""
_MAX_LIST_BYTES = 64 * 2**20
_STRIDED = 7
_DTYPES = {  # numbers of torch._export.serde.schema.ScalarType
    **{1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64},
    **{6: torch.float16, 7: torch.float32, 8: torch.float64, 12: torch.bool, 13: torch.bfloat16},
}


def read_exported(file: BinaryIO, records: Records, name: str) -> Weights:
    """Read the parameters and buffers of an exported network.

    Args:
        file: Open file.
        records: Its records, one of which ends with ``LIST``.
        name: What messages call it.

    Returns:
        Weights on the CPU. Tensors that shared memory still do.

    Raises:
        Unsafe: If a tensor is pickled.
        TooLarge: If a tensor claims more than its memory.
        Truncated: If the file ends early.
        Unreadable: If it is damaged, or of a version that is not known here.
        IncompatibleWeights: If a tensor is of a kind that cannot be merged.
    """
    listed = next(path for path in records if path.endswith(f"/{LIST}"))
    folder = listed.removesuffix("model_weights_config.json")
    text = read_record(file, records[listed], name, _MAX_LIST_BYTES)
    entries = parse_json_object(text, f"{name}, {listed}").get("config")
    if not isinstance(entries, dict) or _byte_order(file, records, folder, name) != b"little":
        raise Unreadable(f"{name}: is an exported network of an unknown version. {EXPORT}")
    memory: dict[str, bytearray] = {}
    tensors = {}
    for key, entry in entries.items():
        try:
            path = folder + entry["path_name"]
            if entry["use_pickle"] is not False:
                raise Unsafe(f"{name}: {key!r} is pickled and could run code. {EXPORT}")
            if path not in memory:
                size = records[path].file_size
                memory[path] = bytearray(read_record(file, records[path], name, size))
            tensors[key] = _tensor(entry["tensor_meta"], memory[path], f"{name}: {key!r}")
        except (KeyError, TypeError, IndexError, pickle.UnpicklingError):
            raise Unreadable(
                f"{name}: {key[:200]!r} is not listed as torch.export does. {EXPORT}"
            ) from None
    return plain_weights(name, tensors)


def _byte_order(file: BinaryIO, records: Records, folder: str, name: str) -> bytes:
    record = records.get(f"{folder.removesuffix('data/weights/')}byteorder")
    return b"" if record is None else read_record(file, record, name, 16)


def _tensor(meta: dict[str, Any], memory: bytearray, where: str) -> Tensor:
    """A tensor over its bytes, once it is known to lie within them."""
    dtype = _DTYPES[meta["dtype"]]
    if meta["layout"] != _STRIDED:
        raise KeyError
    shape = tuple(count(one["as_int"]) for one in meta["sizes"])
    strides = tuple(count(one["as_int"]) for one in meta["strides"])
    offset = count(meta["storage_offset"]["as_int"])
    numel = len(memory) // dtype.itemsize
    check_within(StorageOutline("", numel, dtype.itemsize), offset, shape, strides, where)
    if not numel:
        return torch.empty(shape, dtype=dtype)
    whole = torch.frombuffer(memory, dtype=dtype, count=numel)
    return whole.as_strided(shape, strides, offset)
