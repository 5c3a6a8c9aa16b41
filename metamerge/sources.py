"""What users pass to ``merge()``: checkpoints, a base, a merger, a device; read and checked."""

import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from metamerge.checkpoints import Checkpoint, Source, read_checkpoints
from metamerge.errors import ConfigError
from metamerge.mergers import bundled_merger, load_merger
from metamerge.weights import Weights, check_compatible, check_finite, strip_wrappers


class Members(NamedTuple):
    """The members of a merge.

    Attributes:
        sources: What the caller passed, one by one; modules among them say what network it is.
        checkpoints: What was read from them.
        named: Pairs of a member's name and its weights, in names that all of them share.
    """

    sources: list[Any]
    checkpoints: list[Checkpoint]
    named: list[tuple[str, Weights]]


def read_members(checkpoints: Any, *, elastic: bool = False) -> Members:
    """Read checkpoints and check that they can be merged.

    Args:
        checkpoints: One source, or an iterable of several; see ``merge``.
        elastic: Whether members may differ in their widths.

    Returns:
        The members.

    Raises:
        ConfigError: If there is none.
        CheckpointError: If one cannot be read, is unsafe or holds NaN.
        IncompatibleWeights: If the members differ in keys or shapes.
    """
    sources = _listed(checkpoints)
    found = [member for source in sources for member in read_checkpoints(source)]
    named = strip_wrappers([(member.name, member.weights) for member in found])
    check_compatible(named, widths=not elastic)
    for index, (name, weights) in enumerate(named):
        check_finite(f"checkpoints[{index}] ({name})", weights)
    return Members(sources, found, named)


def read_base(base: Source | None, named: list[tuple[str, Weights]]) -> Weights | None:
    """Read the checkpoint that members were fine-tuned from.

    Args:
        base: Where it is; None for none.
        named: Pairs of a member's name and its weights, which it has to fit.

    Returns:
        Its weights.

    Raises:
        IncompatibleWeights: If it differs from the members in keys or shapes.
    """
    if base is None:
        return None
    found = read_checkpoints(base)[0]
    pair = strip_wrappers([named[0], (f"base, {found.name}", found.weights)])
    check_compatible(pair)
    check_finite(*pair[1])
    return pair[1][1]


def read_merger(merger: Any, method: str) -> Any:
    """Read a trained merger.

    Args:
        merger: Its folder; None for the one of the package, where the method takes it; anything
            else is passed through.
        method: The method that it is for.

    Returns:
        The merger.
    """
    if merger is None and method == "gnn":
        return bundled_merger()
    if isinstance(merger, str | os.PathLike):
        return load_merger(merger)
    return merger


def choose_device(device: str) -> torch.device:
    """Choose where to compute.

    Args:
        device: ``"cpu"``, ``"cuda"``, or ``"auto"`` for a GPU where there is one.

    Returns:
        The device.

    Raises:
        ConfigError: If it is unknown, or not there.
    """
    there = torch.cuda.is_available()
    if device == "auto":
        return torch.device("cuda" if there else "cpu")
    kind = str(device).partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"device: got {device!r}, expected 'auto', 'cpu' or 'cuda'.")
    if kind == "cuda" and not there:
        raise ConfigError(f"device: got {device!r}, but torch sees no GPU here. Use 'cpu'.")
    return torch.device(device)


def _listed(checkpoints: Any) -> list[Any]:
    """One source stands for itself; anything else that can be walked through holds sources."""
    if isinstance(checkpoints, str | os.PathLike | nn.Module | Mapping | Checkpoint):
        return [checkpoints]
    advice = "Pass at least one path, state dict or module."
    if not isinstance(checkpoints, Iterable):
        raise ConfigError(f"checkpoints: got {checkpoints!r}. {advice}")
    sources = list(checkpoints)
    if not sources:
        raise ConfigError(f"checkpoints: got none. {advice}")
    return sources
