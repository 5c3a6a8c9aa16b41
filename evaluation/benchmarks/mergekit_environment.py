"""mergekit in a virtual environment of its own, since its dependencies clash with ours."""

import subprocess
import sys
import venv
from pathlib import Path

from metamerge.errors import ConfigError

VERSION = "0.1.5"


def find_python(given: str, cache: str) -> str:
    """Find, or make, a Python that has mergekit.

    Args:
        given: Path of a Python that has it; empty to make one.
        cache: Folder where the environment is made, once.

    Returns:
        Path of the interpreter.

    Raises:
        ConfigError: If mergekit cannot be imported there, or cannot be installed.
    """
    python = given or str(Path(cache).expanduser() / f"mergekit-{VERSION}" / "bin" / "python")
    if not given and not Path(python).exists():
        _make(Path(python))
    code = "from importlib.metadata import version; print(version('mergekit'))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(f"{python}: has no mergekit ({error}). Pass --python, or none.") from None
    if done.stdout.strip() != VERSION:
        raise ConfigError(f"{python}: has mergekit {done.stdout.strip()}, expected {VERSION}.")
    return python


def _make(python: Path) -> None:
    folder = python.parent.parent
    print(f"installing mergekit {VERSION} into {folder}", file=sys.stderr)
    venv.create(folder, with_pip=True)
    command = [python, "-m", "pip", "install", "--quiet", f"mergekit=={VERSION}"]
    try:
        subprocess.run(command, check=True)
    except subprocess.CalledProcessError as error:
        python.unlink()  # so that the next try starts anew
        raise ConfigError(f"mergekit {VERSION} could not be installed ({error}).") from None
