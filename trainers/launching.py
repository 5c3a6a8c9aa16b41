"""What every trainer does around its work: processes that know of each other, errors in a line."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from metamerge.errors import MetaMergeError
from zoo.memory import keep_freed_memory


@contextmanager
def launched(name: str, **settings: Any) -> Iterator[Accelerator]:
    """The processes that ``accelerate launch`` started; what is wrong is told in a line.

    Args:
        name: Of the script, for messages.
        **settings: Of ``accelerate.Accelerator``.

    Yields:
        The accelerator.

    Raises:
        SystemExit: If the processes do not know of each other, or with the exit code of an error.
    """
    keep_freed_memory()
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1:
        # Defaults of its functions are the process group that there is when it is imported. After
        # that no group would ever end, and threads of gloo that outlive Python abort the process.
        import_module("torch.distributed.nn.functional")
    accelerator = Accelerator(**{"cpu": not torch.cuda.is_available(), **settings})
    if started != accelerator.num_processes:
        raise SystemExit(
            f"{name}: {started} processes were launched but accelerate sees "
            f"{accelerator.num_processes}; every one would train alone. On CPUs launch with "
            "ACCELERATE_USE_CPU=true, --multi_gpu and --num_processes."
        )
    try:
        yield accelerator
    except MetaMergeError as error:
        print(f"{name}: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error
    finally:
        accelerator.end_training()


@contextmanager
def progress_bar(
    console: Console, name: str, total: int, done: int = 0
) -> Iterator[Callable[..., None]]:
    """A bar with what was told last behind it.

    Args:
        console: Where to show it; a quiet one shows nothing.
        name: Of the script.
        total: Steps in all.
        done: Steps that are done already; -1 where the call tells what comes next.

    Yields:
        ``advance(steps, told)``; what was told before stays if nothing is told.
    """
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    shown = TextColumn("{task.description}")
    with Progress(*columns, shown, console=console, disable=console.quiet) as bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda steps, told=None: bar.update(task, advance=steps, description=told)
