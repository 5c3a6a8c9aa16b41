"""The zoos of modelzoos.cc: one folder per network, as Ray Tune leaves it.

Paper: Schuerholt et al., "Model Zoos: A Dataset of Diverse Populations of Neural Network Models",
NeurIPS 2022 Datasets and Benchmarks, arXiv:2209.14764. Later zoos of the same group (SANE,
arXiv:2406.09997) have the same layout::

    <zoo>/<trial>/params.json                        hyper-parameters
    <zoo>/<trial>/result.json                        one JSON object per line and epoch
    <zoo>/<trial>/checkpoint_000050/checkpoints      torch.save of the state dict

Images went in as the published generators make them: MNIST and USPS standardised by mean .1307
and deviation .3081, all others scaled to [-1, 1]; SVHN in grey and cut to its central 28 x 28, all
others resized to the input of their network.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from metamerge.checkpoints.opening import (
    MAX_JSON_BYTES,
    display,
    file_size,
    open_regular,
    parse_json_object,
    read_json_object,
)
from metamerge.errors import ConfigError, ZooError
from zoo.imports.population import (
    Population,
    check_request,
    dropped_note,
    fitting_network,
    listed,
    stack_files,
)
from zoo.imports.schuerholt_networks import published_network

RESULTS = {
    "train_loss": "train_loss",
    "train_acc": "train_accuracy",
    "val_loss": "validation_loss",
    "val_acc": "validation_accuracy",
    "test_loss": "test_loss",
    "test_acc": "test_accuracy",
}
PARAMS = {
    "optim::lr": "learning_rate",
    "optim::wd": "weight_decay",
    "optim::momentum": "momentum",
    "model::dropout": "dropout",
    "training::batchsize": "batch_size",
    "seed": "seed",
}
SAME = ("model::type", "model::channels_in", "model::nlin")
_NOT_MEASURED = -999  # what the zoos write for the training set before the first epoch
_CHECKPOINT = re.compile(r"checkpoint_(\d{1,9})")


@dataclass(frozen=True)
class _Trial:
    """One network: its folder, its hyper-parameters, and one of its epochs."""

    folder: Path
    params: dict
    epoch: int
    result: dict
    checkpoint: Path


def read(
    folder: str | os.PathLike[str],
    *,
    limit: int | None = None,
    epochs: int | Literal["last"] = "last",
    only: Mapping[str, object] | None = None,
    drop_nonfinite: bool = False,
) -> Population:
    """Read one checkpoint of every network of a zoo.

    Args:
        folder: Folder of the trials, such as ``tune_zoo_mnist_uniform``.
        limit: Largest number of networks; the first trials by name.
        epochs: After which epoch; ``"last"`` takes the last checkpoint of each trial.
        only: Take only trials whose ``params.json`` has these values, such as
            ``{"model::nlin": "tanh", "model::dropout": 0.0}``.
        drop_nonfinite: Leave out networks with NaN or infinite weights instead of refusing them.

    Returns:
        The population. Its network is known for the types CNN, CNN2 and CNN3.

    Raises:
        ConfigError: If ``limit`` or ``epochs`` makes no sense.
        ZooError: If there are no trials, the epoch or its results are missing, or trials differ
            in architecture.
        CheckpointError: If a file cannot be read safely and in full.
        IncompatibleWeights: If a tensor is of a kind that cannot be used.
    """
    root = check_request(folder, limit)
    if epochs != "last" and (isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 0):
        raise ConfigError(f"epochs must be 'last' or a number from 0, got {epochs!r}.")
    trials = [_trial(*found, epochs) for found in _selected(root, only or {}, limit)]
    _check_same(trials)
    weights, kept = stack_files(
        [trial.checkpoint for trial in trials],
        drop_nonfinite=drop_nonfinite,
        way_out="Pick one architecture with only=..., such as only={'model::dropout': 0.0}.",
    )
    notes = dropped_note(len(trials), len(kept))
    params, trials = trials[0].params, [trials[position] for position in kept]
    metrics = _metrics(trials)
    found = sorted({trial.epoch for trial in trials})
    if len(found) > 1:
        notes += (f"The last checkpoints are of several epochs: {listed(found)}.",)
    published, network, shape = published_network(params), None, None
    if isinstance(published, str):
        notes += (f"No network: {published}.",)
    else:
        network, misfit = fitting_network(published[0], weights)
        shape, notes = published[1] if network else None, notes + misfit
    names = tuple(trial.folder.name for trial in trials)
    return Population(names, weights, metrics, network, shape, notes)


def _selected(root: Path, only: Mapping[str, object], limit: int | None) -> list[tuple[Path, dict]]:
    """Find the trials with the wanted hyper-parameters, by name."""
    folders = sorted(
        path
        for path in root.iterdir()
        if (path / "params.json").exists() or (path / "result.json").exists()
    )
    found, seen = [], {key: set() for key in only}
    for path in folders:
        params = read_json_object(path / "params.json")
        for key in only:
            seen[key].add(repr(params.get(key)))
        if all(params.get(key) == value for key, value in only.items()):
            found.append((path, params))
        if len(found) == limit:
            break
    if not folders:
        raise ZooError(
            f"{display(root)}: expected a folder per network with params.json, result.json and "
            "checkpoint_<epoch>/checkpoints, got none. Unpack the zoo and give the folder of its "
            "trials, such as tune_zoo_mnist_uniform."
        )
    if not found:
        values = "; ".join(f"{key} is one of {', '.join(sorted(seen[key]))}" for key in seen)
        raise ZooError(f"{display(root)}: no trial has {dict(only)}; {values}. Change only=...")
    return found


def _trial(folder: Path, params: dict, epochs: int | Literal["last"]) -> _Trial:
    """Find the checkpoint and the results of one epoch."""
    found = {
        int(name[1]): path
        for path in sorted(folder.iterdir())
        if (name := _CHECKPOINT.fullmatch(path.name)) and (path / "checkpoints").exists()
    }
    wanted = max(found, default=None) if epochs == "last" else epochs
    if wanted not in found:
        raise ZooError(
            f"{display(folder)}: expected checkpoint_{'<epoch>' if wanted is None else wanted}/"
            f"checkpoints, got those of epochs {listed(sorted(found)) or 'none'}. Ask for one "
            "that all trials have, or move this trial away."
        )
    result = _result(folder / "result.json", wanted)
    return _Trial(folder, params, wanted, result, found[wanted] / "checkpoints")


def _result(path: Path, epoch: int) -> dict:
    """Read the results of one epoch; of a trial that was resumed, the later ones."""
    with open_regular(path) as file:
        if file_size(file) > MAX_JSON_BYTES:
            raise ZooError(f"{display(path)}: expected at most {MAX_JSON_BYTES} bytes of results.")
        lines = file.read(MAX_JSON_BYTES).splitlines()
    seen = []
    for number in range(len(lines), 0, -1):
        if lines[number - 1].strip():
            where = f"{display(path)}: line {number}"
            result = parse_json_object(lines[number - 1], where)
            seen.append(result.get("training_iteration"))
            if seen[-1] == epoch:
                return result
    raise ZooError(
        f"{display(path)}: expected a line with training_iteration {epoch}, got "
        f"{listed(seen[::-1])}. Ask for another epoch with epochs=..., or move this trial away."
    )


def _check_same(trials: Sequence[_Trial]) -> None:
    first = trials[0]
    for trial in trials[1:]:
        for key in SAME:
            expected, got = first.params.get(key), trial.params.get(key)
            if got != expected:
                raise ZooError(
                    f"{display(trial.folder / 'params.json')}: {key} is {got!r}, expected "
                    f"{expected!r} as in {display(first.folder)}. One population has one "
                    f"architecture: pick one with only={{{key!r}: {expected!r}}}."
                )


def _metrics(trials: Sequence[_Trial]) -> dict[str, Tensor]:
    """Read what any of the trials knows, under the names that all readers use."""
    columns = {"epoch": [float(trial.epoch) for trial in trials]}
    columns |= {name: [_number(t.result.get(key)) for t in trials] for key, name in RESULTS.items()}
    columns |= {name: [_number(t.params.get(key)) for t in trials] for key, name in PARAMS.items()}
    return {
        name: torch.tensor(values, dtype=torch.float64)
        for name, values in columns.items()
        if not all(map(math.isnan, values))
    }


def _number(value: object) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        return float(value) if is_number and value != _NOT_MEASURED else math.nan
    except OverflowError:
        return math.nan
