"""One entry for everything that a checkpoint can come as."""

import copy
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from torch.nn import Module

from metamerge.checkpoints.checkpoint import MAX_BYTES, Checkpoint
from metamerge.checkpoints.files import read_file
from metamerge.checkpoints.folders import read_folder
from metamerge.checkpoints.mlflow_models import downloaded, is_mlflow_address
from metamerge.checkpoints.opening import display
from metamerge.checkpoints.plain import plain_weights
from metamerge.checkpoints.shards import INDEX_SUFFIX, read_sharded
from metamerge.checkpoints.zoo_members import read_members
from metamerge.errors import ConfigError, MetaMergeError, Unreadable
from metamerge.weights import Weights

Source = str | os.PathLike | Mapping[str, Tensor] | Module | Checkpoint

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def read_checkpoints(
    source: Source, *, name: str | None = None, max_bytes: int = MAX_BYTES
) -> list[Checkpoint]:
    """Read the checkpoints that a source stands for; all but a zoo family stand for one.

    Args:
        source: A safetensors file, one of torch.save or torch.export.save (told by content, not by
            name), a folder with a single file or with an index of shards, a zoo address
            ``<folder>#<group>/<family>[/<member>]``, an address of MLflow such as
            ``runs:/<run>/<model>`` or ``models:/<name>@<alias>``, a module, a state dict, or a
            checkpoint.
        name: What messages call it; by default its path or type. Members of a family keep their
            addresses.
        max_bytes: Largest number of tensor bytes that are read from files.

    Returns:
        Checkpoints on the CPU. Those of modules are copies; those of state dicts share memory
        with them where they can. Values are not looked at: see ``check_finite``.

    Raises:
        ConfigError: If the source is of another kind, another URI, or an address out of range.
        Unreadable: If a source is missing, damaged or holds no tensors.
        CheckpointError: If a file cannot be read safely and in full.
        IncompatibleWeights: If a tensor is of a kind that cannot be merged.
    """
    checkpoints = _read(source, max_bytes)
    for checkpoint in checkpoints:
        if not checkpoint.weights:
            raise Unreadable(f"{checkpoint.name}: holds no tensors.")
    if name is not None and len(checkpoints) == 1:
        return [replace(checkpoints[0], name=name)]
    return checkpoints


def _read(source: Source, max_bytes: int) -> list[Checkpoint]:
    match source:
        case Checkpoint():
            return [source]
        case Module():
            return [_from_module(source)]
        case Mapping():
            return [Checkpoint("state dict", _on_cpu(plain_weights("state dict", source)))]
        case str() | os.PathLike():
            return _from_path(os.path.expanduser(os.fsdecode(source)), max_bytes)
    raise ConfigError(
        f"A {type(source).__name__} is not a checkpoint. Give a path, a zoo address, a module, a "
        f"state dict or a Checkpoint."
    )


def _from_path(text: str, max_bytes: int) -> list[Checkpoint]:
    path = Path(text)
    if not text:
        raise ConfigError("The path of a checkpoint is empty. Give a file or a folder.")
    if os.path.isdir(path):
        return [read_folder(path, max_bytes)]
    if not os.path.exists(path):
        if is_mlflow_address(text):
            return [_from_mlflow(text, max_bytes)]
        _refuse_uri(text)
        if "#" in text:
            return read_members(text, max_bytes)
    if text.endswith(INDEX_SUFFIX):
        return [read_sharded(path, max_bytes)]
    return [read_file(path, max_bytes)]


def _refuse_uri(text: str) -> None:
    if _URI.match(text):
        raise ConfigError(f"{display(text)}: is a URI. Download it and give the local path.")


def _from_mlflow(address: str, max_bytes: int) -> Checkpoint:
    with downloaded(address) as path:
        data = path / "data"  # where MLflow puts the network of a model
        if (path / "MLmodel").is_file() and data.is_dir():
            path = data
        read = read_folder if path.is_dir() else read_file
        try:
            return replace(read(path, max_bytes), name=display(address))
        except MetaMergeError as error:  # it names a path that is gone afterwards
            raise type(error)(str(error).replace(str(path), display(address))) from error


def _from_module(module: Module) -> Checkpoint:
    name = type(module).__name__
    weights = _on_cpu(plain_weights(name, module.state_dict()))
    return Checkpoint(name, copy.deepcopy(weights))  # one copy keeps tied tensors tied


def _on_cpu(weights: Weights) -> Weights:
    return {key: tensor.cpu() for key, tensor in weights.items()}
