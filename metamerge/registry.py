"""The registers of merge methods, alignments and corrections; a signature is the declaration."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar

from metamerge.declaration import Record, read_declaration
from metamerge.errors import ConfigError
from metamerge.lookup import Register
from metamerge.weights import Weights

MethodFunction = TypeVar("MethodFunction", bound=Callable[..., Weights])


@dataclass(frozen=True)
class MergeMethod(Record):
    """A merge method.

    Attributes:
        align: Alignment that members get where the user does not choose; None leaves them alone.
        ordered: Whether the order of the members means something to it.
        elementwise: Whether it draws or chooses entry by entry, blind to units: permuting all
            members alike does not permute what comes out of it to the last bit.
        neutral: Options at which identical members come back as they are, whatever their base.
        per_tensor: Options at which what becomes of a tensor depends on that tensor only, so that
            files of any size can be merged tensor by tensor; None where there are none.
        pointwise: Whether at those options even an entry depends on the members' entries of its
            place only, so that tensors can be cut anywhere.
        most: Largest number of members that it takes; None for any number.
    """

    align: str | None = "weight_matching"
    ordered: bool = False
    elementwise: bool = False
    neutral: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    per_tensor: Mapping[str, Any] | None = None
    pointwise: bool = False
    most: int | None = None

    @property
    def aligned(self) -> bool:
        """Whether its members are aligned where the user does not choose."""
        return self.align is not None


@dataclass(frozen=True)
class Alignment(Record):
    """An alignment.

    Attributes:
        permutes: Whether it returns a ``Permutation`` of stacked families; otherwise it returns
            changed members, one state dict each.
        elastic: Whether members may differ in the widths of their hidden layers.
    """

    permutes: bool = True
    elastic: bool = False


_SEVERAL = "None, or one or several of"
_METHODS = Register[MergeMethod]("merge method", "method", "metamerge.methods")
_ALIGNMENTS = Register[Alignment]("alignment", "align", "metamerge.alignment", _SEVERAL)
_CORRECTIONS = Register[Record]("correction", "correct", "metamerge.corrections", _SEVERAL)


def merge_method(
    paper: str | None = None,
    *,
    align: str | None = "weight_matching",
    ordered: bool = False,
    elementwise: bool = False,
    neutral: Mapping[str, Any] = MappingProxyType({}),
    per_tensor: Mapping[str, Any] | None = None,
    pointwise: bool = False,
    most: int | None = None,
) -> Callable[[MethodFunction], MethodFunction]:
    """Register a function as a merge method.

    Args:
        paper: Where the method is published, such as ``arXiv:2203.05482``.
        align: Alignment that it wants by default; None for members as they are.
        ordered: Whether its result depends on the order of the members.
        elementwise: Whether it draws or chooses entry by entry, blind to units.
        neutral: Options at which identical members come back as they are.
        per_tensor: Options at which tensors do not depend on each other; None if they always do.
        pointwise: Whether at those options entries do not depend on each other either.
        most: Largest number of members that it takes; None for any number.

    Returns:
        A decorator that stores the method's record and returns the function unchanged.

    Raises:
        ConfigError: If the signature is not that of a merge method, or the name is taken.

    Examples:
        >>> from collections.abc import Sequence
        >>> @merge_method(paper="arXiv:2203.05482")
        ... def first(weights: Sequence[Weights], *, scale: float = 1.0) -> Weights:
        ...     "Take the first member, scaled."
        ...     return {key: scale * tensor for key, tensor in weights[0].items()}
        >>> get_method("first").options
        mappingproxy({'scale': 1.0})
        >>> _ = _METHODS.records.pop("first")
    """
    if callable(paper):
        raise ConfigError("merge_method takes arguments: write @merge_method() above the function.")
    tags = {
        "align": align,
        "ordered": ordered,
        "elementwise": elementwise,
        "neutral": MappingProxyType(dict(neutral)),
        "per_tensor": None if per_tensor is None else MappingProxyType(dict(per_tensor)),
        "pointwise": pointwise,
        "most": most,
    }

    def register(function: MethodFunction) -> MethodFunction:
        taken = ["the members' weights"]
        declared = read_declaration(function, paper, kind=_METHODS.kind, positional=taken)
        _METHODS.enter(MergeMethod(**declared, **tags))
        return function

    return register


def alignment(
    paper: str | None = None, *, permutes: bool = True, elastic: bool = False
) -> Callable[[MethodFunction], MethodFunction]:
    """Register a function as an alignment: ``function(weights, spec, *, <resources>, <options>)``.

    Args:
        paper: Where it is published.
        permutes: Whether it takes stacked families, every tensor ``[f, m, ...]``, and returns a
            ``Permutation``; otherwise it takes and returns members, one state dict each.
        elastic: Whether members may differ in the widths of their hidden layers.

    Returns:
        A decorator that stores the record and returns the function unchanged.
    """

    def register(function: MethodFunction) -> MethodFunction:
        taken = ["the members' weights", "their spec"]
        declared = read_declaration(function, paper, kind=_ALIGNMENTS.kind, positional=taken)
        _ALIGNMENTS.enter(Alignment(**declared, permutes=permutes, elastic=elastic))
        return function

    return register


def correction(paper: str | None = None) -> Callable[[MethodFunction], MethodFunction]:
    """Register a function that corrects fused weights on calibration inputs.

    Its form is ``function(fused, members, layout, inputs, *, labels=None, report=None, <options>)``
    with fused weights ``[f, ...]`` and aligned members ``[f, m, ...]``.

    Args:
        paper: Where it is published.

    Returns:
        A decorator that stores the record and returns the function unchanged.
    """

    def register(function: MethodFunction) -> MethodFunction:
        taken = ["fused weights", "members", "their layout", "inputs"]
        declared = read_declaration(function, paper, kind=_CORRECTIONS.kind, positional=taken)
        _CORRECTIONS.enter(Record(**declared))
        return function

    return register


def list_methods() -> list[str]:
    """List the names of all merge methods for ``merge(..., method=name)``, sorted."""
    return _METHODS.names()


def list_alignments() -> list[str]:
    """List the names of all alignments for ``merge(..., align=name)``, sorted."""
    return _ALIGNMENTS.names()


def list_corrections() -> list[str]:
    """List the names of all corrections for ``merge(..., correct=name)``, sorted."""
    return _CORRECTIONS.names()


def get_method(name: str) -> MergeMethod:
    """Look up a merge method.

    Args:
        name: One of ``list_methods()``.

    Returns:
        Its record.

    Raises:
        ConfigError: If there is no such method; suggests what could have been meant.
    """
    return _METHODS.get(name)


def get_alignment(name: str) -> Alignment:
    """Look up an alignment.

    Args:
        name: One of ``list_alignments()``.

    Returns:
        Its record.

    Raises:
        ConfigError: If there is no such alignment; suggests what could have been meant.
    """
    return _ALIGNMENTS.get(name)


def get_correction(name: str) -> Record:
    """Look up a correction.

    Args:
        name: One of ``list_corrections()``.

    Returns:
        Its record.

    Raises:
        ConfigError: If there is no such correction; suggests what could have been meant.
    """
    return _CORRECTIONS.get(name)
