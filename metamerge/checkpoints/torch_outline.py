"""What a torch checkpoint describes, before any of it is made: blocks of memory and tensors."""

import pickle
from dataclasses import dataclass
from math import prod

import torch

from metamerge.errors import TooLarge, Unreadable

_MAX_AXES = 64


@dataclass(frozen=True)
class StorageOutline:
    """A block of memory that the file describes.

    Attributes:
        key: Name of its record in the file.
        numel: Number of elements.
        itemsize: Bytes per element.
    """

    key: str
    numel: int
    itemsize: int

    @property
    def nbytes(self) -> int:
        """Number of bytes of the block."""
        return self.numel * self.itemsize

    def viewed_as(self, dtype: torch.dtype) -> "StorageOutline":
        """Count the same block in elements of another dtype."""
        return StorageOutline(self.key, self.nbytes // dtype.itemsize, dtype.itemsize)


@dataclass(frozen=True, eq=False)
class TensorOutline:
    """A tensor that the file describes; ``odd`` says what it is where it is not a dense one."""

    odd: str | None = None


@dataclass(frozen=True)
class Outline:
    """What one pickle describes.

    Attributes:
        tree: The pickled object, with outlines in place of tensors.
        storages: The blocks of memory that its tensors need, by key.
    """

    tree: object
    storages: dict[str, StorageOutline]


def check_within(
    storage: StorageOutline, offset: int, shape: tuple, stride: tuple, where: str
) -> None:
    """Check that a dense tensor stays within its storage and is no larger than it.

    A tensor with stride 0 can be larger than its memory by any factor; torch makes it without
    complaint, and the first copy of it fills the machine.

    Args:
        storage: Memory of the tensor.
        offset: First element of the tensor in it.
        shape: Shape that the file claims.
        stride: Steps in elements, one per axis.
        where: File and tensor, for messages.

    Raises:
        TooLarge: If the tensor has more elements than its storage.
        Unreadable: If it reaches beyond the end of its storage.
        pickle.UnpicklingError: If the numbers are not those of a tensor.
    """
    require(len(shape) == len(stride) <= _MAX_AXES)
    reach = count(offset)
    for length, step in zip(shape, stride, strict=True):
        reach += (count(length) - 1) * count(step)
    numel = prod(shape)
    if numel > storage.numel:
        raise TooLarge(
            f"{where} of shape {tuple(shape)} claims {numel} elements, but its memory in the file "
            f"holds {storage.numel}. Save contiguous copies of expanded tensors."
        )
    if numel and reach >= storage.numel:
        raise Unreadable(
            f"{where} of shape {tuple(shape)} reaches beyond its memory in the file. Save it again."
        )


def count(value: object) -> int:
    """Pass on a number that is an integer and not negative.

    Args:
        value: Anything that a pickle can hold.

    Returns:
        The same number.

    Raises:
        pickle.UnpicklingError: If it is anything else.
    """
    require(type(value) is int and value >= 0)
    return value


def require(condition: bool) -> None:
    """Stop the reading of a pickle that is not one of torch.save.

    Args:
        condition: What must hold.

    Raises:
        pickle.UnpicklingError: If it does not.
    """
    if not condition:
        raise pickle.UnpicklingError
