"""The k-th largest magnitude of a long task vector, exactly, without sorting or copying it.

A sample brackets the value; one pass counts the entries beyond the bracket and takes out those
inside, a few in a hundred; the value is among them. Where the sample misled, or many entries are
equal, counts tell, and the slow way is left.

Shape comments: n entries of a piece, s of the sample.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import sqrt

import torch
from torch import Tensor

_PIECE = 2**18  # entries that stay in the cache
_SAMPLE = 2**16
_WIDTH = 6  # standard deviations of a rank in the sample; it misses once in a billion


def largest_magnitude(
    members: Sequence[Tensor], origins: Sequence[Tensor], rank: int, dtype: torch.dtype
) -> Tensor:
    """Find the magnitude of a given rank in the difference of two lists of tensors.

    Args:
        members: Tensors of one member, together one vector.
        origins: Those of its base, of the same shapes.
        rank: 1 for the largest magnitude, up to the number of entries.
        dtype: What the differences are computed in.

    Returns:
        The magnitude, without shape or gradient, in ``dtype``.
    """
    pairs = [
        (m.detach().reshape(-1), o.detach().reshape(-1))
        for m, o in zip(members, origins, strict=True)
    ]

    def magnitudes(step: int = 1) -> Iterator[Tensor]:
        for pair in pairs:
            vectors = (vector[::step] for vector in pair)
            for m, o in zip(*(v.split(_PIECE) for v in vectors), strict=True):
                yield (m.to(dtype) - o.to(dtype)).abs_()

    entries = sum(m.numel() for m, _ in pairs)
    if entries <= _PIECE:
        return _of_rank(magnitudes(), rank)
    return _bracketed(magnitudes, entries, rank)


def _bracketed(magnitudes: Callable[..., Iterable[Tensor]], entries: int, rank: int) -> Tensor:
    step = entries // _SAMPLE | 1  # odd, so that it does not follow rows of a power of two
    sample = torch.cat(list(magnitudes(step))).sort(descending=True).values  # [s]
    place = rank / entries * len(sample)
    margin = _WIDTH * sqrt(place * (1 - rank / entries)) + _WIDTH
    high = sample[max(0, int(place - margin))]
    low = sample[min(len(sample) - 1, int(place + margin))]
    above, inside = 0, []
    for piece in magnitudes():
        above += int((piece >= high).count_nonzero())
        inside.append(piece[(piece > low) & (piece < high)])
    between = sum(map(len, inside))
    if above < rank <= above + between:
        return _of_rank(inside, rank - above)
    bound = high if rank <= above else low  # perhaps there are many entries of this value
    counts = [(int((p > bound).sum()), int((p >= bound).sum())) for p in magnitudes()]
    if sum(more for more, _ in counts) < rank <= sum(least for _, least in counts):
        return bound.clone()
    return _of_rank(magnitudes(), rank)


def _of_rank(pieces: Iterable[Tensor], rank: int) -> Tensor:
    values = torch.cat(list(pieces))
    return values.kthvalue(len(values) - rank + 1).values
