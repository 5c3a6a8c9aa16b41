"""The Small CNN Zoo: all networks of a data set as rows of one array.

Paper: Unterthiner et al., "Predicting Neural Network Accuracy from Weights", 2020,
arXiv:2002.11448. A folder holds ``weights.npy`` ``[networks, p]``, ``metrics.csv`` or
``metrics.csv.gz`` with one row per row of weights, and ``layout.csv``.

All networks are three convolutions 3x3 with stride 2 and no padding (Keras' ``valid``), a global
mean and a dense layer. They were trained on grey images (mean of the colours) scaled to [-1, 1].
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from torch import nn

from metamerge.checkpoints.opening import display, open_regular
from metamerge.errors import ConfigError, ZooError
from metamerge.weights import Weights
from zoo.imports.population import (
    Population,
    check_request,
    dropped_note,
    fitting_network,
    listed,
)
from zoo.imports.tables import Table, numbers, read_table
from zoo.imports.tensorflow_layout import Variable, gather, read_layout

STRIDE = 2  # in neither table; the paper and train_network.py have no other
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "selu": nn.SELU,
}
SIDES = {"mnist": 28, "fashion_mnist": 28, "cifar10": 32, "svhn_cropped": 32}
_FLAGS = {"true": True, "false": False}


def read(
    folder: str | os.PathLike[str],
    *,
    limit: int | None = None,
    activation: str | None = None,
    step: int | Literal["last"] = "last",
    drop_nonfinite: bool = False,
) -> Population:
    """Read one checkpoint of every network of a data set.

    Args:
        folder: Folder of the three files.
        limit: Largest number of networks; the first rows.
        activation: Take only networks with this ``config.activation``, such as ``relu``.
        step: Epoch of the checkpoint; ``"last"`` takes the rows that ``laststep`` marks or, without
            such a column, the largest step of each ``modeldir``.
        drop_nonfinite: Leave out networks with NaN or infinite weights instead of refusing them.

    Returns:
        The population. Names are rows of the array; ``config.`` is dropped from metrics' names.

    Raises:
        ConfigError: If ``limit`` or ``step`` makes no sense.
        ZooError: If a file is damaged or contradicts another, if there are no such networks, or
            if they have several activations.
        Unreadable: If a file is missing.
    """
    root = check_request(folder, limit)
    if step != "last" and (isinstance(step, bool) or not isinstance(step, int) or step < 0):
        raise ConfigError(f"step must be 'last' or a number from 0, got {step!r}.")
    table = read_table(_plain_or_packed(root / "metrics.csv"))
    rows = _of_one_activation(table, _rows_at(table, step), activation)[:limit]
    array = _open_array(root / "weights.npy", len(table.lines))
    variables = read_layout(_plain_or_packed(root / "layout.csv"), array.shape[1])
    weights, kept = gather(array, rows, variables, drop_nonfinite=drop_nonfinite)
    notes = dropped_note(len(rows), len(kept))
    rows = [rows[position] for position in kept]
    if not rows:
        raise ZooError(f"{display(root)}: all chosen networks hold NaN or infinite weights.")
    found, left_out = table.metrics(rows, skip={"modeldir", "laststep"})
    short = {name: name.removeprefix("config.") for name in found}
    metrics = {name if short[name] in found else short[name]: found[name] for name in found}
    names = tuple(f"weights.npy[{row}]" for row in rows)
    network, misfit = _network(variables, table.column("config.activation")[rows[0]], weights)
    shape = _input_shape(table, rows, variables) if network else None
    return Population(names, weights, metrics, network, shape, notes + left_out + misfit)


def _plain_or_packed(path: Path) -> Path:
    packed = path.with_name(f"{path.name}.gz")
    return packed if packed.exists() and not path.exists() else path


def _rows_at(table: Table, step: int | Literal["last"]) -> list[int]:
    """Find the rows of one step, or of the last step of each network."""
    steps = numbers(table.column("step"))
    if steps is None or steps.isnan().any():
        raise ZooError(
            f"{display(table.path)}: expected a number in every row of column 'step', got others. "
            "Get the file again."
        )
    if step == "last":
        marked = "laststep" in table.columns
        rows = _marked(table, steps.tolist()) if marked else _largest(table, steps.tolist())
    else:
        rows = (steps == step).nonzero().flatten().tolist()
    if not rows:
        there = sorted(set(steps.tolist()))
        raise ZooError(
            f"{display(table.path)}: no row is at step {step!r}; there are steps {listed(there)}. "
            "Ask for one of them with step=..."
        )
    return rows


def _marked(table: Table, steps: Sequence[float]) -> list[int]:
    """Find the rows that ``laststep`` marks: True, or the number of the row's own step."""
    flags = [flag.strip().lower() for flag in table.column("laststep")]
    last = numbers(["" if flag in _FLAGS else flag for flag in flags])
    if last is None:
        raise ZooError(
            f"{display(table.path)}: column 'laststep' must hold True and False, or steps. Name "
            "a step with step=..."
        )
    own = [number == at for number, at in zip(last.tolist(), steps, strict=True)]
    return [row for row, flag in enumerate(flags) if _FLAGS.get(flag, own[row])]


def _largest(table: Table, steps: Sequence[float]) -> list[int]:
    """Find the row of the largest step of each network."""
    best: dict[str, int] = {}
    for row, network in enumerate(table.column("modeldir")):
        other = best.setdefault(network, row)
        if row != other and steps[row] == steps[other]:
            raise ZooError(
                f"{display(table.path)}: lines {table.lines[other]} and {table.lines[row]} are "
                f"both step {steps[row]:g} of {network!r}. Delete one of them and its weights."
            )
        if steps[row] > steps[other]:
            best[network] = row
    return sorted(best.values())


def _of_one_activation(table: Table, rows: list[int], activation: str | None) -> list[int]:
    """Keep the rows of one activation, and refuse to choose it."""
    column = table.column("config.activation")
    there = sorted({column[row] for row in rows})
    if activation is None and len(there) > 1:
        raise ZooError(
            f"{display(table.path)}: networks with activations {listed(there)}. One population "
            f"has one architecture: pick one with activation={there[0]!r}."
        )
    kept = [row for row in rows if activation in (None, column[row])]
    if not kept:
        raise ZooError(
            f"{display(table.path)}: no network has activation {activation!r}; there are "
            f"{listed(there)}. Pick one of them."
        )
    return kept


def _open_array(path: Path, networks: int) -> np.ndarray:
    """Map the array into memory, having seen that it is numbers and of the right length."""
    with open_regular(path):
        try:
            array = np.lib.format.open_memmap(path, mode="r")
        except (ValueError, EOFError, OverflowError, SyntaxError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise ZooError(
                f"{display(path)}: expected an array saved by numpy.save, whole and without "
                f"Python objects; it cannot be mapped ({reason}). Get the file again."
            ) from None
    if array.ndim != 2 or array.dtype.newbyteorder("=") != np.float32:
        raise ZooError(
            f"{display(path)}: expected float32 [networks, parameters], got {array.dtype} "
            f"{array.shape}. Convert it, one network per row."
        )
    if len(array) != networks:
        raise ZooError(
            f"{display(path)}: {len(array)} rows, the table of metrics has {networks}. Check that "
            "both files are of one data set."
        )
    return array


def _network(
    variables: Sequence[Variable], activation: str, weights: Weights
) -> tuple[Callable[[], nn.Module] | None, tuple[str, ...]]:
    """Rebuild the architecture, or say why the variables are not those of one."""
    kernels = [variable for variable in variables if variable.kind == "kernel"]
    ranks = [len(kernel.shape) for kernel in kernels]
    channels = [kernel.shape[-2:] for kernel in kernels]  # in, out
    chained = all(one[1] == other[0] for one, other in pairwise(channels))
    if activation not in ACTIVATIONS:
        reason = f"activation {activation!r} is none of {listed([*ACTIVATIONS])}"
        return None, (f"No network: {reason}.",)
    reserved = any(hasattr(nn.Sequential(), kernel.layer) for kernel in kernels)
    if len(ranks) < 2 or ranks != [4] * (len(ranks) - 1) + [2] or not chained or reserved:
        return None, ("No network: the layers are not convolutions and a last dense one.",)
    layers = tuple((kernel.layer, kernel.shape) for kernel in kernels)
    return fitting_network(partial(_small_cnn, layers, activation), weights)


def _small_cnn(layers: Sequence[tuple[str, tuple[int, ...]]], activation: str) -> nn.Module:
    """Build the network of kernels HWIO and in x out; dropout, idle in evaluation, is left out."""
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    for name, (*kernel, fan_in, fan_out) in layers[:-1]:
        modules[name] = nn.Conv2d(fan_in, fan_out, tuple(kernel), stride=STRIDE)
        modules[f"{name}_{activation}"] = ACTIVATIONS[activation]()
    dense, (fan_in, fan_out) = layers[-1]
    modules |= {"mean": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    modules[dense] = nn.Linear(fan_in, fan_out)
    return nn.Sequential(modules)


def _input_shape(
    table: Table, rows: Sequence[int], variables: Sequence[Variable]
) -> tuple[int, int, int] | None:
    """Find the size of the images, where all networks saw one data set that is known."""
    names = {
        table.columns["config.dataset"][row] for row in rows if "config.dataset" in table.columns
    }
    side = SIDES.get(names.pop()) if len(names) == 1 else None
    first = next(variable for variable in variables if variable.kind == "kernel")
    return None if side is None else (first.shape[-2], side, side)
