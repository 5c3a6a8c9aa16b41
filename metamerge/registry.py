"""The registers of merge methods, alignments and corrections: a signature is the declaration.

It is read once, and the function stays what it was. What a function needs beside the members, its
*resources*, it asks for by name; every other keyword-only parameter is an option of the user's.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, TypeVar

from metamerge.errors import ConfigError
from metamerge.weights import Weights

MethodFunction = TypeVar("MethodFunction", bound=Callable[..., Weights])

RESOURCES: Mapping[str, str] = MappingProxyType(
    {
        "base": "pass base=<the checkpoint that the members were fine-tuned from>",
        "layout": "pass model=<an nn.Module of the members' architecture>",
        "batches": "pass batches=<calibration inputs, or (inputs, labels) pairs>",
        "generator": "pass seed=<a whole number>",
        "merger": "train one with `accelerate launch trainers/merger.py` and pass merger=<folder>",
        "labels": "pass batches=<(inputs, labels) pairs>",
        "report": "pass report=<a dict that takes what was chosen and why>",
    }
)
"""Everything that a method may ask for -> how a user gives it; a layout is program and spec."""


class _Required:
    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED = _Required()
"""Stands where an option has no default."""


@dataclass(frozen=True)
class Record:
    """What the signature of a merge method, an alignment or a correction declares.

    Attributes:
        name: Name of the function, of its file, and in ``merge(...)``.
        function: The function, unchanged.
        paper: Where it is published, such as ``arXiv:2203.05482``; None if nowhere.
        resources: Names out of ``RESOURCES`` that it can use.
        required: Those of its resources that it cannot do without.
        options: Name of an option -> default, or ``REQUIRED``.
        summary: First line of its docstring.
    """

    name: str
    function: Callable[..., Any]
    paper: str | None
    resources: frozenset[str]
    required: frozenset[str]
    options: Mapping[str, Any]
    summary: str


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


_METHODS: dict[str, MergeMethod] = {}
_ALIGNMENTS: dict[str, Alignment] = {}
_CORRECTIONS: dict[str, Record] = {}


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
        >>> @merge_method(paper="arXiv:2203.05482")
        ... def first(weights: Sequence[Weights], *, scale: float = 1.0) -> Weights:
        ...     "Take the first member, scaled."
        ...     return {key: scale * tensor for key, tensor in weights[0].items()}
        >>> get_method("first").options
        mappingproxy({'scale': 1.0})
        >>> _ = _METHODS.pop("first")
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
        declared = _read(function, paper, "merge method", ["the members' weights"])
        _enter(_METHODS, MergeMethod(**declared, **tags), "merge method")
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
        declared = _read(function, paper, "alignment", ["the members' weights", "their spec"])
        record = Alignment(**declared, permutes=permutes, elastic=elastic)
        _enter(_ALIGNMENTS, record, "alignment")
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
    taken = ["fused weights", "members", "their layout", "inputs"]

    def register(function: MethodFunction) -> MethodFunction:
        _enter(_CORRECTIONS, Record(**_read(function, paper, "correction", taken)), "correction")
        return function

    return register


def list_methods() -> list[str]:
    """List the names of all merge methods, sorted.

    Returns:
        Names for ``merge(..., method=name)``.
    """
    import metamerge.methods  # noqa: F401  (registers the methods of this package)

    return sorted(_METHODS)


def list_alignments() -> list[str]:
    """List the names of all alignments, sorted.

    Returns:
        Names for ``merge(..., align=name)``.
    """
    import metamerge.alignment  # noqa: F401

    return sorted(_ALIGNMENTS)


def list_corrections() -> list[str]:
    """List the names of all corrections, sorted.

    Returns:
        Names for ``merge(..., correct=name)``.
    """
    import metamerge.corrections  # noqa: F401

    return sorted(_CORRECTIONS)


def get_method(name: str) -> MergeMethod:
    """Look up a merge method.

    Args:
        name: One of ``list_methods()``.

    Returns:
        Its record.

    Raises:
        ConfigError: If there is no such method; suggests what could have been meant.
    """
    known = list_methods()
    if name not in known:
        raise ConfigError(
            f"There is no merge method {name!r}.{_suggestion(name, known)} "
            f"Methods: {', '.join(known)}."
        )
    return _METHODS[name]


def get_alignment(name: str) -> Alignment:
    """Look up an alignment.

    Args:
        name: One of ``list_alignments()``.

    Returns:
        Its record.

    Raises:
        ConfigError: If there is no such alignment; suggests what could have been meant.
    """
    return _ALIGNMENTS[_known("align", name, list_alignments())]


def get_correction(name: str) -> Record:
    """Look up a correction.

    Args:
        name: One of ``list_corrections()``.

    Returns:
        Its record.

    Raises:
        ConfigError: If there is no such correction; suggests what could have been meant.
    """
    return _CORRECTIONS[_known("correct", name, list_corrections())]


def _known(argument: str, name: str, known: Sequence[str]) -> str:
    if name not in known:
        raise ConfigError(
            f"{argument}: got {name!r}.{_suggestion(name, known)} Expected None, or one or several "
            f"of {', '.join(map(repr, known))}."
        )
    return name


def _enter(register: dict[str, Any], record: Record, kind: str) -> None:
    known = register.get(record.name)
    if known is not None and _origin(known.function) != _origin(record.function):
        raise ConfigError(
            f"{_origin(record.function)}: there is a {kind} {record.name!r} already, "
            f"{_origin(known.function)}. Give one of the two another name."
        )
    register[record.name] = record


def bind(
    method: Record, resources: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Choose the keyword arguments that a method is called with.

    Args:
        method: The method.
        resources: Resource -> what is at hand; None counts as not there. Those that the method does
            not ask for are left out.
        options: The user's options.

    Returns:
        Arguments for ``method.function(weights, **arguments)``.

    Raises:
        ConfigError: If an option is unknown or missing, or a resource that the method requires is.
    """
    check_options(method, options)
    given = {name: resources.get(name) for name in sorted(method.resources)}
    for name in given:
        if given[name] is None and name in method.required:
            raise ConfigError(f"{method.name} needs {name!r}: {RESOURCES[name]}.")
    return {**{name: value for name, value in given.items() if value is not None}, **options}


def check_options(method: Record, options: Mapping[str, Any]) -> None:
    """Check that a method has the options that a user gives, and gets those that it needs.

    Args:
        method: The method.
        options: The user's options.

    Raises:
        ConfigError: If an option is unknown or missing.
    """
    for name in options:
        if name not in method.options:
            raise ConfigError(
                f"{method.name} has no option {name!r}.{_suggestion(name, method.options)} "
                f"{_options_of(method)}"
            )
    for name, default in method.options.items():
        if default is REQUIRED and name not in options:
            raise ConfigError(f"{method.name} needs the option {name!r}. {_options_of(method)}")


def _read(
    function: Callable[..., Any], paper: str | None, kind: str, positional: Sequence[str]
) -> dict[str, Any]:
    """Read what a signature and a docstring declare: the fields of ``Record``."""
    parameters = list(inspect.signature(function).parameters.values())
    taken, named = parameters[: len(positional)], parameters[len(positional) :]
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if len(taken) < len(positional) or any(p.kind not in plain for p in taken):
        only = "its only positional parameter" if len(positional) == 1 else "positional parameters"
        first = "weights" if len(positional) == 1 else ", ".join(f"<{p}>" for p in positional)
        raise ConfigError(
            f"{_origin(function)}: {_article(kind)} takes {', '.join(positional)} as {only}. Write "
            f"`def {function.__name__}({first}, *, ...)`."
        )
    for parameter in named:
        if parameter.kind is not parameter.KEYWORD_ONLY:
            raise ConfigError(
                f"{_origin(function)}: parameter {str(parameter)!r} of {_article(kind)} must be "
                f"keyword-only. Write it behind a `*`, under a name of its own."
            )
    summary = (inspect.getdoc(function) or "").partition("\n")[0]
    if not summary:
        raise ConfigError(
            f"{_origin(function)} has no docstring. Give it one; its first line is what users see."
        )
    defaults = {
        p.name: REQUIRED if p.default is inspect.Parameter.empty else p.default for p in named
    }
    resources = frozenset(defaults) & frozenset(RESOURCES)
    return {
        "name": function.__name__,
        "function": function,
        "paper": paper,
        "resources": resources,
        "required": frozenset(name for name in resources if defaults[name] is REQUIRED),
        "options": MappingProxyType({n: d for n, d in defaults.items() if n not in RESOURCES}),
        "summary": summary,
    }


def _article(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def _origin(function: Callable[..., Weights]) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def _suggestion(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    close = get_close_matches(str(name), list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _options_of(method: Record) -> str:
    if not method.options:
        return "It takes no options."
    told = ", ".join(
        name if default is REQUIRED else f"{name}={default!r}"
        for name, default in method.options.items()
    )
    return f"Its options: {told}."
