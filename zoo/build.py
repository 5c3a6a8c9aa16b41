"""Build a zoo: ``python -m zoo.build --task digits --members 2 4 8``.

Families of K networks, each trained on a segment of its own, all of them at once. A zoo is rebuilt
only when an option that shapes it has changed.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from hashlib import sha256
from math import inf
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from metamerge.errors import ConfigError, MetaMergeError, ZooError
from metamerge.weights import Weights
from zoo import architectures
from zoo.options import parse
from zoo.parts import TaskSplit, split_task
from zoo.splits import SPLITS, describe
from zoo.store import FAMILY_PARTS, Zoo, check_place, load_zoo, pad_rows, read_manifest, write_zoo
from zoo.tasks import load_task
from zoo.training import init_networks, predict, train_networks

PLACES = ("out", "data")  # options that say where things lie, not what they are
SEEDS = 2**31  # beyond it the seeds of inits and orders would leave the range of torch's


@dataclass(frozen=True)
class ZooOptions:
    """Build a zoo of families of segment checkpoints."""

    task: str = "digits"  # digits, mnist or fashion-mnist
    data: str | None = None  # folder with the task's files, where it needs some
    out: str | None = None  # folder of the zoo; zoos/<task>, with a digest where options differ
    objective: int = 400  # labelled images kept back for mergers, a quarter of them for validation
    architecture: str = "mlp"  # mlp or cnn
    widths: tuple[int, ...] = (32,)  # units or channels per hidden layer
    split: str = "dirichlet"  # how segments are cut: dirichlet or disjoint
    alpha: float = 0.4  # class skew of dirichlet segments; the smaller, the stronger
    segment_size: int = 300  # images per segment; 0 deals every image to exactly one member
    init: str = "own"  # own: every member its own init; shared: one per family
    members: tuple[int, ...] = (2, 4, 8)  # members per family; one set of families for each
    train_families: int = 100  # families that mergers are trained on, per number of members
    validation_families: int = 24  # families that training is judged on
    test_families: int = 24  # families that nothing but the comparison sees
    epochs: float = 30.0  # passes of each member over its segment
    batch_size: int = 32  # images per step
    lr: float = 0.01  # learning rate of Adam at the start; falls to zero
    weight_decay: float = 0.0  # decoupled weight decay
    seed: int = 0  # seed of splits, inits and order of images

    def __post_init__(self) -> None:
        """Refuse options that make no sense.

        Raises:
            ConfigError: Naming the option.
        """
        for name, allowed in (("split", tuple(SPLITS)), ("init", ("own", "shared"))):
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(f"{name}: got {value!r}, expected one of {allowed}.")
        if self.architecture not in architectures.ARCHITECTURES:
            known = sorted(architectures.ARCHITECTURES)
            raise ConfigError(f"architecture: got {self.architecture!r}, expected one of {known}.")
        if not self.members or min(self.members) < 1 or len(set(self.members)) < len(self.members):
            raise ConfigError(f"members: expected different numbers from 1 on, got {self.members}.")
        counts = ("train_families", "validation_families", "test_families", "batch_size")
        for name in (*counts, "epochs", "lr", "alpha"):
            if not 0 < getattr(self, name) < inf:
                raise ConfigError(f"{name}: expected more than 0, got {getattr(self, name)}.")
        for name in ("segment_size", "weight_decay"):
            if not 0 <= getattr(self, name) < inf:
                raise ConfigError(f"{name}: expected 0 or more, got {getattr(self, name)}.")
        if min(self.widths, default=1) < 1:
            raise ConfigError(f"widths: expected numbers from 1 on, got {self.widths}.")
        if not 0 <= self.seed < SEEDS:
            raise ConfigError(f"seed: expected 0 to {SEEDS - 1}, got {self.seed}.")

    @property
    def digest(self) -> str:
        """Hash of everything that shapes the zoo."""
        return sha256(json.dumps(self.shaping, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def shaping(self) -> dict[str, Any]:
        """The options that shape the zoo, as JSON gives them back."""
        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in PLACES}
        numbers = {f.name: float(kept[f.name]) for f in fields(self) if f.type is float}
        return json.loads(json.dumps(kept | numbers))  # 5 epochs are 5.0 epochs

    @property
    def folder(self) -> Path:
        """Where the zoo lies."""
        usual = ZooOptions(task=self.task).digest == self.digest
        return Path(self.out or f"zoos/{self.task}{'' if usual else '-' + self.digest[:8]}")


def options_from(record: Mapping[str, Any]) -> ZooOptions:
    """Options as a manifest or a card records them.

    Args:
        record: Name -> value, as JSON gives it back.

    Returns:
        The options.

    Raises:
        ZooError: If they are not options of this version.
    """
    told = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
    try:
        return ZooOptions(**told)
    except TypeError as error:
        raise ZooError(
            f"These options of a zoo are of another version ({error}). Build the zoo again."
        ) from error


def split_of(zoo: Zoo) -> TaskSplit:
    """The task of a zoo and its parts, as they were when it was built.

    Args:
        zoo: The zoo.

    Returns:
        The split.

    Raises:
        ZooError: If the task's data are not those that the zoo was built on.
    """
    split = _split(options_from(zoo.options))
    told, found = zoo.manifest["task"]["digest"], split.task.digest
    if told != found:
        raise ZooError(
            f"{zoo.folder} was built on other data of task {split.task.name!r}: their digest is "
            f"{told[:12]}, that of the data found now {found[:12]}. Get those data, or build anew."
        )
    return split


def _split(options: ZooOptions) -> TaskSplit:
    task = load_task(options.task, options.data)
    return split_task(task, seed=options.seed, objective=options.objective)


def build(options: ZooOptions, *, progress: Callable[[str, int, int], None] | None = None) -> Zoo:
    """Build a zoo, or open it if it is there already with the same options.

    Args:
        options: What to build.
        progress: Called with (what, networks done, networks in all).

    Returns:
        The zoo.

    Raises:
        ZooError: If segments cannot be cut, members diverge, or the folder holds a zoo of other
            options or something else, or cannot be written.
    """
    folder = options.folder
    check_place(folder)  # before the lock: a place that is refused is left as it was
    with _locked(folder):
        found = read_manifest(folder)
        if found is not None and found["digest"] == options.digest:
            return load_zoo(folder)
        if found is not None and options.out is not None:
            told = found["options"]
            differ = [k for k, v in options.shaping.items() if k not in told or told[k] != v]
            raise ZooError(
                f"{folder} holds a zoo with other options ({', '.join(differ)}). Choose another "
                "--out, or delete it."
            )
        return _build(options, folder, progress)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One builder at a time for a folder; the lock lies beside it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / f".{folder.name}.lock")
        lock.acquire()
    except OSError as error:
        raise ZooError(f"{folder} cannot be written: {error}. Choose another --out.") from error
    try:
        yield
    finally:
        lock.release()


def _build(
    options: ZooOptions, folder: Path, progress: Callable[[str, int, int], None] | None
) -> Zoo:
    split = _split(options)
    shape, classes = split.task.inputs.shape[1:], split.task.classes

    def network() -> torch.nn.Module:
        return architectures.build(options.architecture, shape, classes, widths=options.widths)

    program = architectures.program_of(network(), shape)
    generator = torch.Generator().manual_seed(options.seed)
    total = sum(options.members) * sum(_count(options, part) for part in FAMILY_PARTS)
    done, next_seed = 0, options.seed * 10_000_019
    files, rows = {}, {}
    for part in FAMILY_PARTS:
        for members in options.members:
            families = _count(options, part)
            segments = [
                segment
                for _ in range(families)
                for segment in _segments(options, split, members, generator)
            ]
            seeds = _init_seeds(options, families, members, next_seed)
            next_seed = max(seeds) + 1

            report = progress and partial(progress, f"{part} families of {members}", total=total)
            with split.training():
                weights = train_networks(
                    program,
                    init_networks(network, seeds),
                    split.task.inputs,
                    split.task.targets,
                    segments,
                    epochs=options.epochs,
                    batch_size=options.batch_size,
                    lr=options.lr,
                    weight_decay=options.weight_decay,
                    seed=next_seed % SEEDS,
                    progress=report
                    and (lambda trained, report=report, done=done: report(done=done + trained)),
                )
                _check_converged(weights, options)
                accuracy = _accuracy(program, weights, *split.images("validation"))
            done += len(seeds)
            stem = f"{part}-k{members}"
            stacked = {key: t.unflatten(0, (families, members)) for key, t in weights.items()}
            origin = _provenance(seeds, segments, accuracy, split, families, members)
            files[stem] = (stacked, origin)
            rows[stem] = pad_rows(segments, families, members)
    manifest = {
        "digest": options.digest,
        "options": asdict(options),
        "task": {"name": split.task.name, "digest": split.task.digest, "classes": classes},
        "program": program.to_json(),
    }
    return write_zoo(folder, files, rows, manifest)


def _check_converged(weights: Weights, options: ZooOptions) -> None:
    if not all(t.isfinite().all() for t in weights.values() if t.is_floating_point()):
        raise ZooError(f"Some members diverged at lr={options.lr}. Build with a smaller --lr.")


def _count(options: ZooOptions, part: str) -> int:
    return getattr(options, f"{part}_families")


def _segments(
    options: ZooOptions, split: TaskSplit, members: int, generator: torch.Generator
) -> list[Tensor]:
    rows, targets = split.rows("segments"), split.task.targets
    size = options.segment_size or None
    if options.split == "disjoint":
        return SPLITS["disjoint"](targets, rows, members, size=size, generator=generator)
    # each member draws its own images: eight segments of 300 do not fit into small tasks otherwise
    return SPLITS["dirichlet"](
        targets,
        rows,
        members,
        alpha=options.alpha,
        size=size,
        overlap=size is not None,
        generator=generator,
    )


def _init_seeds(options: ZooOptions, families: int, members: int, start: int) -> list[int]:
    """One init seed per member, family after family; no seed is used in two families."""
    if options.init == "shared":
        return [start + family for family in range(families) for _ in range(members)]
    return list(range(start, start + families * members))


def _accuracy(program: Any, weights: Weights, inputs: Tensor, targets: Tensor) -> Tensor:
    return (predict(program, weights, inputs).argmax(-1) == targets).float().mean(1)


def _provenance(
    seeds: list[int],
    segments: list[Tensor],
    accuracy: Tensor,
    split: TaskSplit,
    families: int,
    members: int,
) -> list[list[dict[str, Any]]]:
    counts = describe(segments, split.task.targets, split.task.classes)
    flat = [
        {
            "init_seed": seed,
            "rows": len(segment),
            "rows_per_class": count.tolist(),
            "validation_accuracy": round(float(score), 4),
        }
        for seed, segment, count, score in zip(seeds, segments, counts, accuracy, strict=True)
    ]
    return [flat[f * members : (f + 1) * members] for f in range(families)]


def build_with_progress(options: ZooOptions, console: Console | None = None) -> Zoo:
    """``build`` with a progress bar and a closing line in the terminal.

    Args:
        options: What to build.
        console: Where to print.

    Returns:
        The zoo.
    """
    console = console or Console()
    started = time.perf_counter()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=console.quiet) as bar:
        task = bar.add_task("zoo", total=None)
        zoo = build(
            options,
            progress=lambda what, done, total: bar.update(
                task, description=f"zoo: {what}", completed=done, total=total
            ),
        )
    networks = sum(e["families"] * e["members"] for e in zoo.manifest["files"].values())
    seconds = time.perf_counter() - started
    console.print(f"[bold]zoo[/] {zoo.folder}: {networks} networks ready in {seconds:.1f} s")
    return zoo


def main() -> None:
    """Entry point of ``python -m zoo.build``."""
    options = parse(ZooOptions, prog="python -m zoo.build")
    try:
        build_with_progress(options)
    except MetaMergeError as error:
        print(f"zoo.build: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error


if __name__ == "__main__":
    main()
