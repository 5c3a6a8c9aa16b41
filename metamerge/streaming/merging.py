"""``merge_files()``: merge checkpoints of any size, a few tensors at a time.

What does the merging are the registered methods, called on state dicts of one tensor, or of a part
of one where a method treats every entry alike.
"""

import errno
import os
import re
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metamerge.checkpoints import check_output
from metamerge.checkpoints.lazy import LazyCheckpoint, StoredTensor, open_lazily
from metamerge.checkpoints.opening import display
from metamerge.checkpoints.shard_writing import Form, Shard, nbytes, plan_shards
from metamerge.checkpoints.writing import whole_folder, write_manifest
from metamerge.declaration import bind, check_options
from metamerge.errors import ConfigError
from metamerge.registry import MergeMethod, get_method
from metamerge.streaming.pipeline import Fuse, stream
from metamerge.weights import Weights, check_compatible, strip_wrappers

_AT_HAND = {"base", "generator", "report"}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def merge_files(
    checkpoints: Iterable[str | os.PathLike],
    folder: str | os.PathLike,
    *,
    method: str = "average",
    base: str | os.PathLike | None = None,
    shard_size: str | int = "5GB",
    overwrite: bool = False,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Merge safetensors checkpoints that need not fit into memory into a new folder.

    Members are merged as they are: there is no alignment. Memory is needed for about three tensors
    of every member; methods that treat every entry alike, such as ``average``, get by with less
    than 100 MB. Running statistics, integer tensors and dtypes follow the rules of ``merge``.

    Args:
        checkpoints: Safetensors files, indexes of shards, or folders that hold one of these.
        folder: Where the result is written, as ``model.safetensors`` or as shards with an index,
            and ``manifest.json``. Nothing is visible there before all of it is.
        method: A method that can look at tensors one by one, such as ``average``,
            ``weighted_average``, ``slerp``, ``karcher_mean``, ``task_arithmetic``, ``ties``,
            ``dare``, ``breadcrumbs`` or ``model_stock``.
        base: The checkpoint that the members were fine-tuned from, for methods that want it.
        shard_size: Largest size of a file, in bytes or such as ``"500MB"``; a larger tensor gets a
            file of its own.
        overwrite: Whether a checkpoint that was written there before may be replaced.
        seed: Seed of methods that draw.
        **options: Options of the method. Those that it needs to look at tensors one by one, such
            as ``scope="tensor"``, are set.

    Returns:
        Report: method, options, members, tensors, bytes read and written, shards, seconds.

    Raises:
        ConfigError: If the method cannot work tensor by tensor, an option is wrong, or the folder
            holds something already or one of the checkpoints.
        CheckpointError: If a checkpoint is damaged, or holds NaN; what was written is removed.
        IncompatibleWeights: If the checkpoints differ in keys or shapes.
        OSError: If the disk is full.
    """
    clock = time.perf_counter()
    sources = [checkpoints] if isinstance(checkpoints, str | os.PathLike) else list(checkpoints)
    every = [*sources, *([] if base is None else [base])]
    target = check_output(folder, overwrite=overwrite, sources=every)
    record, chosen = _usable(method, options, len(sources), based=base is not None)
    opened = _compatible([open_lazily(source) for source in every])
    members = opened[: len(sources)]
    shards = plan_shards(_forms(members), _bytes(shard_size))
    _check_room(target, shards)
    if len(members) == 1:  # as merge() has it: one checkpoint comes back as it is
        record, chosen = get_method("average"), {}
    read = [c.tensors for c in (opened if "base" in record.resources else members)]
    fuse = _fuser(record, chosen, len(members), seed)
    with whole_folder(target, overwrite=overwrite) as partial:
        drawing = "generator" in record.resources  # the same draws need the same order
        digests = stream(read, shards, partial, fuse, pointwise=record.pointwise, in_order=drawing)
        report = {
            "method": record.name,
            "options": chosen,
            "members": [member.name for member in members],
            "seed": seed,
            "tensors": len(read[0]),
            "bytes_read": sum(t.entry.nbytes for tensors in read for t in tensors.values()),
            "bytes_written": sum(map(nbytes, shards)),
            "shards": len(shards),
            "seconds": round(time.perf_counter() - clock, 4),
        }
        write_manifest(partial, digests, metadata={"merge": report}, program=members[0].program)
    return report


def _usable(
    method: str, options: Mapping[str, Any], members: int, *, based: bool
) -> tuple[MergeMethod, dict[str, Any]]:
    """The method and its options; what it would refuse is refused before any work is done."""
    record = get_method(method)
    check_options(record, options)
    if record.per_tensor is None or record.required - _AT_HAND:
        raise ConfigError(f"{method} cannot work tensor by tensor. Use merge().")
    for name, needed in record.per_tensor.items():
        if options.get(name, needed) != needed:
            raise ConfigError(
                f"{method}: {name}={options[name]!r} looks at all tensors at once. Use merge(), or "
                f"{name}={needed!r}."
            )
    if not members:
        raise ConfigError("checkpoints: got none. Pass at least one path.")
    chosen = {**record.per_tensor, **options}
    resources = {"generator": torch.Generator(), "base": {"": torch.ones(2)} if based else None}
    record.function([{"": torch.ones(2)}] * members, **bind(record, resources, chosen))
    return record, chosen


def _compatible(opened: Sequence[LazyCheckpoint]) -> list[LazyCheckpoint]:
    """Checkpoints under common names of tensors, in the order of the first."""
    named = strip_wrappers([(c.name, dict(c.tensors)) for c in opened])
    empty: dict[Form, Tensor] = {}  # what is compared: without memory, one per form

    def outline(tensors: Mapping[str, StoredTensor]) -> Weights:
        forms = {key: (t.entry.dtype, t.entry.shape) for key, t in tensors.items()}
        for dtype, shape in set(forms.values()) - empty.keys():
            empty[dtype, shape] = torch.empty(shape, dtype=dtype, device="meta")
        return {key: empty[form] for key, form in forms.items()}

    check_compatible([(name, outline(tensors)) for name, tensors in named])
    return [
        replace(checkpoint, tensors={key: tensors[key] for key in named[0][1]})
        for (_, tensors), checkpoint in zip(named, opened, strict=True)
    ]


def _forms(members: Sequence[LazyCheckpoint]) -> dict[str, Form]:
    """Dtype and shape of every tensor of the result."""
    kinds = {
        key: reduce(torch.promote_types, (member.tensors[key].entry.dtype for member in members))
        for key in members[0].tensors
    }
    return {key: (kind, members[0].tensors[key].entry.shape) for key, kind in kinds.items()}


def _fuser(record: MergeMethod, options: Mapping[str, Any], members: int, seed: int) -> Fuse:
    generator = torch.Generator().manual_seed(seed)

    def fuse(key: str, tensors: list[Tensor]) -> Tensor:
        weights = [{key: tensor} for tensor in tensors[:members]]
        resources = {"generator": generator, "base": {key: tensors[-1]}}
        with torch.no_grad():
            return record.function(weights, **bind(record, resources, options))[key]

    return fuse


def _bytes(size: str | int) -> int:
    match = re.fullmatch(r"(\d+)\s*([KMGT]B)", size.upper()) if isinstance(size, str) else None
    number = int(match[1]) * _UNITS[match[2]] if match else size
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ConfigError(f"shard_size: got {size!r}, expected bytes, or such as '500MB' or '5GB'.")
    return number


def _check_room(target: Path, shards: Sequence[Shard]) -> None:
    needed = sum(map(nbytes, shards))
    place = next(folder for folder in target.parents if folder.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{display(target)}: the result needs {needed} bytes, {free} are free. Choose another "
            f"folder",
        )
