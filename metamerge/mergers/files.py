"""Trained mergers on disk: ``model.safetensors`` and ``manifest.json`` in a folder of their own."""

import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

from metamerge.checkpoints import Checkpoint, read_checkpoints, save_checkpoint
from metamerge.checkpoints.mlflow_models import is_mlflow_address
from metamerge.errors import ConfigError, IncompatibleWeights, Unreadable
from metamerge.mergers.autoencoder import AutoencoderConfig, AutoencoderMerger
from metamerge.mergers.gnn import GNNConfig, GNNMerger

Merger = GNNMerger | AutoencoderMerger
"""A merger of any kind."""

KINDS = {"gnn": (GNNConfig, GNNMerger), "autoencoder": (AutoencoderConfig, AutoencoderMerger)}
LATER = {"start", "spare"}  # of a configuration: mergers without them did what is the default now
BUNDLED = Path(__file__).parent / "bundled"


def save_merger(merger: Merger, folder: str | os.PathLike[str], card: Mapping[str, Any]) -> Path:
    """Write a merger, replacing an older one only when the new one is complete.

    Args:
        merger: The trained merger.
        folder: Where it shall lie.
        card: What a reader wants to know: data, options, seeds, figures.

    Returns:
        The folder.
    """
    kind = next(name for name, (_, made) in KINDS.items() if type(merger) is made)
    metadata = {"kind": kind, "config": asdict(merger.config), "card": dict(card)}
    return save_checkpoint(merger.state_dict(), folder, metadata=metadata, overwrite=True)


def load_merger(folder: str | os.PathLike[str]) -> Merger:
    """Read a merger that ``save_merger`` wrote.

    Args:
        folder: Its folder, or its address in MLflow.

    Returns:
        The merger, in eval mode, on the CPU.

    Raises:
        ConfigError: If there is no merger at that place.
        Unreadable: If the folder holds something else.
        IncompatibleWeights: If the weights are not those of the configuration.
    """
    checkpoint = _read(folder)
    try:
        merger = _blank(*KINDS[checkpoint.metadata["kind"]], checkpoint.metadata["config"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise Unreadable(
            f"{os.fspath(folder)}: its configuration is not that of a merger ({error}). Train it "
            "again, or use the version of metamerge that wrote it."
        ) from error
    try:
        merger.load_state_dict(checkpoint.weights)
    except RuntimeError as error:
        raise IncompatibleWeights(f"{os.fspath(folder)}: {error}") from error
    return merger.eval()


@cache
def bundled_merger() -> Merger:
    """The merger that comes with the package, see ``docs/mergers.md``; do not change it.

    Returns:
        The merger, in eval mode, on the CPU.
    """
    return load_merger(BUNDLED)


def read_card(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The card that was saved with a merger.

    Args:
        folder: The merger's folder.

    Returns:
        The card.

    Raises:
        ConfigError: If there is no merger at that place.
        Unreadable: If the folder holds something else.
    """
    return _read(folder).metadata.get("card", {})


def read_kind(folder: str | os.PathLike[str]) -> str:
    """The merge method that a stored merger is for.

    Args:
        folder: The merger's folder.

    Returns:
        ``gnn`` or ``autoencoder``.

    Raises:
        ConfigError: If there is no merger at that place.
        Unreadable: If the folder holds something else.
    """
    return _read(folder).metadata["kind"]


def _blank(configuration: type, made: type, stored: Mapping[str, Any]) -> Merger:
    """A merger of a stored configuration; its init is drawn only to be replaced."""
    known = {field.name for field in fields(configuration)}
    unknown, missing = stored.keys() - known, known - LATER - stored.keys()
    if unknown or missing:
        raise ValueError(f"unknown: {sorted(unknown)}, missing: {sorted(missing)}")
    config = configuration(**{name: _as_tuples(value) for name, value in stored.items()})
    with torch.random.fork_rng(devices=[]):
        return made(config)


def _as_tuples(value: Any) -> Any:
    """JSON has lists where a configuration has tuples."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def _read(folder: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint of a merger, or the reason why there is none."""
    if not is_mlflow_address(os.fspath(folder)) and not Path(folder).is_dir():
        raise ConfigError(
            f"merger: there is no folder {os.fspath(folder)!r}. Train one with `accelerate launch "
            "trainers/merger.py` and pass its folder, or choose a method that needs none, such as "
            "method='average'."
        )
    checkpoint = read_checkpoints(folder)[0]
    if checkpoint.metadata.get("kind") not in [*KINDS]:
        raise Unreadable(
            f"{os.fspath(folder)}: this checkpoint is no merger. Pass a folder written by "
            "trainers/merger.py."
        )
    return checkpoint
