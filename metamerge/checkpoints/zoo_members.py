"""Read members of a zoo by address: ``<folder>#<group>/<family>[/<member>]``.

A zoo keeps the families of a group, such as ``test-k8``, in shards: one safetensors file of
weights, in which every tensor has shape [F, K, ...] for F families of K members, and one of records
that say where members come from. Only the part that is asked for is read.
"""

from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from metamerge.checkpoints.checkpoint import Checkpoint
from metamerge.checkpoints.manifests import ZOO_FORMAT, read_manifest, verify
from metamerge.checkpoints.opening import display, file_size, open_regular
from metamerge.checkpoints.safetensors_files import Header, read_header, read_row
from metamerge.errors import ConfigError, TooLarge, Unreadable

VERIFY_BELOW_BYTES = 64 * 2**20
_LISTS = ("rows_per_class",)  # records of more than one number that are told as provenance


def read_members(address: str, max_bytes: int) -> list[Checkpoint]:
    """Read one family, or one member of it.

    Args:
        address: ``zoos/digits#test-k8/3`` for all members of family 3 of the group ``test-k8``,
            ``zoos/digits#test-k8/3/0`` for its first member.
        max_bytes: Largest number of tensor bytes that are read.

    Returns:
        One checkpoint per member, in order, with the program of the zoo and the member's
        provenance as metadata. ``verified`` only if the file is below 64 MiB, since a checksum
        needs the whole of it.

    Raises:
        ConfigError: If the address is not of this form, or a family or member is out of range.
        Unreadable: If the folder is not a zoo, or files and manifest disagree.
        TooLarge: If more than ``max_bytes`` would be read.
        CheckpointError: If a file is damaged.
        IncompatibleWeights: If a tensor cannot be merged.
    """
    folder, name, indices = _parse(address)
    manifest = _zoo_manifest(folder)
    group = _group(manifest, folder, name)
    family, members = _select(indices, group, address)
    shard, place = _shard(group, family, folder)
    path, expected = _path(shard, "weights", folder), (shard["families"], group["members"])
    with open_regular(path) as file:
        verified = file_size(file) < VERIFY_BELOW_BYTES and verify(file, path, manifest)
        header = read_header(file, display(path), max_bytes=file_size(file))
        _check_shapes(header, expected, path)
        _check_amount(header, group["members"], len(members), address, max_bytes)
        weights = [_member(file, header, (place, member), display(path)) for member in members]
    records = _provenance(_path(shard, "records", folder), (place, members), expected, manifest)
    return [
        Checkpoint(
            name=f"{display(folder)}#{name}/{family}/{member}",
            weights=own,
            program=manifest.get("program"),
            metadata=told,
            verified=verified,
        )
        for member, own, told in zip(members, weights, records, strict=True)
    ]


def is_told(record: str, axes: int) -> bool:
    """Tell whether a record of members ``[F, K, ...]`` is short enough for their provenance."""
    return axes == 2 or record in _LISTS


def _parse(address: str) -> tuple[Path, str, list[int]]:
    folder, _, rest = address.rpartition("#")
    stem, *indices = rest.split("/")
    if not folder or not stem or len(indices) not in (1, 2):
        raise ConfigError(
            f"{display(address)}: expected <zoo folder>#<group>/<family> or "
            f"<zoo folder>#<group>/<family>/<member>."
        )
    if not all(text.isascii() and text.isdigit() and len(text) < 10 for text in indices):
        raise ConfigError(f"{display(address)}: family and member must be numbers from 0 on.")
    return Path(folder), stem, [int(text) for text in indices]


def _zoo_manifest(folder: Path) -> dict:
    manifest = read_manifest(folder)
    if manifest is None or manifest["format"] != ZOO_FORMAT:
        raise Unreadable(
            f"{display(folder)}: is not a zoo: it has no manifest.json of format {ZOO_FORMAT!r}. "
            f"Check the folder before the '#'."
        )
    return manifest


def _group(manifest: dict, folder: Path, name: str) -> dict:
    group = manifest["groups"].get(name)
    if name not in manifest["groups"]:
        known = sorted(manifest["groups"])[:10]
        raise ConfigError(f"{display(folder)}: has no group {name!r}; it has {known}.")
    shards = group.get("shards") if isinstance(group, dict) else None
    counted = isinstance(shards, list) and all(isinstance(shard, dict) for shard in shards)
    numbers = [group.get("members"), *(s.get("families") for s in shards)] if counted else []
    if not counted or not all(type(number) is int and number > 0 for number in numbers):
        raise Unreadable(
            f"{display(folder)}: its manifest describes group {name!r} by {str(group)[:100]}, "
            f"expected members and shards with families. Build the zoo again."
        )
    return {**group, "families": sum(shard["families"] for shard in shards)}


def _shard(group: dict, family: int, folder: Path) -> tuple[dict, int]:
    """The shard that holds a family, and the family's place in it."""
    for shard in group["shards"]:
        if family < shard["families"]:
            return shard, family
        family -= shard["families"]
    raise AssertionError(f"{folder}: family out of range")  # _select has checked it


def _path(shard: dict, kind: str, folder: Path) -> Path:
    """The file of a shard, which lies in the zoo's own folder."""
    entry = shard.get(kind)
    name = entry.get("file") if isinstance(entry, dict) else None
    if not isinstance(name, str) or Path(name).name != name:
        raise Unreadable(
            f"{display(folder)}: its manifest names {str(name)[:100]!r} as {kind} of a shard, "
            f"expected a file name. Build the zoo again."
        )
    return folder / name


def _select(indices: list[int], group: dict, address: str) -> tuple[int, list[int]]:
    """Check the indices of the address and list the members to read."""
    counts = (("family", "families"), ("member", "members"))
    for (word, field), index in zip(counts, indices, strict=False):
        if index >= group[field]:
            raise ConfigError(
                f"{display(address)}: {word} {index} does not exist, there are {group[field]} "
                f"{field}, numbered from 0 to {group[field] - 1}."
            )
    return indices[0], indices[1:] or list(range(group["members"]))


def _check_shapes(header: Header, expected: tuple[int, int], path: Path) -> None:
    for key, tensor in header.entries.items():
        if tensor.shape[:2] != expected:
            raise Unreadable(
                f"{display(path)}: {key[:200]!r} has shape {tensor.shape}, its manifest says "
                f"{expected} for families and members. Build the zoo again."
            )


def _check_amount(header: Header, of: int, members: int, address: str, limit: int) -> None:
    families = next(iter(header.entries.values())).shape[0] if header.entries else 1
    whole = sum(tensor.nbytes for tensor in header.entries.values())
    amount = whole // (families * of) * members
    if amount > limit:
        raise TooLarge(f"{display(address)}: holds {amount} bytes, the limit is {limit}.")


def _member(file: BinaryIO, header: Header, index: tuple[int, int], name: str) -> dict:
    return {key: read_row(file, entry, index, name) for key, entry in header.entries.items()}


def _provenance(
    path: Path, place: tuple[int, list[int]], expected: tuple[int, int], manifest: dict
) -> list[dict]:
    """What the zoo recorded of members: numbers by name."""
    family, members = place
    with open_regular(path) as file:
        if file_size(file) < VERIFY_BELOW_BYTES:
            verify(file, path, manifest)
        header = read_header(file, display(path), max_bytes=file_size(file))
        _check_shapes(header, expected, path)
        told = {
            key: entry for key, entry in header.entries.items() if is_told(key, len(entry.shape))
        }
        return [
            {
                key: _number(read_row(file, entry, (family, member), display(path)))
                for key, entry in told.items()
            }
            for member in members
        ]


def _number(value: Tensor) -> object:
    """A record as JSON has it; None for what is not known."""
    number = value.tolist()
    return None if number != number else number
