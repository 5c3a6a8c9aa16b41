"""Make a zoo of somebody else's networks: ``python -m zoo.adopt --source FOLDER --layout folder``.

Networks are read as they were published, dealt out to families of K at random, and kept as every
other zoo is: each is a checkpoint of its own, by address. Nobody knows which images they saw, so
they can be merged and looked at, but nothing is judged on them.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from metamerge.errors import ConfigError, ZooError
from metamerge.structure import Program
from metamerge.weights import Weights
from zoo import architectures
from zoo.imports import checkpoint_folder, schuerholt, unterthiner
from zoo.imports.population import Population
from zoo.options import command
from zoo.store import FAMILY_PARTS, Zoo, group_name, load_zoo, read_manifest
from zoo.writing import Building, check_place, locked

LAYOUTS = ("folder", "schuerholt", "unterthiner")
SHARD = 4096  # networks that are stored as one piece


@dataclass(frozen=True)
class AdoptOptions:
    """Make a zoo of somebody else's networks."""

    source: str  # folder that holds them
    layout: str = "folder"  # folder (checkpoints, perhaps a CSV), schuerholt or unterthiner
    out: str | None = None  # folder of the zoo; zoos/<name of the source>
    members: tuple[int, ...] = (8,)  # members per family; one set of families for each
    shares: tuple[float, ...] = (0.6, 0.2, 0.2)  # of families for training, validation and test
    limit: int | None = None  # read no more than that many networks
    epochs: int | None = None  # schuerholt: which checkpoint; the last if not given
    activation: str | None = None  # unterthiner: relu or tanh, where there are both
    drop_nonfinite: bool = False  # leave out networks with NaN or infinite weights
    architecture: str | None = None  # a name of zoo.build, or module:factory, if unknown
    shape: tuple[int, ...] = ()  # of one input, for the architecture: channels, height and width
    outputs: int | None = None  # of the architecture
    widths: tuple[int, ...] | None = None  # of the architecture
    seed: int = 0  # seed by which networks are dealt out to families

    def __post_init__(self) -> None:
        """Refuse options that make no sense.

        Raises:
            ConfigError: Naming the option.
        """
        if self.layout not in LAYOUTS:
            raise ConfigError(f"layout: got {self.layout!r}, expected one of {LAYOUTS}.")
        if not self.members or min(self.members) < 1 or len(set(self.members)) < len(self.members):
            raise ConfigError(f"members: expected different numbers from 1 on, got {self.members}.")
        if len(self.shares) != 3 or min(self.shares) < 0 or abs(sum(self.shares) - 1) > 1e-6:
            raise ConfigError(f"shares: expected three numbers that add up to 1: {self.shares}.")
        if self.architecture and not (self.shape and self.outputs):
            raise ConfigError("architecture: give its --shape and --outputs as well.")

    @property
    def folder(self) -> Path:
        """Where the zoo lies."""
        return Path(self.out or Path("zoos", Path(self.source).resolve().name))


def adopt(options: AdoptOptions) -> Zoo:
    """Read networks and keep them as a zoo.

    Args:
        options: Which, and how.

    Returns:
        The zoo.

    Raises:
        ConfigError: If options contradict each other or the networks.
        ZooError: If the networks cannot be read, or the zoo cannot be written.
    """
    folder = options.folder
    if Path(options.source).resolve() == folder.resolve():
        raise ConfigError(f"out: {folder} is the source itself. Choose another --out.")
    check_place(folder)
    population = _read(options)
    network, shape = _network(options, population)
    program = None if network is None else architectures.program_of(network(), shape)
    known = {**asdict(replace(options, out=None)), "names": population.names}
    digest = sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
    with locked(folder):
        older = read_manifest(folder)
        if older is not None and older["digest"] != digest:
            raise ZooError(f"{folder} holds another zoo. Choose another --out, or delete it.")
        _write(options, population, program, Building(folder, digest))
    return load_zoo(folder)


def _read(options: AdoptOptions) -> Population:
    common = {"limit": options.limit, "drop_nonfinite": options.drop_nonfinite}
    epochs = "last" if options.epochs is None else options.epochs
    readers = {
        "folder": partial(checkpoint_folder.read, **common),
        "schuerholt": partial(schuerholt.read, epochs=epochs, **common),
        "unterthiner": partial(unterthiner.read, activation=options.activation, **common),
    }
    return readers[options.layout](options.source)


def _network(
    options: AdoptOptions, population: Population
) -> tuple[Callable[[], nn.Module] | None, tuple[int, ...]]:
    """The architecture that was asked for, or that the layout tells, if any."""
    if options.architecture is None:
        return population.network, population.input_shape or ()
    build = partial(architectures.build, options.architecture, widths=options.widths)
    network = partial(build, options.shape, options.outputs)
    expected = {key: tuple(t.shape) for key, t in network().state_dict().items()}
    found = {key: tuple(t.shape[1:]) for key, t in population.weights.items()}
    if found != expected:
        key = next(k for k in {**expected, **found} if found.get(k) != expected.get(k))
        raise ConfigError(
            f"architecture: {options.architecture!r} has {key!r} of shape {expected.get(key)}, "
            f"the networks of {options.source} have {found.get(key)}. Name theirs, or none."
        )
    return network, options.shape


def _write(
    options: AdoptOptions, population: Population, program: Program | None, building: Building
) -> None:
    done = building.open()
    groups: dict[str, list[str]] = {}
    for name, families in _dealt(options, len(population.names)).items():
        members = families.shape[1]
        for rows in families.split(max(1, SHARD // members)):
            key = sha256(f"{building.digest}/{name}/{rows.tolist()}".encode()).hexdigest()[:24]
            groups.setdefault(name, []).append(key)
            if key in done:
                continue
            metrics = {k: t.float() for k, t in _taken(population.metrics, rows).items()}
            records = {"source": rows, **metrics}
            tensors = {"weights": _taken(population.weights, rows), "records": records}
            building.add(key, tensors, members=members)
    source = {
        "layout": options.layout,
        "folder": str(Path(options.source).resolve()),
        "names": list(population.names),
        "notes": list(population.notes),
    }
    manifest = {
        "digest": building.digest,
        "options": None,
        "task": None,
        "program": None if program is None else program.to_json(),
        "source": source,
    }
    building.finish(groups, manifest)


def _dealt(options: AdoptOptions, count: int) -> dict[str, torch.Tensor]:
    """Group -> networks of its families, ``[f, m]``; no network is in two parts."""
    generator = torch.Generator().manual_seed(options.seed)
    order = torch.randperm(count, generator=generator)
    ends = [round(count * sum(options.shares[: i + 1])) for i in range(3)]
    dealt = {}
    for part, start, end in zip(FAMILY_PARTS, [0, *ends], ends, strict=False):
        for members in options.members:
            families = (end - start) // members
            if families:
                own = order[start : start + families * members]
                dealt[group_name(part, members)] = own.reshape(families, members)
    if not dealt:
        raise ConfigError(
            f"members: {count} networks make no family of {min(options.members)} in any part. "
            "Ask for fewer members, or for one part alone: --shares 1 0 0."
        )
    return dealt


def _taken(tensors: Weights, rows: torch.Tensor) -> Weights:
    return {key: tensor[rows] for key, tensor in tensors.items()}


def _on_command(options: AdoptOptions) -> None:
    console, zoo = Console(), adopt(options)
    for note in zoo.manifest["source"]["notes"]:
        console.print(f"[bold]note[/] {note}", highlight=False)
    families = {name: group["families"] for name, group in zoo.groups.items()}
    console.print(f"[bold]zoo[/] {zoo.folder}: families {families}")
    address = f"{zoo.folder}#{next(iter(zoo.groups))}/0"
    console.print(f'[bold]next[/] python -m zoo.show --zoo {zoo.folder}, or merge("{address}")')


def main() -> None:
    """Entry point of ``python -m zoo.adopt``."""
    command(AdoptOptions, _on_command, prog="python -m zoo.adopt")


if __name__ == "__main__":
    main()
