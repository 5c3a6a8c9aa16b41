"""Play the pickle of a torch checkpoint through with stand-ins that only take notes.

What torch.save writes is a list of functions to call. Here nothing is called but the stand-ins, so
that everything the file asks for can be judged before torch is asked to do it. Anything but tensors
and plain values is refused, and no code of the file ever runs.
"""

import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import BinaryIO, ClassVar

import torch

from metamerge.checkpoints.archives import EXPORT
from metamerge.checkpoints.torch_outline import (
    Outline,
    StorageOutline,
    TensorOutline,
    check_within,
    count,
    require,
)
from metamerge.errors import MetaMergeError, TooLarge, Truncated, Unreadable, Unsafe

MAX_OUTLINE_BYTES = 64 * 2**20

_OPCODES = """
    PROTO STOP MARK GLOBAL REDUCE BUILD BINPERSID NONE NEWTRUE NEWFALSE EMPTY_DICT EMPTY_LIST
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS SETITEM SETITEMS BININT BININT1 BININT2
    LONG1 BINFLOAT BINUNICODE SHORT_BINSTRING BINGET LONG_BINGET BINPUT LONG_BINPUT
"""
_ITEM_SIZES = {
    "ComplexDouble": 16,
    "ComplexFloat": 8,
    "Double": 8,
    "Float": 4,
    "Half": 2,
    "BFloat16": 2,
    "Long": 8,
    "Int": 4,
    "Short": 2,
    "Char": 1,
    "Byte": 1,
    "Bool": 1,
    "Untyped": 1,
    "QInt8": 1,
    "QUInt8": 1,
    "QUInt4x2": 1,
    "QUInt2x4": 1,
    "QInt32": 4,
}
_ODD_TENSORS = {
    "torch._utils._rebuild_sparse_tensor": "sparse",
    "torch._utils._rebuild_qtensor": "quantised",
    "torch._utils._rebuild_nested_tensor": "nested",
    "torch._utils._rebuild_meta_tensor_no_storage": "on the meta device",
    "torch._utils._rebuild_wrapper_subclass": "of a tensor subclass",
    "torch._utils._rebuild_device_tensor_from_numpy": "of another device",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "of another device",
}


@dataclass(frozen=True)
class _StorageType:
    itemsize: int


@dataclass
class _Limited:
    """File of which only so much can be read, and never more at once than is left."""

    file: BinaryIO
    name: str
    left: int = field(default=MAX_OUTLINE_BYTES)

    def read(self, count: int) -> bytes:
        self.left -= count
        if self.left < 0:
            raise TooLarge(f"{self.name}: its description is too long. {EXPORT}")
        content = self.file.read(count)
        if len(content) < count:
            raise EOFError
        return content

    def readline(self) -> bytes:
        line = self.file.readline(1000)
        self.left -= len(line)
        return line


def read_outline(file: BinaryIO, name: str) -> Outline:
    """Play one pickle through, from where the file stands to the pickle's end.

    Args:
        file: Open file; afterwards it stands behind the pickle.
        name: What messages call it.

    Returns:
        The outline.

    Raises:
        Unsafe: If the pickle names anything but tensors and plain values.
        TooLarge: If a tensor has more elements than its memory, or the pickle is too long.
        Truncated: If the file ends in the middle.
        Unreadable: If it is not a pickle as torch.save writes it.
    """
    reader = _OutlineUnpickler(_Limited(file, name), name)
    try:
        return Outline(reader.load(), reader.storages)
    except EOFError:
        raise Truncated(f"{name}: ends in the middle of its description. Copy it again.") from None
    except Exception as error:  # a malformed pickle fails in any of an interpreter's ways
        if isinstance(error, MetaMergeError | OSError):
            raise
        raise Unreadable(
            f"{name}: is not a pickle as torch.save writes it ({type(error).__name__}). {EXPORT}"
        ) from None


class _OutlineUnpickler(pickle._Unpickler):
    """Unpickler whose every callable is a stand-in.

    The Python implementation serves here because its instructions can be limited to a list, and
    because its memo is a dict, where the C implementation allocates what the file claims.
    """

    dispatch: ClassVar = {
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]]
        for name in _OPCODES.split()
    }

    def __init__(self, file: _Limited, name: str) -> None:
        super().__init__(file, encoding="utf-8")
        self.name = name
        self.storages: dict[str, StorageOutline] = {}
        self.stand_ins: dict[str, object] = {
            "collections.OrderedDict": _dict_of,
            "collections.Counter": _dict_of,
            "_codecs.encode": lambda *_: b"",
            "torch.Size": tuple,
            "torch.device": lambda *_: None,
            "torch.serialization._get_layout": lambda *_: None,
            "torch.Tensor": "torch.Tensor",
            "torch.nn.parameter.Parameter": "torch.nn.Parameter",
            "torch._utils._rebuild_tensor": self.tensor,
            "torch._utils._rebuild_tensor_v2": self.tensor,
            "torch._utils._rebuild_tensor_v3": self.tensor_of_dtype,
            "torch._utils._rebuild_parameter": lambda data, *_: data,
            "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
            "torch._tensor._rebuild_from_type_v2": lambda build, kind, args, *_: build(*args),
        }

    def find_class(self, module: str, name: str) -> object:
        full = f"{module}.{name}"
        if full in self.stand_ins:
            return self.stand_ins[full]
        if full in _ODD_TENSORS:
            return _odd_tensor(_ODD_TENSORS[full])
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype | torch.qscheme):
            return vars(torch)[name]
        kind = name.removesuffix("Storage")
        if module in ("torch", "torch.cuda", "torch.storage") and kind in _ITEM_SIZES:
            return _StorageType(_ITEM_SIZES[kind])
        raise Unsafe(
            f"{self.name}: holds {full[:200]!r}, which is neither a tensor nor a plain value; "
            f"loading it could run code. {EXPORT}"
        )

    def persistent_load(self, pid: tuple) -> StorageOutline:
        kind, storage_type, key, _device, numel, *view = pid
        require(kind == "storage" and isinstance(storage_type, _StorageType))
        require(isinstance(key, str))
        whole = StorageOutline(key, count(numel), storage_type.itemsize)
        require(self.storages.setdefault(key, whole).nbytes == whole.nbytes)
        if not view or view[0] is None:
            return whole
        _, offset, view_numel = view[0]
        require(count(offset) + count(view_numel) <= whole.numel)
        return StorageOutline(key, view_numel, whole.itemsize)

    def tensor(self, storage, offset, shape, stride, *_) -> TensorOutline:
        check_within(storage, offset, shape, stride, f"{self.name}: {self.place()}")
        return TensorOutline()

    def tensor_of_dtype(self, storage, offset, shape, stride, _grad, _hooks, dtype, *_):
        return self.tensor(storage.viewed_as(dtype), offset, shape, stride)

    def place(self) -> str:
        """Name the tensor that is being rebuilt: in a dict, its key lies just below it."""
        key = self.stack[-2] if len(self.stack) > 1 else None
        return repr(key[:200]) if isinstance(key, str) else "a tensor"

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _put(self.stack[-1], key, value)

    def set_items(self) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            _put(self.stack[-1], key, value)

    def build(self) -> None:
        self.stack.pop()  # attributes of a dict, such as the module versions of a state dict
        require(type(self.stack[-1]) is dict)

    dispatch[pickle.SETITEM[0]] = set_item
    dispatch[pickle.SETITEMS[0]] = set_items
    dispatch[pickle.BUILD[0]] = build


def _odd_tensor(kind: str) -> Callable[..., TensorOutline]:
    return lambda *_: TensorOutline(odd=kind)


def _dict_of(pairs: object = ()) -> dict:
    """Stand in for the classes of dicts, which are rebuilt empty or from pairs."""
    result = {}
    for key, value in pairs.items() if isinstance(pairs, dict) else pairs:
        _put(result, key, value)
    return result


def _put(target: object, key: object, value: object) -> None:
    """Set an item; keys are simple, since hashing a nested key can take forever."""
    require(type(target) is dict and isinstance(key, str | int | float | bytes | None))
    target[key] = value
