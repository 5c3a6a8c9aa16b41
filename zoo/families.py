"""What families are made of before they are trained: segments, seeds, hyper-parameters, variants.

Everything about a family follows from the seed of its zoo and from its own place, so any shard can
be made at any time, anywhere, and is the same.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor

from metamerge.errors import ZooError
from zoo.parts import TaskSplit
from zoo.recipe import ZooOptions
from zoo.splits import SHARING, SPLITS, validate
from zoo.variants import Variants, draw_classes, draw_places

_SEEDS = 2**61  # inits of controls lie beyond


@dataclass(frozen=True, eq=False)
class Drawn:
    """Families that wait for their training, ``n = f * m`` members one family after the other.

    Attributes:
        segments: Rows of the task that each member learns from.
        held_back: Those of them that it is only judged on; None without early stopping.
        init_seeds: Seed of each member's init.
        order_seeds: Seed of the order in which it meets its rows.
        hyper: ``epochs``, ``lr`` and ``weight_decay``, each float64 ``[n]``.
        augmented: Whether a member's segment is augmented, bool ``[n]``.
        variants: What the families know the task as.
    """

    segments: list[Tensor]
    held_back: list[Tensor] | None
    init_seeds: list[int]
    order_seeds: list[int]
    hyper: dict[str, Tensor]
    augmented: Tensor
    variants: Variants


def draw_families(
    options: ZooOptions,
    split: TaskSplit,
    place: tuple[str, int],
    families: Sequence[int],
    given: dict[str, Tensor],
) -> Drawn:
    """Draw families.

    Args:
        options: Of the zoo.
        split: Its task.
        place: Part of the zoo and members per family.
        families: Numbers of the families in that part.
        given: What the zoo's split asks for beside rows; see ``zoo.reference``.

    Returns:
        The families.

    Raises:
        ZooError: If segments cannot be cut.
        ConfigError: If the options of the split make no sense.
    """
    part, members = place
    segments, inits, orders = [], [], []
    drawn: dict[str, list[Tensor]] = {name: [] for name in ("epochs", "lr", "weight_decay")}
    classes, places, augmented = [], [], []
    for family in families:
        generator = _generator(options.seed, part, members, family)
        known, origin = _variant(options, split, generator)
        variants = Variants(*(None if m is None else m[None] for m in (known, origin)))
        rows = variants.known(0, split.rows("segments"), split.task.targets)
        segments += cut_segments(options, split, rows, members, generator, given)
        seeds = torch.randint(_SEEDS, (2, members), generator=generator)
        inits += (seeds[0] if options.init == "own" else seeds[0, :1].expand(members)).tolist()
        orders += seeds[1].tolist()
        for name, values in drawn.items():
            values.append(_between(getattr(options, name), members, generator))
        augmented.append(torch.rand(members, generator=generator) < options.augment_share)
        classes.append(known)
        places.append(origin)
    kept = [None if maps[0] is None else torch.stack(maps) for maps in (classes, places)]
    learned, held_back = _hold_back(segments, options) if options.patience else (segments, None)
    return Drawn(
        segments=learned,
        held_back=held_back,
        init_seeds=inits,
        order_seeds=orders,
        hyper={name: torch.cat(values) for name, values in drawn.items()},
        augmented=torch.cat(augmented) & bool(options.augment),
        variants=Variants(*kept),
    )


def _generator(seed: int, part: str, members: int, family: int) -> torch.Generator:
    place = sha256(f"{seed}/{part}/{members}/{family}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(place[:7], "big"))


def _variant(
    options: ZooOptions, split: TaskSplit, generator: torch.Generator
) -> tuple[Tensor | None, Tensor | None]:
    """Maps of the classes and of the places of one family."""
    classes = places = None
    if options.relabel or options.classes_per_family:
        classes = draw_classes(
            split.task.classes, options.classes_per_family, options.relabel, generator
        )
    if options.permute_pixels or options.flip_families:
        shape = tuple(split.task.inputs.shape[1:])
        places = draw_places(shape, options.permute_pixels, options.flip_families, generator)
    return classes, places


def cut_segments(
    options: ZooOptions,
    split: TaskSplit,
    rows: Tensor,
    members: int,
    generator: torch.Generator,
    given: dict[str, Tensor],
) -> list[Tensor]:
    """Cut rows as a zoo's split does.

    Args:
        options: Of the zoo; ``split`` names the way, others are options of one way or another.
        split: Its task.
        rows: The rows to cut, int64 ``[rows]``.
        members: Number of segments.
        generator: Source of randomness.
        given: What the zoo's split asks for beside rows; see ``zoo.reference``.

    Returns:
        One tensor of row numbers per member, int64 ``[segment rows]``.

    Raises:
        ZooError: If segments cannot be cut.
    """
    if options.pool < 1:
        count = max(1, round(options.pool * len(rows)))
        rows = rows[torch.randperm(len(rows), generator=generator)[:count]]
    size = options.segment_size or None
    known = {
        **{name: getattr(options, name) for name in ("share", "classes_per_segment", "algorithm")},
        **{name: getattr(options, name) for name in ("linkage", "neighbours", "covariance")},
        **given,
        "min_cluster_size": options.min_cluster_size,
        "alpha": float(_between(options.alpha, 1, generator)),
        "size": size,
        # members draw their own images: eight segments of 300 do not fit into small tasks otherwise
        "overlap": size is not None,
    }
    cut = SPLITS[options.split]
    asked = {name: known[name] for name in inspect.signature(cut).parameters if name in known}
    targets = split.task.targets
    try:
        segments = cut(targets, rows, members, generator=generator, **asked)
    except ZooError as error:
        raise ZooError(
            f"{error} Families of {split.task.name!r} are cut from {len(rows)} rows, once test "
            "rows and those of --objective are set aside."
        ) from error
    validate(segments, rows, disjoint=options.split not in SHARING)
    return segments


def _between(ends: tuple[float, ...], count: int, generator: torch.Generator) -> Tensor:
    """Values between two ends, even on a log scale where both are above 0; float64 ``[count]``."""
    low, high = ends[0], ends[-1]
    if low == high:
        return torch.full((count,), low, dtype=torch.float64)
    drawn = torch.rand(count, generator=generator, dtype=torch.float64)
    if low > 0:
        return (math.log(low) + drawn * (math.log(high) - math.log(low))).exp()
    return low + drawn * (high - low)


def _hold_back(segments: list[Tensor], options: ZooOptions) -> tuple[list[Tensor], list[Tensor]]:
    """Take the rows that early stopping looks at out of every segment, at least one."""
    counts = [min(len(own) - 1, max(1, round(options.hold_back * len(own)))) for own in segments]
    small = min(map(len, segments))
    if small < 2:
        raise ZooError(
            f"A segment has {small} row, and --patience holds rows back. Make segments larger."
        )
    pairs = [(own[count:], own[:count]) for own, count in zip(segments, counts, strict=True)]
    return [learned for learned, _ in pairs], [kept for _, kept in pairs]
