"""Read members of a zoo by address: ``<folder>#<file stem>/<family>[/<member>]``.

A zoo keeps one safetensors file per split, in which every tensor has shape [F, K, ...] for F
families of K members; only the part that is asked for is read.
"""

from pathlib import Path
from typing import BinaryIO

from metamerge.checkpoints.checkpoint import Checkpoint
from metamerge.checkpoints.manifests import ZOO_FORMAT, read_manifest, verify
from metamerge.checkpoints.opening import display, file_size, open_regular
from metamerge.checkpoints.safetensors_files import Header, read_header, read_row
from metamerge.errors import ConfigError, TooLarge, Unreadable

VERIFY_BELOW_BYTES = 64 * 2**20


def read_members(address: str, max_bytes: int) -> list[Checkpoint]:
    """Read one family, or one member of it.

    Args:
        address: ``zoos/digits#test-k8/3`` for all members of family 3 of ``test-k8.safetensors``,
            ``zoos/digits#test-k8/3/0`` for its first member.
        max_bytes: Largest number of tensor bytes that are read.

    Returns:
        One checkpoint per member, in order, with the program of the zoo and the member's
        provenance as metadata. ``verified`` only if the file is below 64 MiB, since a checksum
        needs the whole of it.

    Raises:
        ConfigError: If the address is not of this form, or a family or member is out of range.
        Unreadable: If the folder is not a zoo, or file and manifest disagree.
        TooLarge: If more than ``max_bytes`` would be read.
        CheckpointError: If the file is damaged.
        IncompatibleWeights: If a tensor cannot be merged.
    """
    folder, stem, indices = _parse(address)
    manifest = _zoo_manifest(folder)
    path = folder / f"{stem}.safetensors"
    entry = _file_entry(manifest, path)
    family, members = _select(indices, entry, address)
    with open_regular(path) as file:
        small = file_size(file) < VERIFY_BELOW_BYTES
        verified = small and verify(file, path, manifest)
        header = read_header(file, display(path), max_bytes=file_size(file))
        _check_shapes(header, entry, path)
        _check_amount(header, entry, len(members), address, max_bytes)
        return [
            Checkpoint(
                name=f"{display(folder)}#{stem}/{family}/{member}",
                weights=_member(file, header, (family, member), display(path)),
                program=manifest.get("program"),
                metadata=_provenance(entry, family, member),
                verified=verified,
            )
            for member in members
        ]


def _parse(address: str) -> tuple[Path, str, list[int]]:
    folder, _, rest = address.rpartition("#")
    stem, *indices = rest.split("/")
    if not folder or not stem or len(indices) not in (1, 2):
        raise ConfigError(
            f"{display(address)}: expected <zoo folder>#<file>/<family> or "
            f"<zoo folder>#<file>/<family>/<member>."
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


def _file_entry(manifest: dict, path: Path) -> dict:
    entry = manifest["files"].get(path.name)
    if entry is None:
        stems = [Path(name).stem for name in manifest["files"]][:10]
        raise ConfigError(f"{display(path.parent)}: has no file {path.stem!r}; it has {stems}.")
    for field in ("families", "members"):
        if type(entry.get(field)) is not int or entry[field] < 1:
            raise Unreadable(
                f"{display(path)}: its manifest gives {field} as {entry.get(field)!r}, expected a "
                f"positive number. Build the zoo again."
            )
    return entry


def _select(indices: list[int], entry: dict, address: str) -> tuple[int, list[int]]:
    """Check the indices of the address and list the members to read."""
    counts = (("family", "families"), ("member", "members"))
    for (word, field), index in zip(counts, indices, strict=False):
        if index >= entry[field]:
            raise ConfigError(
                f"{display(address)}: {word} {index} does not exist, there are {entry[field]} "
                f"{field}, numbered from 0 to {entry[field] - 1}."
            )
    return indices[0], indices[1:] or list(range(entry["members"]))


def _check_shapes(header: Header, entry: dict, path: Path) -> None:
    expected = (entry["families"], entry["members"])
    for key, tensor in header.entries.items():
        if tensor.shape[:2] != expected:
            raise Unreadable(
                f"{display(path)}: {key[:200]!r} has shape {tensor.shape}, its manifest says "
                f"{expected} for families and members. Build the zoo again."
            )


def _check_amount(header: Header, entry: dict, members: int, address: str, limit: int) -> None:
    whole = sum(tensor.nbytes for tensor in header.entries.values())
    amount = whole // (entry["families"] * entry["members"]) * members
    if amount > limit:
        raise TooLarge(f"{display(address)}: holds {amount} bytes, the limit is {limit}.")


def _member(file: BinaryIO, header: Header, index: tuple[int, int], name: str) -> dict:
    return {key: read_row(file, entry, index, name) for key, entry in header.entries.items()}


def _provenance(entry: dict, family: int, member: int) -> dict:
    """Give what the zoo knows of a member; an empty dict where it knows nothing."""
    try:
        known = entry["provenance"][family][member]
    except (KeyError, IndexError, TypeError):
        return {}
    return known if isinstance(known, dict) else {}
