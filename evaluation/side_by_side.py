"""Seconds of several pieces of work, measured by turns, so that a busy machine is busy for all."""

import time
from collections.abc import Callable, Mapping

import torch


def fastest(works: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Time each piece of work; the fastest of its turns counts.

    Of a single thread it is processor time that is counted, which a busy machine stretches least.

    Args:
        works: Name -> work.
        repeats: Turns of each, after one that does not count.

    Returns:
        Name -> seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            start = _now()
            work()
            seconds[name].append(_now() - start)
    return {name: min(own[1:]) for name, own in seconds.items()}


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()
