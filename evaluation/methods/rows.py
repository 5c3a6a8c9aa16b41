"""Rows of the table of all methods: what is merged or trained in a setting, and how it scores."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evaluation.methods.entries import DATA, Entry, entries
from evaluation.methods.settings import Draw, Setting
from evaluation.metrics import accuracy
from metamerge.alignment.aligning import align_members
from metamerge.api import merge
from metamerge.checkpoints import Checkpoint
from metamerge.mergers import read_kind
from metamerge.registry import get_alignment, get_method
from metamerge.weights import Weights, stack
from zoo.training import predict

Make = Callable[[Draw], Weights]
"""Families of a draw -> one network for each, ``[f, ...]``."""


class Call(NamedTuple):
    """A row that can be made.

    Attributes:
        about: ``start``, ``method``, ``data`` and ``control``.
        score: Makes and scores it; returns the rest of the row.
        code: Hash of the code that it depends on.
    """

    about: dict[str, Any]
    score: Callable[[], dict[str, Any]]
    code: str = ""

    @property
    def key(self) -> str:
        """What the ledger knows it by."""
        told = (str(self.about[name]) for name in ("start", "method", "data"))
        return "; ".join([*told, self.code])


def merge_calls(setting: Setting, merger: str | None) -> Iterator[Call]:
    """All merges of a setting, with all data that they can use.

    Args:
        setting: The setting.
        merger: Folder of a trained merger for learned methods; None leaves them out.

    Yields:
        One call per row.
    """
    learned = None if merger is None else read_kind(merger)
    for start, draws in setting.starts.items():
        for entry in entries(setting.layout, setting.members, start, learned=learned):
            for data in filter(entry.possible, DATA):
                about = {"start": start, "method": entry.label, "data": data, "control": False}
                once = setting.one_family and not entry.random(data)
                some = draws[:1] if once else draws  # the others would be the same
                score = partial(_merge_row, setting, some, entry, data, merger)
                yield Call(about, score, entry.code)


def _merged(setting: Setting, entry: Entry, data: str, merger: str | None, draw: Draw) -> Weights:
    """Align and merge every family."""
    resources = get_method(entry.method).resources
    given: dict[str, Any] = {
        "method": entry.method,
        "align": None,
        "correct": list(entry.correct) or None,
        "batches": images_of(draw, data),
        **({"merger": merger} if "merger" in resources else {}),
        **entry.options,
    }
    bases = draw.bases if draw.bases is not None and "base" in resources else None
    program, fused = setting.layout.program.to_json(), []
    for index in range(len(draw.members)):
        members, _ = aligned_members(setting, draw, index, entry.alignments, data)
        sources = [Checkpoint(f"member {m}", own, program) for m, own in enumerate(members)]
        base = None if bases is None else {key: t[index].clone() for key, t in bases.items()}
        merged = merge(sources, base=base, seed=draw.seed + index, device="cpu", **given)
        fused.append(merged.weights)
    return stack(fused)


def images_of(draw: Draw, data: str) -> Tensor | tuple[Tensor, Tensor] | None:
    """The calibration images of a draw, as ``merge`` takes them.

    Args:
        draw: The draw.
        data: ``none``, ``unlabelled`` or ``labelled``.

    Returns:
        None, inputs, or inputs and labels.
    """
    inputs, labels = draw.budget.everything
    return {"none": None, "unlabelled": inputs, "labelled": (inputs, labels)}[data]


def aligned_members(
    setting: Setting, draw: Draw, index: int, chain: tuple[str, ...], data: str
) -> tuple[list[Weights], float]:
    """Members of one family in common slots; what was aligned before is not aligned again.

    Args:
        setting: The setting.
        draw: The draw of the family.
        index: Which family of the draw.
        chain: Names of alignments, in their order.
        data: What alignments may look at.

    Returns:
        One state dict per member, and the seconds that it took when it was done.
    """
    used = any("batches" in get_alignment(name).resources for name in chain)
    return _aligned_once(setting, draw, index, chain, data if used else "none")


@lru_cache(maxsize=256)
def _aligned_once(
    setting: Setting, draw: Draw, index: int, chain: tuple[str, ...], data: str
) -> tuple[list[Weights], float]:
    if not chain:
        return draw.members[index], 0.0
    generator = torch.Generator().manual_seed(draw.seed + index)
    at_hand = {"batches": images_of(draw, data), "generator": generator}
    clock = time.perf_counter()
    members, _ = align_members(draw.members[index], setting.layout, chain, resources=at_hand)
    return members, time.perf_counter() - clock


def _seconds_aligning(setting: Setting, entry: Entry, data: str, draws: Sequence[Draw]) -> float:
    """Seconds per family that its alignment took, whenever that was."""
    families = [(draw, index) for draw in draws for index in range(len(draw.members))]
    told = [aligned_members(setting, *place, entry.alignments, data)[1] for place in families]
    return sum(told) / len(told)


def _merge_row(
    setting: Setting, draws: Sequence[Draw], entry: Entry, data: str, merger: str | None
) -> dict[str, Any]:
    aligning = _seconds_aligning(setting, entry, data, draws)
    row = scored(setting, draws, partial(_merged, setting, entry, data, merger))
    return {**row, "seconds": round(row["seconds"] + aligning, 4)}


def scored(setting: Setting, draws: Sequence[Draw], make: Make) -> dict[str, Any]:
    """Make networks of every draw and score them on the test images.

    Args:
        setting: The setting.
        draws: Draws to make networks of.
        make: Makes the networks of one draw.

    Returns:
        The figures of a row.
    """
    clock = time.perf_counter()
    networks = [make(draw) for draw in draws]
    seconds = time.perf_counter() - clock
    inputs, targets = setting.test
    logits = torch.cat([predict(setting.layout.program, own, inputs) for own in networks])
    return row_of(setting, accuracy(logits, targets), seconds / len(logits), 1)


def row_of(setting: Setting, scores: Tensor, seconds: float, networks: int) -> dict[str, Any]:
    """The figures of a row, named as in ``leaderboard.json``.

    Args:
        setting: The setting.
        scores: Accuracy of every family, ``[f]``.
        seconds: Spent on each.
        networks: Networks that have to be kept.

    Returns:
        Name -> figure.
    """
    spread = float(scores.std(correction=1)) if len(scores) > 1 else 0.0
    one = setting.starts["own"][0].families
    parameters = sum(t[0, 0].numel() for t in one.values() if t.is_floating_point())
    return {
        "members": setting.members,
        "accuracy_mean": round(float(scores.mean()), 6),
        "accuracy_std": round(spread, 6),
        "accuracy_worst": round(float(scores.min()), 6),
        "families": len(scores),
        "seconds": round(seconds, 4),
        "parameters": networks * parameters,
    }
