"""Read weights that are split over several safetensors files, as listed by an index."""

import os
from pathlib import Path

from metamerge.checkpoints.checkpoint import Checkpoint
from metamerge.checkpoints.files import read_file
from metamerge.checkpoints.opening import display, open_regular, read_json_object
from metamerge.checkpoints.safetensors_files import read_header
from metamerge.errors import TooLarge, Unreadable, Unsafe

INDEX_SUFFIX = ".safetensors.index.json"


def read_sharded(index: Path, max_bytes: int) -> Checkpoint:
    """Read all shards of an index into one checkpoint.

    Args:
        index: File ``<stem>.safetensors.index.json``; its shards lie in the same folder.
        max_bytes: Largest number of tensor bytes of all shards together.

    Returns:
        The checkpoint, tensors in the order of the index.

    Raises:
        Unsafe: If the index names a file outside its folder.
        Unreadable: If a shard or tensor is missing, unlisted or ambiguous.
        TooLarge: If the shards hold more than the limit.
        CheckpointError: If a shard is damaged.
        IncompatibleWeights: If a tensor cannot be merged.
    """
    document, weight_map = read_index(index, max_bytes)
    shards = sorted(set(weight_map.values()))
    parts = [read_file(index.parent / shard, max_bytes) for shard in shards]
    merged = {key: tensor for part in parts for key, tensor in part.weights.items()}
    if merged.keys() != weight_map.keys():
        raise Unreadable(f"{display(index)}: its shards changed while they were read. Try again.")
    metadata = document.get("metadata")
    return Checkpoint(
        name=display(index),
        weights={key: merged[key] for key in weight_map},
        program=parts[0].program,
        metadata=metadata if isinstance(metadata, dict) else {},
        verified=all(part.verified for part in parts),
    )


def read_index(index: Path, max_bytes: int) -> tuple[dict, dict[str, str]]:
    """Read an index and compare it with the headers of its shards; no tensor is read.

    Args:
        index: File ``<stem>.safetensors.index.json``; its shards lie in the same folder.
        max_bytes: Largest number of tensor bytes of all shards together.

    Returns:
        The whole document, and name of a tensor -> file name of its shard.

    Raises:
        Unsafe: If the index names a file outside its folder.
        Unreadable: If a shard or tensor is missing, unlisted or ambiguous.
        TooLarge: If the shards hold more than the limit.
        CheckpointError: If a shard is damaged.
        IncompatibleWeights: If a tensor cannot be merged.
    """
    document = read_json_object(index)
    weight_map = _weight_map(document, index)
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        _check_inside(shard, index)
    _check_present(shards, index)
    _check_listed(weight_map, shards, index, max_bytes)
    return document, weight_map


def _weight_map(document: dict, index: Path) -> dict[str, str]:
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise Unreadable(f"{display(index)}: needs a 'weight_map' from tensors to shards.")
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise Unreadable(f"{display(index)}: 'weight_map' must give a file name per tensor.")
    return weight_map


def _check_inside(shard: str, index: Path) -> None:
    """Refuse names that are not plain file names, and links that lead out of the folder."""
    plain = shard.endswith(".safetensors") and not set(shard) & set("/\\:\0")
    root = os.path.realpath(index.parent)
    if not plain or os.path.dirname(os.path.realpath(os.path.join(root, shard))) != root:
        raise Unsafe(
            f"{display(index)}: shard {shard[:200]!r} is not a safetensors file of its own folder. "
            f"Put all shards beside the index."
        )


def _check_present(shards: list[str], index: Path) -> None:
    """Check that all shards are there, and no unsharded file that might be newer or older."""
    missing = [shard for shard in shards if not os.path.exists(index.parent / shard)]
    if missing:
        raise Unreadable(
            f"{display(index)}: {len(missing)} shards are missing: {missing[:10]}. Download them."
        )
    single = index.name.removesuffix(".index.json")
    if single not in shards and os.path.lexists(index.parent / single):
        raise Unreadable(
            f"{display(index.parent)}: ambiguous: it holds both {single} and an index of shards. "
            f"Remove the one that is out of date, or give the file itself."
        )


def _check_listed(weight_map: dict[str, str], shards: list[str], index: Path, limit: int) -> None:
    """Compare the index with the headers of its shards, before any tensor is read."""
    found, total = {}, 0
    for shard in shards:
        path = index.parent / shard
        with open_regular(path) as file:
            header = read_header(file, display(path), limit)
        repeated = [key for key in header.entries if key in found]
        if repeated:
            raise Unreadable(f"{display(path)}: {repeated[:10]} are in another shard too.")
        found |= dict.fromkeys(header.entries, shard)
        total += sum(entry.nbytes for entry in header.entries.values())
    absent = [key for key, shard in weight_map.items() if found.get(key) != shard]
    unlisted = [key for key in found if key not in weight_map]
    if absent or unlisted:
        raise Unreadable(
            f"{display(index)}: index and shards disagree: not in their shard: {absent[:10]}, "
            f"not in the index: {unlisted[:10]}. Export the checkpoint again."
        )
    if total > limit:
        raise TooLarge(f"{display(index)}: holds {total} bytes of tensors, the limit is {limit}.")
