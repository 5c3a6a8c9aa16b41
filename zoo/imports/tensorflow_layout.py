"""Rows of flattened TensorFlow variables: where each one lies, and how torch orders it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch

from metamerge.checkpoints.opening import display
from metamerge.errors import ZooError
from metamerge.weights import Weights
from zoo.imports.tables import read_table

_VARIABLE = re.compile(r"(?:.*/)?(\w+)/(kernel|bias)(?::0)?")
_SHAPE = re.compile(r"[(\[]\s*[1-9]\d{0,8}(\s*,\s*[1-9]\d{0,8})*\s*,?\s*[)\]]")
_INDEX = re.compile(r"\s*\d{1,12}\s*")
_TO_TORCH = {  # TensorFlow axes behind the axis of networks -> torch's
    ("kernel", 4): (0, 4, 3, 1, 2),  # HWIO -> OIHW
    ("kernel", 2): (0, 2, 1),  # in, out -> out, in
    ("bias", 1): (0, 1),
}
_CHUNK = 1024  # networks that are in memory twice


@dataclass(frozen=True)
class Variable:
    """One variable of a network within its row.

    Attributes:
        layer: Last part of the layer's name, such as ``conv2d_1``.
        kind: ``kernel`` or ``bias``.
        shape: Shape in TensorFlow.
        start: First column.
        end: Column behind the last.
    """

    layer: str
    kind: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def name(self) -> str:
        """Name that torch gives it."""
        return f"{self.layer}.{'weight' if self.kind == 'kernel' else 'bias'}"

    @property
    def axes(self) -> tuple[int, ...]:
        """Axes of stacked variables ``[n, *shape]`` in torch's order."""
        return _TO_TORCH[self.kind, len(self.shape)]

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """Shape that torch gives it."""
        return tuple(self.shape[axis - 1] for axis in self.axes[1:])


def read_layout(path: Path, width: int) -> list[Variable]:
    """Read a ``layout.csv`` with columns varname, shape, start_idx, end_idx and perhaps size.

    Args:
        path: The file.
        width: Number of columns that the variables must fill without gap or overlap.

    Returns:
        Variables in the order of their columns.

    Raises:
        ZooError: If the file contradicts itself or ``width``, or names other variables than
            kernels and biases of convolutions and dense layers.
        Unreadable: If it cannot be opened.
    """
    table = read_table(path)
    columns = [table.column(name) for name in ("varname", "shape", "start_idx", "end_idx")]
    sizes = table.columns.get("size")
    variables = []
    for row, written in enumerate(zip(*columns, strict=True)):
        where = f"{display(path)}: line {table.lines[row]}, {written[0]!r}"
        variable = _variable(where, *written)
        size = variable.end - variable.start
        if prod(variable.shape) != size or (sizes and sizes[row].strip() != str(size)):
            also = f", size {sizes[row]}" if sizes else ""
            raise ZooError(
                f"{where}: columns {variable.start} to {variable.end} are {size} numbers, "
                f"expected those of shape {variable.shape}{also}. Get the file again."
            )
        variables.append(variable)
    variables.sort(key=lambda variable: variable.start)
    _check_filled(path, variables, width)
    return variables


def _variable(where: str, varname: str, shape: str, start: str, end: str) -> Variable:
    found = _VARIABLE.fullmatch(varname.strip())
    if not (_SHAPE.fullmatch(shape.strip()) and _INDEX.fullmatch(start) and _INDEX.fullmatch(end)):
        raise ZooError(
            f"{where}: expected a shape such as (3, 3, 1, 16) and whole columns, got {shape!r}, "
            f"{start!r} and {end!r}. Get the file again."
        )
    sizes = tuple(int(size) for size in re.findall(r"\d+", shape))
    if not found or (found[2], len(sizes)) not in _TO_TORCH:
        raise ZooError(
            f"{where} of shape {sizes}: expected kernels of 4 or 2 axes and biases of 1, named "
            "<layer>/kernel:0 and <layer>/bias:0. Export such networks as a folder of checkpoints."
        )
    return Variable(found[1], found[2], sizes, int(start), int(end))


def _check_filled(path: Path, variables: Sequence[Variable], width: int) -> None:
    """Check that variables follow each other, fill the row and have different names."""
    end = 0
    for variable in variables:
        if variable.start != end:
            kind = "a gap" if variable.start > end else "an overlap"
            raise ZooError(
                f"{display(path)}: {variable.name!r} starts at column {variable.start}, expected "
                f"{end}: there is {kind}. Get the file again."
            )
        end = variable.end
    if end != width:
        raise ZooError(
            f"{display(path)}: the variables end at column {end}, expected {width}, the width of "
            "weights.npy. Check that both files are of one zoo."
        )
    names = [variable.name for variable in variables]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ZooError(
            f"{display(path)}: expected each variable once, got several {repeated}. Rename layers."
        )


def gather(
    array: np.ndarray, rows: Sequence[int], variables: Sequence[Variable], *, drop_nonfinite: bool
) -> tuple[Weights, list[int]]:
    """Cut rows into stacked weights, a chunk of rows at a time.

    Args:
        array: Flattened networks ``[networks, p]``, float32; may be mapped into memory.
        rows: Rows to take, in this order.
        variables: What lies in which columns.
        drop_nonfinite: Leave out rows with NaN or infinite values instead of refusing them.

    Returns:
        float32 weights in torch's names, shapes and order of axes, every tensor ``[n, ...]``; and
        the n positions in ``rows`` that were kept.

    Raises:
        ZooError: If a row holds NaN or infinite values.
    """
    layers = [variable.layer for variable in variables]
    ordered = sorted(variables, key=lambda v: (layers.index(v.layer), v.kind == "bias"))
    weights = {v.name: torch.empty(len(rows), *v.torch_shape) for v in ordered}
    kept: list[int] = []
    for start in range(0, len(rows), _CHUNK):
        chosen = list(rows[start : start + _CHUNK])
        block = torch.from_numpy(np.array(array[chosen], dtype=np.float32))  # [chunk, p]
        finite = block.isfinite().all(1)  # [chunk]
        if not (drop_nonfinite or finite.all()):
            raise ZooError(
                f"weights.npy: row {chosen[int(finite.int().argmin())]} holds NaN or infinite "
                "values. drop_nonfinite=True leaves out all such networks."
            )
        found = [start + position for position in finite.nonzero().flatten().tolist()]
        for variable in ordered:
            flat = block[finite, variable.start : variable.end]
            part = flat.reshape(-1, *variable.shape).permute(variable.axes)
            weights[variable.name][len(kept) : len(kept) + len(found)] = part
        kept += found
    return {name: tensor[: len(kept)] for name, tensor in weights.items()}, kept
