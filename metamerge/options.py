"""Checks of the options of methods, alignments, corrections and ensembles, in one wording.

Every message names whose option it is, the option, what was expected and what was given.
"""

from collections.abc import Sequence
from numbers import Real
from typing import Any

from metamerge.errors import ConfigError


def check_number(
    where: str, option: str, value: Any, interval: str = "(-inf, inf)", *, none: str | None = None
) -> None:
    """Refuse what is not a number of an interval.

    Args:
        where: Name of what has the option, for the message.
        option: Name of the option.
        value: What was given.
        interval: Such as ``(0, 1]``: without 0, with 1; ``(0, inf]`` is with infinity.
        none: What None does, such as ``to have it chosen``, where None may be given.

    Raises:
        ConfigError: If it is something else, or not in the interval.

    Examples:
        >>> check_number("ties", "density", 0.2, "(0, 1]")
        >>> check_number("ties", "density", 0, "(0, 1]")
        Traceback (most recent call last):
        metamerge.errors.ConfigError: ties: density must be a number in (0, 1], got 0.
    """
    if value is None and none is not None:
        return
    low, high = (float(end) for end in interval[1:-1].split(","))
    ends = {low: interval[0] == "[", high: interval[-1] == "]"}
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not (number and (low < value < high or ends.get(value, False))):
        _refuse(where, option, value, f"a number in {interval}", none)


def check_count(
    where: str,
    option: str,
    value: Any,
    least: int = 0,
    most: int | None = None,
    *,
    limit: str = "",
    none: str | None = None,
) -> None:
    """Refuse what is not a whole number of a range.

    Args:
        where: Name of what has the option, for the message.
        option: Name of the option.
        value: What was given.
        least: The smallest that may be given.
        most: The largest that may be given; None for any.
        limit: What ``most`` is, such as ``the number of members``.
        none: What None does, such as ``to have it chosen``, where None may be given.

    Raises:
        ConfigError: If it is something else, or out of the range; 2.0 is no whole number here.

    Examples:
        >>> check_count("cluster", "clusters", 2, 1, 3, limit="the number of members")
        >>> check_count("sinkhorn", "steps", 0, 1)
        Traceback (most recent call last):
        metamerge.errors.ConfigError: sinkhorn: steps must be a whole number of at least 1, got 0.
    """
    if value is None and none is not None:
        return
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not (whole and least <= value and (most is None or value <= most)):
        last = f"{limit}, {most}" if limit else f"{most}"
        span = f"of at least {least}" if most is None else f"from {least} to {last}"
        _refuse(where, option, value, f"a whole number {span}", none)


def check_choice(where: str, option: str, value: Any, known: Sequence[Any]) -> None:
    """Refuse what is not one of several values.

    Args:
        where: Name of what has the option, for the message.
        option: Name of the option.
        value: What was given.
        known: What may be given, with None if that may be.

    Raises:
        ConfigError: If it is something else; 0 and 1 are not taken for False and True.
    """
    if not any(isinstance(value, type(choice)) and value == choice for choice in known):
        _refuse(where, option, value, f"one of {', '.join(map(repr, known))}")


def _refuse(where: str, option: str, value: Any, expected: str, none: str | None = None) -> None:
    other = "" if none is None else f", or None {none}"
    raise ConfigError(f"{where}: {option} must be {expected}{other}, got {value!r}.")
