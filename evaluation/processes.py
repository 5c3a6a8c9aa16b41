"""The processes that share the rows of a comparison, and what each of them is to make."""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState

from metamerge.errors import ConfigError

PATIENCE = timedelta(days=7)  # a process that is done waits for the others' longest rows
LAUNCHED = (  # how a launcher's environment variables begin
    *("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_", "ACCELERATE_"),
)

Piece = TypeVar("Piece")


def launched_processes() -> PartialState:
    """The processes that ``accelerate launch`` started; a single one without it.

    Returns:
        Which of them this is, and how to wait for the others.

    Raises:
        ConfigError: If there are several that do not know of each other.
    """
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != state.num_processes:
        raise ConfigError(
            f"{launched} processes were launched but accelerate sees {state.num_processes}; every "
            "one would do everything. On CPUs launch with ACCELERATE_USE_CPU=true, --multi_gpu and "
            "--num_processes."
        )
    return state


def share(pieces: Sequence[Piece], state: PartialState) -> list[Piece]:
    """What this process makes: every n-th piece, so that costly neighbours are dealt out."""
    return list(pieces[state.process_index :: state.num_processes])


def environment_of_one() -> dict[str, str]:
    """The environment for a command that is not to join the processes of this one."""
    return {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHED)}
