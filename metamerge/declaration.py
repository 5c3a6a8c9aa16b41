"""What a function declares by its signature: the resources it can use, and the options it has.

What a function needs beside the members, its *resources*, it asks for by name; every other
keyword-only parameter is an option of the user's. The signature is read once, and the function
stays what it was.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

from metamerge.errors import ConfigError

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
"""Everything that may be asked for -> how a user gives it; a layout is program and spec."""


class _Required:
    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED = _Required()
"""Stands where an option has no default."""


@dataclass(frozen=True)
class Record:
    """What a signature declares.

    Attributes:
        name: What users call it; that of the function and of its file.
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


def read_declaration(
    function: Callable[..., Any],
    paper: str | None,
    *,
    kind: str,
    positional: Sequence[str],
    name: str | None = None,
) -> dict[str, Any]:
    """Read what a signature and a docstring declare.

    Args:
        function: The function.
        paper: Where it is published.
        kind: What it is to be, such as ``merge method``, for messages.
        positional: What it has to take by position, in words; everything else it has to take by
            name.
        name: What users call it; by default the name of the function.

    Returns:
        The fields of ``Record``.

    Raises:
        ConfigError: If the signature is not of this form, or there is no docstring.
    """
    named = _named(function, kind, positional)
    summary = (inspect.getdoc(function) or "").partition("\n")[0]
    if not summary:
        raise ConfigError(
            f"{origin(function)} has no docstring. Give it one; its first line is what users see."
        )
    defaults = {
        p.name: REQUIRED if p.default is inspect.Parameter.empty else p.default for p in named
    }
    resources = frozenset(defaults) & frozenset(RESOURCES)
    return {
        "name": name or function.__name__,
        "function": function,
        "paper": paper,
        "resources": resources,
        "required": frozenset(n for n in resources if defaults[n] is REQUIRED),
        "options": MappingProxyType({n: d for n, d in defaults.items() if n not in RESOURCES}),
        "summary": summary,
    }


def bind(
    record: Record, resources: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Choose the keyword arguments that a function is called with.

    Args:
        record: What it declares.
        resources: Resource -> what is at hand; None counts as not there. Those that the function
            does not ask for are left out.
        options: The user's options.

    Returns:
        Arguments for ``record.function(..., **arguments)``.

    Raises:
        ConfigError: If an option is unknown or missing, or a resource that is required is.
    """
    check_options(record, options)
    given = {name: resources.get(name) for name in sorted(record.resources)}
    for name in given:
        if given[name] is None and name in record.required:
            raise ConfigError(f"{record.name} needs {name!r}: {RESOURCES[name]}.")
    return {**{name: value for name, value in given.items() if value is not None}, **options}


def check_options(record: Record, options: Mapping[str, Any]) -> None:
    """Check that a function has the options that a user gives, and gets those that it needs.

    Args:
        record: What it declares.
        options: The user's options.

    Raises:
        ConfigError: If an option is unknown or missing.
    """
    for name in options:
        if name not in record.options:
            raise ConfigError(
                f"{record.name} has no option {name!r}.{suggestion(name, record.options)} "
                f"{_options_of(record)}"
            )
    for name, default in record.options.items():
        if default is REQUIRED and name not in options:
            raise ConfigError(f"{record.name} needs the option {name!r}. {_options_of(record)}")


def origin(function: Callable[..., Any]) -> str:
    """Where a function is defined, as messages say it."""
    return f"{function.__module__}.{function.__qualname__}"


def suggestion(name: str, known: Iterable[str]) -> str:
    """Ask in a message whether the nearest of the known names was meant; nothing if none is near.

    Args:
        name: An unknown name.
        known: The known ones.

    Returns:
        A sentence with a blank in front of it, or nothing.
    """
    close = get_close_matches(str(name), list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _named(
    function: Callable[..., Any], kind: str, positional: Sequence[str]
) -> list[inspect.Parameter]:
    """The parameters that are passed by name; a signature of another form is refused."""
    article = f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
    parameters = list(inspect.signature(function).parameters.values())
    taken, named = parameters[: len(positional)], parameters[len(positional) :]
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if len(taken) < len(positional) or any(p.kind not in plain for p in taken):
        only = "its only positional parameter" if len(positional) == 1 else "positional parameters"
        first = "weights" if len(positional) == 1 else ", ".join(f"<{p}>" for p in positional)
        raise ConfigError(
            f"{origin(function)}: {article} takes {', '.join(positional)} as {only}. Write "
            f"`def {function.__name__}({first}, *, ...)`."
        )
    for parameter in named:
        if parameter.kind is not parameter.KEYWORD_ONLY:
            raise ConfigError(
                f"{origin(function)}: parameter {str(parameter)!r} of {article} must be "
                f"keyword-only. Write it behind a `*`, under a name of its own."
            )
    return named


def _options_of(record: Record) -> str:
    if not record.options:
        return "It takes no options."
    told = ", ".join(
        name if default is REQUIRED else f"{name}={default!r}"
        for name, default in record.options.items()
    )
    return f"Its options: {told}."
