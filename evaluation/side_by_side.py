"""Seconds of several pieces of work, measured by turns, so that a busy machine is busy for all."""

import time
from collections.abc import Callable, Mapping


def fastest(works: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Time each piece of work; the fastest of its turns counts.

    Args:
        works: Name -> work.
        repeats: Turns of each, after one that does not count.

    Returns:
        Name -> seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            clock = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - clock)
    return {name: min(own[1:]) for name, own in seconds.items()}
