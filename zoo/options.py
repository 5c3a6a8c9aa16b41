"""Command lines from frozen dataclasses: one field is one option, its comment is its help text."""

import argparse
import difflib
import inspect
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from metamerge.errors import ConfigError, MetaMergeError
from zoo.memory import keep_freed_memory

Options = TypeVar("Options")


def parse(kind: type[Options], arguments: Sequence[str] | None = None, *, prog: str) -> Options:
    """Read a frozen dataclass from the command line.

    Args:
        kind: A dataclass whose fields are ``str``, ``int``, ``float``, ``bool``, tuples of one of
            these, or any of these or None.
        arguments: The command line without the program; by default that of this process.
        prog: How the command is called, for the help text.

    Returns:
        The options.

    Raises:
        SystemExit: On ``--help``, and with code 2 on an unknown option (with a suggestion) or a
            bad value.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} [--option value ...]",
        description=inspect.getdoc(kind),
        allow_abbrev=False,
    )
    hints, comments = get_type_hints(kind), _comments(kind)
    for field in fields(kind):
        _add(parser, field.name, hints[field.name], field.default, comments.get(field.name, ""))
    known, unknown = parser.parse_known_args(arguments)
    if unknown:
        names = [f"--{field.name.replace('_', '-')}" for field in fields(kind)]
        close = difflib.get_close_matches(unknown[0].split("=")[0], names, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        parser.error(f"unknown option {unknown[0]!r}.{hint} See --help for all of them.")
    try:
        return kind(**vars(known))
    except ConfigError as error:
        parser.error(str(error))


def command(kind: type[Options], work: Callable[[Options], object], *, prog: str) -> None:
    """Do what the command line asks for; what is wrong is told in a line, without a traceback.

    Args:
        kind: Options of the command; see ``parse``.
        work: What it does.
        prog: How it is called.

    Raises:
        SystemExit: If it fails, with the exit code of the error.
    """
    options = parse(kind, prog=prog)
    keep_freed_memory()
    try:
        work(options)
    except MetaMergeError as error:
        print(f"{prog.rpartition(' ')[2]}: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error


def words(given: Mapping[str, Any]) -> list[str]:
    """Options as words of a command line.

    Args:
        given: Name -> value, as ``parse`` gives them back; None is left out.

    Returns:
        The words.
    """
    found: list[str] = []
    for name, value in given.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            several = value if isinstance(value, tuple | list) else (value,)
            found += [f"--{flag}", *map(str, several)]
    return found


def changed(options: Any) -> dict[str, Any]:
    """Fields of a dataclass that have another value than the default, by name."""
    told = {field.name: (getattr(options, field.name), field.default) for field in fields(options)}
    return {name: value for name, (value, default) in told.items() if value != default}


def _add(parser: argparse.ArgumentParser, name: str, hint: Any, default: Any, comment: str) -> None:
    flag = f"--{name.replace('_', '-')}"
    needed = default is MISSING
    text = comment.replace("%", "%%") + ("" if needed else f" (default: {_shown(default)})")
    given: dict[str, Any] = {"help": text, "required": needed}
    if not needed:
        given["default"] = default
    hint = _given(hint)
    if get_origin(hint) is tuple:
        parser.add_argument(flag, type=get_args(hint)[0], nargs="+", action=_Tuple, **given)
    elif hint is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, **given)
    else:
        parser.add_argument(flag, type=hint, metavar=name.upper(), **given)


class _Tuple(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, tuple(values))


def _given(hint: Any) -> Any:
    """What a value is when it is given: the hint without its None."""
    if isinstance(hint, types.UnionType):
        return next(kind for kind in get_args(hint) if kind is not type(None))
    return hint


def _shown(default: Any) -> str:
    return " ".join(map(str, default)) or "none" if isinstance(default, tuple) else str(default)


def _comments(kind: type) -> dict[str, str]:
    """Field -> the comment behind it, from the source of the class."""
    found = re.findall(r"^\s+(\w+): [^#\n]+#\s*(.+)$", inspect.getsource(kind), re.MULTILINE)
    return dict(found)
