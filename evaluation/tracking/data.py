"""What runs of this project have read, as inputs of MLflow."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from evaluation.tracking.events import Dataset

if TYPE_CHECKING:
    from zoo.store import Zoo


def zoo_datasets(zoos: Iterable["Zoo"], context: str) -> list[Dataset]:
    """Zoos and the tasks that they are of.

    Args:
        zoos: The zoos.
        context: What they are read for, such as ``training`` or ``evaluation``.

    Returns:
        Every task once, then the zoos.
    """
    zoos = list(zoos)
    tasks = {zoo.manifest["task"]["digest"]: zoo.manifest["task"] for zoo in zoos}
    read = [Dataset(task["name"], digest, context=context) for digest, task in tasks.items()]
    for zoo in zoos:
        members = {name: group["members"] for name, group in zoo.groups.items()}
        folder = zoo.folder.resolve()
        read.append(Dataset(f"zoo {folder.name}", zoo.digest, str(folder), context, members))
    return read
