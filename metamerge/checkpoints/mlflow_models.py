"""Checkpoints in MLflow: ``runs:/<run>/<path>`` and ``models:/<name>@<alias>``, as files.

The one file of the library that imports mlflow, and only when such an address is opened: who has
none needs no mlflow. Models are downloaded, never unpickled.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from metamerge.checkpoints.opening import display
from metamerge.errors import ConfigError, Unreadable

CHECKPOINT = "checkpoint"
"""Folder of a model in which a checkpoint of ours lies, beside what MLflow itself loads."""
_ADDRESS = re.compile(r"(runs|models|mlflow-artifacts):/")
_PATIENCE = {  # a server that is down fails in seconds, not minutes
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def is_mlflow_address(text: str) -> bool:
    """Whether a source is an address of MLflow.

    Args:
        text: What the user passed.

    Returns:
        True for ``runs:/...``, ``models:/...`` and ``mlflow-artifacts:/...``.
    """
    return bool(_ADDRESS.match(text))


@contextmanager
def downloaded(address: str) -> Iterator[Path]:
    """Download a checkpoint from the store that MLFLOW_TRACKING_URI names.

    Args:
        address: ``runs:/<run>/<path>``, ``models:/<name>/<version>``, ``models:/<name>@<alias>`` or
            ``models:/<model id>``.

    Yields:
        A file, or a folder with the checkpoint; it is deleted afterwards.

    Raises:
        ConfigError: If mlflow is not installed.
        Unreadable: If the store does not answer, or has nothing of this address.
    """
    try:
        import mlflow
    except ImportError:
        raise ConfigError(
            f"{display(address)}: is an address of MLflow, which is not installed. Install it with "
            "`pip install mlflow`, or download the files and give their path."
        ) from None
    store = mlflow.get_tracking_uri()
    file = store.removeprefix("sqlite:///")
    if file != store and not os.path.exists(file):
        raise Unreadable(
            f"{display(address)}: there is no store at {store}. Name the one that has it in "
            "MLFLOW_TRACKING_URI."
        )
    with TemporaryDirectory() as folder, _patience():
        yield _fetch(mlflow.artifacts, address, folder, store)


def _fetch(artifacts, address: str, folder: str, store: str) -> Path:
    """Only the checkpoint, where there is one of ours; else all that lies there."""
    reasons = []
    for place, inside in (("ours", f"{address.rstrip('/')}/{CHECKPOINT}"), ("all", address)):
        target = Path(folder, place)
        target.mkdir()
        try:
            return Path(artifacts.download_artifacts(inside, dst_path=str(target)))
        except Exception as error:  # of MLflow, of its databases, of requests, of object stores
            reasons.append(str(error).splitlines()[0][:300])
    raise Unreadable(
        f"{display(address)}: cannot be had from the store {_without_password(store)} "
        f"({_without_password(reasons[-1])}). Check the address and MLFLOW_TRACKING_URI."
    )


def _without_password(text: str) -> str:
    return re.sub(r"//[^/@\s]*@", "//", text)


@contextmanager
def _patience() -> Iterator[None]:
    """Set what the user's own environment does not, for as long as the body runs."""
    unset = {key: value for key, value in _PATIENCE.items() if key not in os.environ}
    os.environ.update(unset)
    try:
        yield
    finally:
        for key in unset:
            os.environ.pop(key, None)
