"""What is left out of a merger, or made in another way, one part at a time."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

Entries = tuple[slice, ...]
ALL: Entries = ()


@dataclass(frozen=True)
class Case:
    """One ablation.

    Attributes:
        part: What of a merger it is about.
        name: What is changed.
        options: Options of ``trainers/merger.py`` that differ from those of the setting.
        held: Parameters that say nothing and never learn to: pattern of their names -> entries;
            ``ALL`` leaves them as they start.
        aligned: Whether members are aligned before they are merged.
    """

    part: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    held: Mapping[str, Entries] = field(default_factory=dict)
    aligned: bool = True


WHOLE = Case("", "whole merger")
_WIDTH = 32  # of states, the default
_OUT, _UNTOLD = {"drop": 0.0, "garbage": 0.0, "calibrated": 0.0, "noise": 0.0}, slice(None)
CASES = (
    WHOLE,
    Case("alignment", "none", aligned=False),
    Case("mixing", "equal shares", held={"mix.*": ALL}),
    Case("gain", "none", held={"gain.*": ALL}),
    Case("gate", "none", {"gate": False}),
    Case("gate", "equal shares", held={"gate.head.*": (slice(0, 3),)}),
    Case("gate", "shares alike on all inputs", held={"gate.head.*": (slice(1, 3),)}),
    Case("gate", "no shift, no scale", held={"gate.head.*": (slice(3, 5),)}),
    Case("messages", "no rounds", {"rounds": 0}),
    Case("messages", "1 round", {"rounds": 1}),
    Case(
        "messages",
        "no set pooling",
        held={"rounds.*.update.0.weight": (_UNTOLD, slice(3 * _WIDTH, 5 * _WIDTH))},
    ),
    Case("refit", "none", held={"strength": ALL}),
    Case("refit", "output layer alone", held={"strength": (slice(0, 1),)}),
    Case("probes", "not learned", held={"probes.*": ALL}),
    Case("probes", "64", {"probes": 64}),
    Case("probes", "512", {"probes": 512}),
    Case("input prior", "none", {"prior": 0}),
    Case("objective", "plain cross entropy", {"softness": 1e9}),
    Case("objective", "no loss of the consensus", {"consensus": 0.0}),
    Case("augmentation", "no dropped members", {"drop": 0.0}),
    Case("augmentation", "no garbage members", {"garbage": 0.0}),
    Case("augmentation", "no calibrated steps", {"calibrated": 0.0}),
    Case("augmentation", "no noise on images", {"noise": 0.0}),
    Case("augmentation", "none of the four", _OUT),
    Case("running average", "none", {"average": 0.0}),
    Case("steps", "all numbers of members in each", {"groups": 2}),
    Case("steps", "fused networks in bfloat16", {"precision": "bfloat16"}),
    Case("labels", "none, the soft vote is imitated", {"labels": False}),
    Case("kind", "autoencoder", {"kind": "autoencoder"}),
    Case("kind", "autoencoder, pre-trained", {"kind": "autoencoder", "pretrain": 100}),
)


def hold(merger: nn.Module, held: Mapping[str, Entries]) -> None:
    """Keep entries of parameters out of training: at zero, or whole tensors as they start.

    Args:
        merger: A fresh merger; it is changed.
        held: Pattern of names -> entries.

    Raises:
        ValueError: If a pattern meets no parameter.
    """
    for pattern, entries in held.items():
        met = [p for name, p in merger.named_parameters() if fnmatch(name, pattern)]
        if not met:
            raise ValueError(f"hold: no parameter is called {pattern!r}.")
        for parameter in met:
            if entries == ALL:
                parameter.requires_grad_(False)
            else:
                _silence(parameter, entries)


def _silence(parameter: nn.Parameter, entries: Entries) -> None:
    learns = torch.ones_like(parameter)
    learns[entries] = 0.0
    with torch.no_grad():
        parameter.mul_(learns)

    def masked(grad: Tensor) -> Tensor:
        return grad * learns

    parameter.register_hook(masked)
