"""What a zoo is made of: every option of ``python -m zoo.build``, checked before anything runs."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from hashlib import sha256
from inspect import Parameter, signature
from math import inf
from pathlib import Path
from typing import Any

from torch import nn

from metamerge.errors import ConfigError, ZooError
from zoo import architectures
from zoo.augmentation import Augmentation
from zoo.splits import SPLITS
from zoo.splits.algorithms import COVARIANCES, LINKAGES
from zoo.splits.clusters import ALGORITHMS
from zoo.tasks import Task

PLACES = ("out", "data")  # options that say where things lie, not what they are
COUNTS = ("members", "train_families", "validation_families", "test_families")
SEEDS = 2**31
CLUSTERED = ("inputs", "important", "labels", "targets", "errors", "activations")
REPEATING = ("clusters", "difficulty", "bins")  # splits that cut equal rows equally
PRECISIONS = ("float32", "bfloat16")
_RANGES = ("alpha", "epochs", "lr", "weight_decay")
_ABOVE_ZERO = (
    "train_families",
    "objective",
    "neighbours",
    "min_cluster_size",
    "batch_size",
    "epochs",
    "lr",
    "alpha",
    "classes_per_segment",
    "pool",
)
_FROM_ZERO = (
    *("segment_size", "weight_decay", "shared_steps", "patience", "snapshots", "shard"),
    *("classes_per_family", "reference_epochs", "validation_families", "test_families"),
)


@dataclass(frozen=True)
class ZooOptions:
    """Build a zoo of families of segment checkpoints.

    Where an option takes "one or two numbers", two are the ends of a range: every member (alpha:
    every family) draws its own value, learning rates, decays and alphas evenly on a log scale.
    """

    task: str = "digits"  # a data set by name, or your own .csv, .parquet or .npz file
    data: str | None = None  # folder with the task's files, where it needs some
    target: str | None = None  # column to predict, of your own file
    kind: str = "auto"  # auto, classification or regression, for your own file
    drop: tuple[str, ...] = ()  # columns of your own file to leave out
    out: str | None = None  # folder of the zoo; zoos/<task>, with a digest where options differ
    objective: int = 400  # labelled images kept back for mergers, a quarter of them for validation
    architecture: str = "mlp"  # mlp, cnn, convnet, resnet8, resnet20, or package.module:factory
    widths: tuple[int, ...] | None = None  # units or channels per hidden layer
    norm: str | None = None  # layer or batch, for ResNets
    split: str = "dirichlet"  # how segments are cut: see docs/zoo.md
    alpha: tuple[float, ...] = (0.4,)  # skew of dirichlet and quantity, the smaller the stronger
    segment_size: int = 300  # images per segment; 0 deals every image to exactly one member
    pool: float = 1.0  # share of the images that a family is cut from, drawn anew for each
    share: float = 0.5  # overlapping: part of every segment that all members hold
    classes_per_segment: int = 2  # classes: how many every member holds
    algorithm: str = "kmeans"  # clusters: kmeans, agglomerative, spectral, hdbscan or gmm
    linkage: str = "ward"  # agglomerative: ward, complete, average or single
    neighbours: int = 10  # spectral: neighbours in its graph
    min_cluster_size: int = 10  # hdbscan: smallest cluster
    covariance: str = "full"  # gmm: full, tied, diag or spherical
    by: str = "inputs"  # clusters of: inputs, important, labels, targets, errors or activations
    reference_epochs: float = 5.0  # training of the reference network of errors and difficulty
    init: str = "own"  # own: every member its own init; shared: one per family
    shared_steps: int = 0  # steps that a family with shared init takes together before it parts
    augment: tuple[str, ...] = ()  # flip (doubles a segment), shift=2, noise=0.1
    augment_share: float = 1.0  # share of members whose segment is augmented
    relabel: bool = False  # permute the classes of every family
    classes_per_family: int = 0  # families know that many classes, drawn for each; 0: all
    permute_pixels: bool = False  # permute the places of every family's inputs
    flip_families: bool = False  # mirror the images of half of the families
    members: tuple[int, ...] = (2, 4, 8)  # members per family; one set of families for each
    train_families: int = 100  # families that mergers are trained on, per number of members
    validation_families: int = 24  # families that training is judged on
    test_families: int = 24  # families that nothing but the comparison sees
    epochs: tuple[float, ...] = (30.0,)  # passes of a member over its segment, one or two numbers
    batch_size: int = 32  # images per step
    lr: tuple[float, ...] = (0.01,)  # AdamW's rate at the start, falls to 0; one or two numbers
    weight_decay: tuple[float, ...] = (0.0,)  # decoupled weight decay, one or two numbers
    patience: int = 0  # epochs without progress after which a member stops; 0 never
    hold_back: float = 0.1  # share of its segment that a member with patience is judged on
    snapshots: int = 0  # weights to keep of every member on its way
    precision: str = "float32"  # of products: float32 or bfloat16
    shard: int = 0  # members that are trained and stored as one piece; 0 goes by their work
    seed: int = 0  # seed of splits, inits and order of images

    def __post_init__(self) -> None:
        """Take single numbers for ranges, and refuse options that make no sense.

        Raises:
            ConfigError: Naming the option.
        """
        for name in _RANGES:
            value = getattr(self, name)
            ends = tuple(map(float, value if isinstance(value, tuple | list) else (value,)))
            object.__setattr__(self, name, ends)
            if len(ends) not in (1, 2) or ends[0] > ends[-1]:
                raise ConfigError(f"{name}: expected one number or a range of two, got {value}.")
        self._check_choices()
        self._check_numbers()
        self._check_split()
        architectures.factory_of(self.architecture)
        Augmentation.parse(self.augment)

    def _check_choices(self) -> None:
        choices = {
            "split": tuple(SPLITS),
            "init": ("own", "shared"),
            "algorithm": ALGORITHMS,
            "linkage": LINKAGES,
            "covariance": COVARIANCES,
            "by": CLUSTERED,
            "precision": PRECISIONS,
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(f"{name}: got {value!r}, expected one of {allowed}.")

    def _check_numbers(self) -> None:
        if not self.members or min(self.members) < 1 or len(set(self.members)) < len(self.members):
            raise ConfigError(f"members: expected different numbers from 1 on, got {self.members}.")
        for names, least in ((_ABOVE_ZERO, "more than 0"), (_FROM_ZERO, "0 or more")):
            for name in names:
                value = getattr(self, name)
                low, high = (value[0], value[-1]) if isinstance(value, tuple) else (value, value)
                if not (0 <= low <= high < inf) or (low == 0 and names is _ABOVE_ZERO):
                    raise ConfigError(f"{name}: expected {least}, got {value}.")
        for name in ("pool", "augment_share", "share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}: expected a share up to 1, got {getattr(self, name)}.")
        if not 0 < self.hold_back < 1:
            raise ConfigError(f"hold_back: expected a share below 1, got {self.hold_back}.")
        if min(self.widths or (1,)) < 1:
            raise ConfigError(f"widths: expected numbers from 1 on, got {self.widths}.")
        if not 0 <= self.seed < SEEDS:
            raise ConfigError(f"seed: expected 0 to {SEEDS - 1}, got {self.seed}.")

    def _check_split(self) -> None:
        several = sum(map(self.families, ("train", "validation", "test"))) > 1
        if self.split in REPEATING and several and not self.segment_size and self.pool == 1:
            raise ConfigError(
                f"split: {self.split!r} cuts equal rows into equal segments, so all families would "
                "share theirs. Give --segment-size, or --pool 0.8 to draw each family's rows anew."
            )
        if self.shared_steps and self.init != "shared":
            raise ConfigError(
                "shared_steps: members part only from a shared init. Add --init shared."
            )

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
        name = Path(self.task).name.partition(".")[0] or "zoo"
        return Path(self.out or f"zoos/{name}{'' if usual else '-' + self.digest[:8]}")

    def families(self, part: str) -> int:
        """Number of families of one part, per number of members."""
        return getattr(self, f"{part}_families")


def factory_for(options: ZooOptions, task: Task, *, times: float = 1.0) -> Callable[[], nn.Module]:
    """The networks of a zoo, or networks of another width.

    Args:
        options: Of the zoo.
        task: What they learn.
        times: Their hidden widths, relative to those of the zoo.

    Returns:
        Makes a freshly initialised one.

    Raises:
        ConfigError: If other widths are asked for and the architecture has none to choose.
    """
    widths = options.widths if times == 1 else _scaled(options, times)
    return partial(
        architectures.build,
        options.architecture,
        tuple(task.inputs.shape[1:]),
        options.classes_per_family or task.outputs,
        widths=widths,
        norm=options.norm,
    )


def _scaled(options: ZooOptions, times: float) -> tuple[int, ...]:
    """Hidden widths times a factor, at least 1."""
    factory = architectures.factory_of(options.architecture)
    option = signature(factory).parameters.get("widths")
    widths = options.widths or (None if option is None else option.default)
    if not widths or widths is Parameter.empty:
        raise ConfigError(
            f"Architecture {options.architecture!r} has no widths to choose. Let its factory take "
            "them, as widths=(...)."
        )
    return tuple(max(1, round(times * width)) for width in widths)


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
    except (TypeError, ValueError) as error:
        raise ZooError(
            f"These options of a zoo are of another version ({error}). Build the zoo again."
        ) from error
