"""What an error says about a name that is not known."""

import difflib
from collections.abc import Sequence

_MOST_NAMES = 40


def suggest(name: object, known: Sequence[str]) -> str:
    """End a message about an unknown name with the nearest known one and all of them."""
    lowered = {each.lower(): each for each in known}
    near = difflib.get_close_matches(str(name).lower(), lowered, n=1)
    guess = f", did you mean {lowered[near[0]]!r}?" if near else "."
    more = f" and {len(known) - _MOST_NAMES} more" if len(known) > _MOST_NAMES else ""
    return f"{guess} There are: {', '.join(known[:_MOST_NAMES])}{more}."
