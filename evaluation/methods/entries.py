"""Which rows a table of all methods has: every registered name, and the variants worth a look.

Names come from the registers, so a new method, alignment or correction appears by itself; what a
row can be run with is read from the records, never from names.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from metamerge.corrections.batch_norm import normalisations
from metamerge.declaration import REQUIRED, Record
from metamerge.errors import ConfigError
from metamerge.registry import (
    get_alignment,
    get_correction,
    get_method,
    list_alignments,
    list_corrections,
    list_methods,
)
from metamerge.structure import Layout

DATA = ("none", "unlabelled", "labelled")
AVERAGE, USUAL = "average", "weight_matching"
MIXED_ALIGNMENTS = (("weight_matching", "activation_matching"), ("canonical", "weight_matching"))
EVERYWHERE = ("repair", "refit")  # corrections that are tried behind every alignment
IN_A_ROW = (("repair", "refit"),)  # corrections that are tried together, behind the usual alignment
NORMALISED_ONLY = ("batch_norm",)  # corrections that say nothing without batch normalisation

Options = Callable[[int], Mapping[str, Any]]
"""Number of members -> options."""

VALUES: Mapping[str, Options] = {  # of options that have no default
    "weighted_average": lambda members: {"coefficients": [2.0] + [1.0] * (members - 1)},
}
VARIANTS: tuple[tuple[str, Mapping[str, Any]], ...] = (  # other options than the default ones
    ("cluster", {"keep": "best"}),
    ("adaptive", {"per": "model"}),
    ("unit_clusters", {"outputs": "votes"}),
    ("pleas", {"outputs": "votes"}),
)


@dataclass(frozen=True)
class Entry:
    """One way to merge.

    Attributes:
        method: Name of the merge method.
        align: Names of alignments, one after the other; None for members as they are; ``default``
            for what the method wants.
        correct: Names of corrections, one after the other.
        options: Of the method.
    """

    method: str
    align: tuple[str, ...] | str | None = "default"
    correct: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def alignments(self) -> tuple[str, ...]:
        """Names of the alignments that it comes to."""
        align = get_method(self.method).align if self.align == "default" else self.align
        return (align,) if isinstance(align, str) else align or ()

    @property
    def label(self) -> str:
        """What tables call it."""
        told = [f"{name}={_shown(value)}" for name, value in self.options.items()]
        method = self.method + (f" ({', '.join(told)})" if told else "")
        return " > ".join([*self.alignments, method, *self.correct])

    @property
    def records(self) -> list[Record]:
        """Records of everything that takes part."""
        return [
            get_method(self.method),
            *map(get_alignment, self.alignments),
            *map(get_correction, self.correct),
        ]

    @property
    def code(self) -> str:
        """Hash of the files that define what takes part: rows of older code are made again."""
        files = sorted({inspect.getsourcefile(r.function) or "" for r in self.records})
        content = b"".join(Path(file).read_bytes() for file in files if file)
        return sha256(content).hexdigest()[:12]

    def possible(self, data: str) -> bool:
        """Whether the records say that it can be run with such data, and makes use of them.

        Args:
            data: One of ``DATA``.

        Returns:
            Yes or no; a method that asks for ``batches`` may still refuse those without labels.
        """
        required = frozenset().union(*(record.required for record in self.records))
        used = frozenset().union(*(record.resources for record in self.records))
        if data == "none":
            return not self.correct and not required & {"batches", "labels"}
        if data == "unlabelled":
            return "labels" not in required and ("batches" in used or bool(self.correct))
        return "labels" in used or "batches" in get_method(self.method).resources

    def random(self, data: str) -> bool:
        """Whether seeds or images decide anything."""
        used = frozenset().union(*(record.resources for record in self.records))
        return data != "none" or "generator" in used


def entries(layout: Layout, members: int, start: str, *, learned: str | None) -> Iterator[Entry]:
    """All ways to merge that fit a setting.

    Args:
        layout: The setting's architecture.
        members: Members per family.
        start: ``own`` or ``common``: a common base takes methods that read members as changes of
            it, or that take them as they are.
        learned: The method of the trained merger that is there; None leaves learned ones out.

    Yields:
        Entries, each once.
    """
    seen: set[str] = set()
    for entry in _all_entries(layout, start):
        record = get_method(entry.method)
        most = getattr(record, "most", None)
        unfit = most is not None and members > most
        unfit |= "merger" in record.resources and record.name != learned
        unfit |= "base" in record.required and start == "own"
        entry = Entry(entry.method, entry.align, entry.correct, _options(entry, members))
        if not unfit and entry.label not in seen:
            seen.add(entry.label)
            yield entry


def parse_entry(name: str, members: int) -> Entry:
    """Read how to merge from its name.

    Args:
        name: A method, with alignments before it and corrections behind it where others than the
            usual are wanted, joined by ``+`` or ``>``: ``ties``, ``canonical+average+refit``,
            ``none+average`` for members as they are.
        members: Members per family.

    Returns:
        The entry; options without a default get the usual values.

    Raises:
        ConfigError: If there is not one method in it, or a name is unknown.
    """
    parts = [part.strip() for part in re.split("[+>]", name)]
    known = list_methods()
    places = [place for place, part in enumerate(parts) if part in known]
    if not places:
        get_method(parts[0] if len(parts) == 1 else name)  # says which there are
    if len(places) != 1:
        raise ConfigError(
            f"methods: {name!r} names {len(places)} merge methods, expected one. Write "
            "alignment+method+correction, such as weight_matching+average+refit."
        )
    before, after = parts[: places[0]], parts[places[0] + 1 :]
    before = None if before == ["none"] else before
    for own, look_up in ((before or (), get_alignment), (after, get_correction)):
        for part in own:
            look_up(part)  # says which there are
    align = before and tuple(before)
    entry = Entry(parts[places[0]], "default" if align == [] else align, tuple(after))
    return replace(entry, options=_options(entry, members))


def _all_entries(layout: Layout, start: str) -> Iterator[Entry]:
    names = list_methods()
    yield Entry(AVERAGE, None)
    yield Entry(AVERAGE, (USUAL,))
    yield Entry(AVERAGE, (USUAL,), ("refit",))
    if start == "common":
        names = [n for n in names if "base" in get_method(n).resources or not get_method(n).align]
    else:
        yield from _averages(layout)
    for name in names:
        yield Entry(name)
    yield from (Entry(name, options=options) for name, options in VARIANTS if name in names)


def _averages(layout: Layout) -> Iterator[Entry]:
    """The plain mean behind every alignment and in front of every correction."""
    known = list_alignments()
    chains = [(name,) for name in known]
    chains += [chain for chain in MIXED_ALIGNMENTS if {*chain} <= {*known}]
    corrections = list_corrections()
    if not any(True for _ in normalisations(layout.program)):
        corrections = [name for name in corrections if name not in NORMALISED_ONLY]
    for chain in (None, *chains):
        yield Entry(AVERAGE, chain)
        tried = corrections if chain == (USUAL,) else [n for n in EVERYWHERE if n in corrections]
        yield from (Entry(AVERAGE, chain, (name,)) for name in tried)
    for names in IN_A_ROW:
        if {*names} <= {*corrections}:
            yield Entry(AVERAGE, (USUAL,), names)


def _options(entry: Entry, members: int) -> Mapping[str, Any]:
    """The entry's options, and values of those that have no default."""
    needed = {n for n, d in get_method(entry.method).options.items() if d is REQUIRED}
    usual = VALUES[entry.method](members) if entry.method in VALUES else {}
    return {**{name: value for name, value in usual.items() if name in needed}, **entry.options}


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value) + "]"
    return str(value)
