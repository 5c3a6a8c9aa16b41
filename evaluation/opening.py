"""From options to families: those of a zoo, checkpoints of one's own, or the third-party pair."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from accelerate import PartialState
from rich.console import Console

from evaluation.contestants import Contestant
from evaluation.judged import Judged, check_cut, open_zoo, third_party_pair, zoo_families
from evaluation.metrics import common_task
from evaluation.own_checkpoints import OwnOptions, own_families
from evaluation.protocol import about_images, task_of
from evaluation.tracking import Dataset, zoo_datasets
from metamerge.errors import ConfigError


class Opened(NamedTuple):
    """What is compared on.

    Attributes:
        judged: Families, one entry per number of members.
        about: What ``leaderboard.meta.json`` says of them.
        data: The same for MLflow.
    """

    judged: list[Judged]
    about: dict[str, Any]
    data: list[Dataset]


def open_families(
    options: Any, contestants: Sequence[Contestant], console: Console, state: PartialState
) -> Opened:
    """The families that options name.

    Args:
        options: Those of ``evaluation.compare``.
        contestants: Mergers that are compared.
        console: Where to print.
        state: The processes; they build the mergers' zoo together if it is not there.

    Returns:
        The families.

    Raises:
        ConfigError: If mergers and families do not belong together.
    """
    trained = {c.name: c.card["options"]["seed"] for c in contestants}
    seeds = {"zoo": None, "merger": trained, "compare": list(options.seeds)}
    first = options.seeds[0]
    if options.third_party:
        return _one(third_party_pair(options.third_party, seed=first), seeds)
    if options.checkpoints:
        own = {field.name: getattr(options, field.name) for field in fields(OwnOptions)}
        judged = own_families(OwnOptions(**own), seed=first)
        check_cut(judged.split, first, contestants)
        return _one(judged, seeds)
    zoo = open_zoo(options.zoo, contestants, console, state)
    sizes = tuple(dict.fromkeys(options.members)) or zoo.sizes
    unknown = sorted(set(sizes) - set(zoo.sizes))
    if unknown:
        raise ConfigError(
            f"members: the zoo {zoo.folder} has families of {zoo.sizes}, got {unknown}."
        )
    split = common_task(zoo)
    found = [zoo_families(zoo, split, size, most=options.families) for size in sizes]
    about = {
        "task": zoo.manifest["task"],
        "zoo": {"folder": str(zoo.folder), "digest": zoo.digest, "options": zoo.options},
        "images": about_images(found[0]),
        "seeds": {**seeds, "zoo": zoo.options["seed"]},
        "notes": [],
    }
    return Opened(found, about, zoo_datasets([zoo], "evaluation"))


def _one(judged: Judged, seeds: dict[str, Any]) -> Opened:
    """Families that do not come from a zoo."""
    task = judged.split.task
    about = {
        "task": task_of(judged),
        "zoo": None,
        "images": about_images(judged),
        "seeds": seeds,
        "notes": [judged.note],
    }
    return Opened([judged], about, [Dataset(task.name, task.digest, context="evaluation")])
