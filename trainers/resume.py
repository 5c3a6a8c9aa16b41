"""Training state that survives a kill: safetensors and JSON, two states kept, nothing pickled."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metamerge.checkpoints import read_checkpoints, save_checkpoint
from metamerge.errors import CheckpointError, ResumeError

KEPT = 2


def save_state(
    folder: Path, step: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]
) -> None:
    """Write the state of a step, then let ``LATEST`` point to it, then drop the oldest.

    Args:
        folder: Folder of all states of this training.
        step: Steps that were done.
        tensors: Everything with numbers in it.
        record: Everything else, as JSON.
    """
    name = f"step-{step:08d}"
    for left in (folder / name, *folder.glob(".step-*.partial")):  # damaged, or cut off by a kill
        shutil.rmtree(left, ignore_errors=True)
    save_checkpoint(dict(tensors), folder / name, metadata={"step": step, **record}, overwrite=True)
    pointer = folder / ".LATEST.partial"
    pointer.write_text(name)
    os.replace(pointer, folder / "LATEST")
    for old in sorted(folder.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def load_state(folder: Path, fingerprint: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read the newest state that is whole.

    Args:
        folder: Folder of all states of this training.
        fingerprint: Hash of options and zoo; must be that of the state.

    Returns:
        Tensors and record, or None if there is no state.

    Raises:
        ResumeError: If the state belongs to other options, or none of the states is whole.
    """
    if not (folder / "LATEST").is_file():
        return None
    newest = folder / (folder / "LATEST").read_text().strip()
    others = [path for path in sorted(folder.glob("step-*"), reverse=True) if path != newest]
    faults = []
    for path in (newest, *others):
        try:
            checkpoint = read_checkpoints(path)[0]
        except CheckpointError as error:
            faults.append(str(error))
            continue
        found = checkpoint.metadata.get("fingerprint")
        if found is None:
            faults.append(f"{path}: its manifest says nothing of the training.")
            continue
        if found != fingerprint:
            raise ResumeError(
                f"{path} was written with other options or another zoo. Choose another --out, or "
                f"delete {folder} to start again."
            )
        return checkpoint.weights, checkpoint.metadata
    raise ResumeError(
        f"{folder}: no state is whole: {' '.join(faults)} Delete the folder to start again."
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """State of an optimizer by parameter name.

    Args:
        optimizer: AdamW or a relative, all of whose state is tensors.
        model: The module that it optimizes.

    Returns:
        ``optimizer.<what>.<parameter>`` -> tensor.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        for what, tensor in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{what}.{name}"] = tensor
    return tensors


def restore_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what ``optimizer_tensors`` took out.

    Args:
        optimizer: A fresh optimizer over the same parameters.
        model: The module that it optimizes.
        tensors: The saved state.
    """
    for name, parameter in model.named_parameters():
        suffix = f".{name}"
        for key, tensor in tensors.items():
            if key.startswith("optimizer.") and key.endswith(suffix):
                what = key.removeprefix("optimizer.").removesuffix(suffix)
                if "." not in what:
                    home = "cpu" if what == "step" else parameter.device
                    optimizer.state[parameter][what] = tensor.to(home)
