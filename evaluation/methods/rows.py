"""Rows of the table of all methods: what is merged or trained in a setting, and how it scores."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evaluation.merging import NOTHING, Given, Merging
from evaluation.methods.entries import DATA, Entry, entries
from evaluation.methods.settings import Draw, Setting
from evaluation.metrics import accuracy
from evaluation.scored import Scored
from metamerge.mergers import read_kind
from metamerge.weights import Weights
from zoo.training import predict

FIGURES = (
    *("members", "accuracy_mean", "accuracy_std", "accuracy_worst"),
    *("families", "seconds", "parameters"),
)

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


@lru_cache(maxsize=16)
def merging_of(setting: Setting, draw: Draw, data: str) -> tuple[Merging, Given]:
    """A draw with all that was aligned of it, and its calibration images.

    Args:
        setting: The setting.
        draw: The draw.
        data: ``none``, ``unlabelled`` or ``labelled``.

    Returns:
        Its families, and nothing, inputs, or inputs and labels.
    """
    if data != "none":
        inputs, labels = draw.budget.everything
        told = Given(inputs, labels) if data == "labelled" else Given(inputs)
        return merging_of(setting, draw, "none")[0], told
    return Merging(setting.layout, draw.families, bases=draw.bases, seed=draw.seed), NOTHING


def _merge_row(
    setting: Setting, draws: Sequence[Draw], entry: Entry, data: str, merger: str | None
) -> dict[str, Any]:
    told = {id(draw): merging_of(setting, draw, data) for draw in draws}
    aligning = [merging.seconds_aligning(entry, given) for merging, given in told.values()]

    def make(draw: Draw) -> Weights:
        merging, given = told[id(draw)]
        return merging.merged(entry, given, merger=merger)

    row = scored(setting, draws, make)
    return {**row, "seconds": round(row["seconds"] + sum(aligning) / len(aligning), 4)}


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
    one = setting.starts["own"][0].families
    parameters = networks * sum(t[0, 0].numel() for t in one.values() if t.is_floating_point())
    row = Scored("", setting.members, "", scores, seconds, parameters, control=False).row()
    return {name: row[name] for name in FIGURES}
