"""Checks of options that several methods have; every message names method, option and value."""

from collections.abc import Sequence
from math import inf, isfinite
from numbers import Real
from typing import Any

from metamerge.errors import ConfigError


def check_number(method: str, option: str, value: Any, interval: str = "(-inf, inf)") -> None:
    """Refuse what is not a number of an interval.

    Args:
        method: Name of the method, for the message.
        option: Name of the option.
        value: What was given.
        interval: Such as ``(0, 1]``: without 0, with 1.

    Raises:
        ConfigError: If it is something else, or not in the interval.
    """
    low, high = (float(end) for end in interval[1:-1].split(","))
    number = isinstance(value, Real) and not isinstance(value, bool)
    if number and isfinite(value) and low < value < high:
        return
    ends = {low: interval[0] == "[", high: interval[-1] == "]"}
    if not (number and abs(value) < inf and ends.get(float(value), False)):
        raise ConfigError(f"{method}: {option} must be a number in {interval}, got {value!r}.")


def check_choice(method: str, option: str, value: Any, known: Sequence[Any]) -> None:
    """Refuse what is not one of several values.

    Args:
        method: Name of the method, for the message.
        option: Name of the option.
        value: What was given.
        known: What may be given.

    Raises:
        ConfigError: If it is something else; 0 and 1 are not taken for False and True.
    """
    if not any(type(value) is type(choice) and value == choice for choice in known):
        told = ", ".join(map(repr, known))
        raise ConfigError(f"{method}: {option} must be one of {told}, got {value!r}.")
