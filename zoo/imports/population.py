"""What every reader gives back: many networks of one architecture, stacked, and what is known."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from metamerge.checkpoints import read_checkpoints
from metamerge.checkpoints.opening import display
from metamerge.errors import ConfigError, NonFinite, ZooError
from metamerge.weights import Weights, check_finite

LISTED = 10
ONE_ARCHITECTURE = (
    "One population has one architecture: keep other networks in a folder of their own."
)


@dataclass(frozen=True, eq=False)
class Population:
    """Networks of one architecture, as somebody else trained them.

    Attributes:
        names: Where each of the n networks came from, within its folder.
        weights: Stacked state dicts, every tensor ``[n, ...]``.
        metrics: What is known of each network, float64 ``[n]``, NaN where unknown.
        network: Factory of the architecture, whose state dict has the names and shapes of
            ``weights``; None where the layout does not say it.
        input_shape: Shape of one input, without batch; None where the layout does not say it.
        notes: What a reader left out or had to choose, one sentence each.
    """

    names: tuple[str, ...]
    weights: Weights
    metrics: dict[str, Tensor]
    network: Callable[[], nn.Module] | None
    input_shape: tuple[int, ...] | None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse names, weights and metrics of different lengths.

        Raises:
            ZooError: If there is no network, or a tensor does not have one row per name.
        """
        n = len(self.names)
        if n == 0 or not self.weights:
            raise ZooError(f"Population: {n} networks of {len(self.weights)} tensors. Give some.")
        for key, tensor in self.weights.items():
            if tensor.shape[:1] != (n,):
                raise ZooError(
                    f"Population: weights {key!r} have shape {tuple(tensor.shape)}, expected "
                    f"({n}, ...) for {n} names."
                )
        for key, values in self.metrics.items():
            if values.shape != (n,) or values.dtype != torch.float64:
                raise ZooError(
                    f"Population: metric {key!r} is {values.dtype} {tuple(values.shape)}, "
                    f"expected torch.float64 ({n},)."
                )


def check_request(folder: str | os.PathLike[str], limit: int | None) -> Path:
    """Check what all readers are asked for.

    Args:
        folder: Folder of a zoo.
        limit: Largest number of networks, or None.

    Returns:
        The folder.

    Raises:
        ConfigError: If ``limit`` is no number of networks.
        ZooError: If there is no such folder.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ConfigError(f"limit must be a number of networks from 1, or None; got {limit!r}.")
    path = Path(folder)
    if not path.is_dir() or not os.access(path, os.R_OK | os.X_OK):
        raise ZooError(f"{display(path)}: expected a folder that can be read. Check the path.")
    return path


def stack_files(
    files: Sequence[Path], *, drop_nonfinite: bool = False, way_out: str = ONE_ARCHITECTURE
) -> tuple[Weights, list[int]]:
    """Read one network per file into tensors that are allocated once.

    Args:
        files: Checkpoints, at least one; pickles are judged before they are read and never run.
        drop_nonfinite: Leave out networks with NaN or infinite weights instead of refusing them.
        way_out: What to do about files that hold another architecture, for messages.

    Returns:
        Weights in the names, order and dtypes of the first file, every tensor ``[n, ...]``; and
        the n positions in ``files`` that were kept.

    Raises:
        ZooError: If a file differs from the first one in names, shapes or dtypes, holds weights
            that are not finite, or if not all fit into memory.
        CheckpointError: If a file cannot be read safely and in full.
        IncompatibleWeights: If a tensor is of a kind that cannot be used.
    """
    stacked: Weights = {}
    kept: list[int] = []
    for position, path in enumerate(files):
        weights = read_checkpoints(path)[0].weights
        stacked = stacked or _allocate(weights, len(files), path)
        difference = _difference(weights, stacked)
        if difference:
            expected = f"as in {display(files[0])}"
            raise ZooError(f"{display(path)}: {difference}, {expected}. {way_out}")
        if _usable(display(path), weights, drop_nonfinite):
            for name, tensor in weights.items():
                stacked[name][len(kept)] = tensor
            kept.append(position)
    if not kept:
        raise ZooError(
            f"{display(files[0].parent)}: all {len(files)} networks hold NaN or infinite weights. "
            "Take them from before their training diverged."
        )
    return {name: tensor[: len(kept)] for name, tensor in stacked.items()}, kept


def dropped_note(found: int, kept: int) -> tuple[str, ...]:
    """Say how many networks were left out for weights that are not finite.

    Args:
        found: Number of networks that were looked at.
        kept: Number of networks in the population.

    Returns:
        No or one note.
    """
    left_out = f"{found - kept} of {found} networks left out: weights that are not finite."
    return (left_out,) if kept < found else ()


def fitting_network(
    factory: Callable[[], nn.Module], weights: Weights
) -> tuple[Callable[[], nn.Module] | None, tuple[str, ...]]:
    """Give back a factory only where its networks can hold the weights.

    Args:
        factory: Makes a network; run once, on no memory.
        weights: Stacked weights, every tensor ``[n, ...]``.

    Returns:
        The factory or None, and a note where it is None.
    """
    with torch.device("meta"):  # neither memory nor random numbers are used up
        expected = factory().state_dict()
    members = {name: tensor[0] for name, tensor in weights.items()}
    difference = _difference(members, {name: t.unsqueeze(0) for name, t in expected.items()})
    if difference is None:
        return factory, ()
    return None, (f"No network: the weights are not those of the published one ({difference}).",)


def listed(names: Sequence[object]) -> str:
    """Join names for a message, the first ten of them.

    Args:
        names: What to list.

    Returns:
        Their representations, separated by commas.
    """
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(repr(name) for name in names[:LISTED]) + more


def _allocate(weights: Weights, n: int, path: Path) -> Weights:
    try:
        return {key: tensor.new_empty(n, *tensor.shape) for key, tensor in weights.items()}
    except RuntimeError:
        size = sum(tensor.nbytes for tensor in weights.values())
        raise ZooError(
            f"{display(path)}: {n} networks of {size} bytes do not fit into memory. Read fewer of "
            "them with limit=..."
        ) from None


def _difference(weights: Weights, stacked: Weights) -> str | None:
    """Say how a network differs from stacked ones; None if it does not."""
    missing = [name for name in stacked if name not in weights]
    extra = [name for name in weights if name not in stacked]
    parts = {"misses": missing, "adds": extra}
    if missing or extra:
        found = " and ".join(f"{verb} {listed(names)}" for verb, names in parts.items() if names)
        return f"{found}, expected the same names"
    for name, tensor in weights.items():
        shape, expected = tuple(tensor.shape), tuple(stacked[name].shape[1:])
        if shape != expected:
            return f"{name!r} has shape {shape}, expected {expected}"
        if tensor.dtype != stacked[name].dtype:
            return f"{name!r} has dtype {tensor.dtype}, expected {stacked[name].dtype}"
    return None


def _usable(name: str, weights: Weights, drop_nonfinite: bool) -> bool:
    try:
        check_finite(name, weights)
    except NonFinite as error:
        if drop_nonfinite:
            return False
        raise ZooError(f"{error} drop_nonfinite=True leaves out all such networks.") from None
    return True
