"""The trained mergers of a comparison: read, named, and told apart by what they are made of."""

import copy
import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from metamerge import mergers
from metamerge.errors import ConfigError
from metamerge.mergers import load_merger, read_card, read_kind
from metamerge.registry import get_method


@dataclass(frozen=True, eq=False)
class Contestant:
    """A trained merger.

    Attributes:
        name: What its rows are called: its kind, or its folder's name where a kind comes twice.
        kind: The merge method that uses it.
        folder: Where it lies.
        merger: The network.
        card: What was saved with it.
        code: Hash of its parameters and of the code that runs it.
    """

    name: str
    kind: str
    folder: str
    merger: nn.Module
    card: Mapping[str, Any]
    code: str

    def knows_zoo(self, digest: str) -> bool:
        """Whether it was trained on that zoo."""
        return any(zoo["digest"] == digest for zoo in self.card["zoos"])

    def knows_task(self, digest: str) -> bool:
        """Whether it was trained on that task."""
        return any(zoo["task"]["digest"] == digest for zoo in self.card["zoos"])


def read_contestants(folders: Sequence[str]) -> list[Contestant]:
    """Read trained mergers.

    Args:
        folders: Their folders.

    Returns:
        The mergers, each with a name of its own.

    Raises:
        ConfigError: If there is no merger at such a place.
        Unreadable: If a folder holds something else.
    """
    folders = list(dict.fromkeys(folders))
    networks = [load_merger(folder) for folder in folders]
    kinds = [read_kind(folder) for folder in folders]
    found = []
    for folder, kind, merger in zip(folders, kinds, networks, strict=True):
        alone = Counter(kinds)[kind] == 1
        short = Path(folder).name
        same = sum(Path(other).name == short for other in folders) > 1
        name = kind if alone else folder if same else short
        found.append(Contestant(name, kind, folder, merger, read_card(folder), _code(merger, kind)))
    return found


def champion(contestants: Sequence[Contestant]) -> Contestant:
    """The merger that its validation families speak for; test images choose nothing.

    Args:
        contestants: Mergers.

    Returns:
        The one with the highest validation accuracy.

    Raises:
        ConfigError: If they were validated on different zoos, so that nothing compares them.
    """
    zoos = {tuple(sorted(zoo["digest"] for zoo in one.card["zoos"])) for one in contestants}
    if len(zoos) > 1:
        raise ConfigError(
            "registered: the mergers were validated on different zoos, and test images choose "
            "none. Name one with --merger."
        )
    return max(contestants, key=lambda one: one.card["validation"]["validation_accuracy"])


def without_prior(merger: nn.Module) -> nn.Module | None:
    """The same merger with its input prior at zero; None where it has none, or none was learned."""
    bare = copy.deepcopy(merger)
    prior = getattr(bare, "prior", None)
    if prior is None or not prior.any():
        return None
    with torch.no_grad():
        prior.zero_()
    return bare


def code_of(*modules: Any) -> str:
    """Hash of the source of modules: rows that older code made are made again."""
    files = [inspect.getsourcefile(module) or "" for module in modules]
    return sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()[:12]


def _code(merger: nn.Module, kind: str) -> str:
    digest = sha256()
    for key, tensor in sorted(merger.state_dict().items()):
        digest.update(key.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    digest.update(repr(merger.config).encode())
    sources = sorted(Path(inspect.getsourcefile(mergers) or "").parent.glob("*.py"))
    sources.append(Path(inspect.getsourcefile(get_method(kind).function) or ""))
    for file in sources:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
