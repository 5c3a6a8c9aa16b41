"""The register of ensembles: what makes a consensus declares by its signature what it needs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from metamerge.declaration import Record, read_declaration
from metamerge.lookup import Register

Maker = TypeVar("Maker", bound=Callable[..., nn.Module])


@dataclass(frozen=True)
class EnsembleKind(Record):
    """A kind of ensemble.

    Attributes:
        fitted: Whether it is fitted, ``function(seen, <labels or targets>, *, ...)``; otherwise it
            is made of nothing, ``function(*, ...)``.
        numbers: Whether it is for networks that put out numbers; otherwise for classifiers.
    """

    fitted: bool = True
    numbers: bool = False


_KINDS = Register[EnsembleKind]("kind of ensemble", "kind", "metamerge.ensembles")


def consensus(
    paper: str | None = None,
    *,
    name: str | None = None,
    fitted: bool = True,
    numbers: bool = False,
) -> Callable[[Maker], Maker]:
    """Register what makes a consensus as a kind of ensemble.

    Args:
        paper: Where it is published, such as ``arXiv:1612.01474``.
        name: Name of the kind; by default that of the function.
        fitted: Whether it is fitted to what members say and to labels, or to targets.
        numbers: Whether it is for networks that put out numbers, so that there are targets.

    Returns:
        A decorator that stores the record and returns the function unchanged.
    """

    def register(function: Maker) -> Maker:
        taken = ["what members say", "targets" if numbers else "labels"] if fitted else []
        declared = read_declaration(function, paper, kind=_KINDS.kind, positional=taken, name=name)
        _KINDS.enter(EnsembleKind(**declared, fitted=fitted, numbers=numbers))
        return function

    return register


def list_ensembles() -> list[str]:
    """List the names of all kinds for ``ensemble(..., kind=name)``, sorted."""
    return _KINDS.names()


def get_ensemble(name: str) -> EnsembleKind:
    """Look up a kind of ensemble.

    Args:
        name: One of ``list_ensembles()``.

    Returns:
        Its record.

    Raises:
        ConfigError: If there is no such kind; suggests what could have been meant.
    """
    return _KINDS.get(name)
