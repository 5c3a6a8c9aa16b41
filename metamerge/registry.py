"""The register of merge methods: a signature is read once, and the function stays what it was.

What a method needs beside the members, its *resources*, it asks for by name; every other
keyword-only parameter is an option of the user's.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
    }
)
"""Everything that a method may ask for -> how a user gives it; a layout is program and spec."""


class _Required:
    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED = _Required()
"""Stands where an option has no default."""


@dataclass(frozen=True)
class MergeMethod:
    """What the signature of a merge method declares.

    Attributes:
        name: Name of the function, of its file, and in ``merge(..., method=name)``.
        function: The function, unchanged.
        paper: Where it is published, such as ``arXiv:2203.05482``; None if nowhere.
        resources: Names out of ``RESOURCES`` that it can use.
        required: Those of its resources that it cannot do without.
        options: Name of an option -> default, or ``REQUIRED``.
        summary: First line of its docstring.
        align: Alignment that members get where the user does not choose; None leaves them alone.
        ordered: Whether the order of the members means something to it.
    """

    name: str
    function: Callable[..., Weights]
    paper: str | None
    resources: frozenset[str]
    required: frozenset[str]
    options: Mapping[str, Any]
    summary: str
    align: str | None
    ordered: bool

    @property
    def aligned(self) -> bool:
        """Whether its members are aligned where the user does not choose."""
        return self.align is not None


_METHODS: dict[str, MergeMethod] = {}


def merge_method(
    paper: str | None = None, *, align: str | None = "weight_matching", ordered: bool = False
) -> Callable[[MethodFunction], MethodFunction]:
    """Register a function as a merge method.

    Args:
        paper: Where the method is published, such as ``arXiv:2203.05482``.
        align: Alignment that it wants by default; None for members as they are.
        ordered: Whether its result depends on the order of the members.

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

    def register(function: MethodFunction) -> MethodFunction:
        record = _read(function, paper, align, ordered)
        known = _METHODS.get(record.name)
        if known is not None and _origin(known.function) != _origin(function):
            raise ConfigError(
                f"{_origin(function)}: there is a merge method {record.name!r} already, "
                f"{_origin(known.function)}. Give one of the two another name."
            )
        _METHODS[record.name] = record
        return function

    return register


def list_methods() -> list[str]:
    """List the names of all merge methods, sorted.

    Returns:
        Names for ``merge(..., method=name)``.
    """
    import metamerge.methods  # noqa: F401  (registers the methods of this package)

    return sorted(_METHODS)


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


def bind(
    method: MergeMethod, resources: Mapping[str, Any], options: Mapping[str, Any]
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


def check_options(method: MergeMethod, options: Mapping[str, Any]) -> None:
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
    function: Callable[..., Weights], paper: str | None, align: str | None, ordered: bool
) -> MergeMethod:
    """Read the record of a method from its signature and docstring."""
    first, *rest = [*inspect.signature(function).parameters.values(), None]
    named = [parameter for parameter in rest if parameter is not None]
    if first is None or first.kind not in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD):
        raise ConfigError(
            f"{_origin(function)}: a merge method takes the members' weights as its only "
            f"positional parameter. Write `def {function.__name__}(weights, *, ...)`."
        )
    for parameter in named:
        if parameter.kind is not parameter.KEYWORD_ONLY:
            raise ConfigError(
                f"{_origin(function)}: parameter {str(parameter)!r} of a merge method must be "
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
    return MergeMethod(
        name=function.__name__,
        function=function,
        paper=paper,
        resources=resources,
        required=frozenset(name for name in resources if defaults[name] is REQUIRED),
        options=MappingProxyType({n: d for n, d in defaults.items() if n not in RESOURCES}),
        summary=summary,
        align=align,
        ordered=ordered,
    )


def _origin(function: Callable[..., Weights]) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def _suggestion(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    close = get_close_matches(str(name), list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _options_of(method: MergeMethod) -> str:
    if not method.options:
        return "It takes no options."
    told = ", ".join(
        name if default is REQUIRED else f"{name}={default!r}"
        for name, default in method.options.items()
    )
    return f"Its options: {told}."
