"""Weights as they travel through metamerge: a plain dict from tensor name to tensor.

Shape comments: m models, p parameters (elements of all floating tensors together).
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from metamerge.errors import ConfigError, IncompatibleWeights, NonFinite

Weights = dict[str, Tensor]

WRAPPER_PREFIXES = ("module.", "_orig_mod.", "model.")
_LISTED = 10


def flatten(weights: Weights) -> Tensor:
    """Lay all floating tensors end to end, in the order of the dict.

    Args:
        weights: Weights whose order of names decides the order of elements; see ``reorder``.

    Returns:
        One float32 vector [p]; integer and bool tensors are left out.
    """
    pieces = [tensor.to(torch.float32).reshape(-1) for _, tensor in _floating(weights)]
    return torch.cat(pieces) if pieces else torch.zeros(0)


def unflatten(flat: Tensor, like: Weights) -> Weights:
    """Cut a vector made by ``flatten`` back into named tensors.

    Args:
        flat: Vector [p].
        like: Weights that give names, shapes and dtypes, and the tensors that are not floating.

    Returns:
        New weights with the names, shapes and dtypes of ``like``; its integer and bool tensors are
        copied.

    Raises:
        IncompatibleWeights: If ``flat`` is not a vector of as many elements as ``like`` has.
    """
    sizes = [tensor.numel() for _, tensor in _floating(like)]
    if flat.shape != (sum(sizes),):
        raise IncompatibleWeights(
            f"unflatten: the vector has shape {tuple(flat.shape)}, the floating tensors of `like` "
            f"need ({sum(sizes)},). Give the weights that the vector was flattened from."
        )
    pieces = iter(flat.split(sizes))
    return {
        name: next(pieces).reshape(tensor.shape).to(tensor.dtype, copy=True)
        if tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in like.items()
    }


def stack(weights: Sequence[Weights]) -> Weights:
    """Stack the tensors of m models along a new leading axis.

    Args:
        weights: One dict per model; names and shapes agree. Floating dtypes may differ and are
            promoted.

    Returns:
        Weights in the order of the first model, each tensor [m, ...].
    """
    return {name: torch.stack([member[name] for member in weights]) for name in weights[0]}


def unstack(stacked: Weights) -> list[Weights]:
    """Split stacked weights into one dict per model.

    Args:
        stacked: Weights whose tensors share their leading axis: [m, ...].

    Returns:
        m dicts of views into ``stacked``.

    Raises:
        IncompatibleWeights: If the leading axes differ or a tensor has none.
    """
    lengths = {name: tensor.shape[:1] for name, tensor in stacked.items()}
    first = next(iter(lengths), None)
    for name, length in lengths.items():
        if not length or length != lengths[first]:
            raise IncompatibleWeights(
                f"unstack: {name!r} has shape {tuple(stacked[name].shape)}, {first!r} has "
                f"{tuple(stacked[first].shape)}. All tensors need one leading axis of members."
            )
    columns = [tensor.unbind() for tensor in stacked.values()]
    return [dict(zip(stacked, member, strict=True)) for member in zip(*columns, strict=True)]


def widened(weights: Sequence[Weights]) -> list[Weights]:
    """Bring floating tensors to float32, so that members of different dtypes can be stacked.

    Args:
        weights: One state dict per member.

    Returns:
        One dict per member; tensors that are float32 already, or not floating, are not copied.
    """
    return [
        {k: t.to(torch.float32) if t.is_floating_point() else t for k, t in member.items()}
        for member in weights
    ]


def reorder(weights: Weights, like: Weights) -> Weights:
    """Put names into the order of other weights, so that flattened vectors correspond.

    Args:
        weights: Weights in any order.
        like: Weights with the same names.

    Returns:
        A new dict in the order of ``like``; the tensors are not copied.

    Raises:
        IncompatibleWeights: If the names differ.
    """
    if weights.keys() != like.keys():
        raise IncompatibleWeights(f"reorder: {_key_differences(weights, like, 'the other')}")
    return {name: weights[name] for name in like}


def strip_wrappers(named: Sequence[tuple[str, Weights]]) -> list[tuple[str, Weights]]:
    """Drop the prefixes that wrappers put before every name, where that makes all members agree.

    A prefix goes only if all names of a member carry it and only if the members' names are equal
    afterwards; of several ways to agree, the one that strips least is taken.

    Args:
        named: Pairs of a member's name and its weights.

    Returns:
        The pairs with agreeing names, or as they were where no stripping makes them agree.
    """
    variants = [_unwrapped(weights) for _, weights in named]
    for target in variants[0] if variants else []:
        agreeing = [
            next((v for v in options if v.keys() == target.keys()), None) for options in variants
        ]
        if all(chosen is not None for chosen in agreeing):
            return [(name, chosen) for (name, _), chosen in zip(named, agreeing, strict=True)]
    return list(named)


def check_compatible(named: Sequence[tuple[str, Weights]], *, widths: bool = True) -> None:
    """Check that all members have the names, shapes and kinds of dtype of the first.

    Floating dtypes may differ from each other; all other dtypes must be equal.

    Args:
        named: Pairs of a member's name and its weights.
        widths: Whether the lengths of axes must agree; otherwise only their number.

    Raises:
        ConfigError: If there is no member.
        IncompatibleWeights: At the first member and tensor that differ.
    """
    if not named:
        raise ConfigError("There are no checkpoints. Give at least one.")
    first = f"checkpoints[0] ({named[0][0]})"
    expected = named[0][1]
    for index, (name, weights) in enumerate(named[1:], start=1):
        where = f"checkpoints[{index}] ({name})"
        if weights.keys() != expected.keys():
            raise IncompatibleWeights(f"{where}: {_key_differences(weights, expected, first)}")
        for key, tensor in weights.items():
            difference = _difference(tensor, expected[key], first, widths)
            if difference:
                raise IncompatibleWeights(f"{where}: {key!r} has {difference}")


def check_finite(name: str, weights: Weights) -> None:
    """Check that no floating tensor holds NaN or infinite values.

    Args:
        name: Where the weights come from, for messages.
        weights: Weights to look at.

    Raises:
        NonFinite: If a value is not finite; names the first such tensor and counts its values.
    """
    for key, tensor in _floating(weights):
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        if bad:
            nan = int(torch.isnan(tensor).sum())
            raise NonFinite(
                f"{name}: {key!r} holds {bad} values of {tensor.numel()} that are not finite "
                f"({nan} NaN, {bad - nan} infinite). Leave this checkpoint out, or save it again "
                f"from before its training diverged."
            )


def check_statistics(named: Sequence[tuple[str, Weights]]) -> None:
    """Refuse running variances below 0, which turn a network's outputs into NaN.

    Args:
        named: Pairs of a member's name and its weights.

    Raises:
        NonFinite: At the first such tensor.
    """
    for index, (name, weights) in enumerate(named):
        for key, tensor in weights.items():
            if key.endswith("running_var") and bool((tensor < 0).any()):
                raise NonFinite(
                    f"checkpoints[{index}] ({name}): {key!r} holds {int((tensor < 0).sum())} "
                    f"variances below 0 of {tensor.numel()}, the lowest {float(tensor.min()):.3g}. "
                    f"Pass batches=<calibration inputs> to have them measured anew, or leave this "
                    f"checkpoint out."
                )


def _floating(weights: Weights) -> list[tuple[str, Tensor]]:
    return [(name, tensor) for name, tensor in weights.items() if tensor.is_floating_point()]


def _unwrapped(weights: Weights) -> list[Weights]:
    """List the weights with no, one, two ... wrapper prefixes taken off all names."""
    variants = [weights]
    while True:
        names = variants[-1]
        shared = [p for p in WRAPPER_PREFIXES if names and all(n.startswith(p) for n in names)]
        if not shared:
            return variants
        variants.append({n.removeprefix(shared[0]): tensor for n, tensor in names.items()})


def _key_differences(weights: Weights, expected: Weights, owner: str) -> str:
    """List the names that are missing and the names that are too many."""
    missing = [name for name in expected if name not in weights]
    extra = [name for name in weights if name not in expected]
    found = {"misses": missing, "adds": extra}
    parts = [f"{verb} {_listed(names)}" for verb, names in found.items() if names]
    return (
        f"{' and '.join(parts)}, compared with {owner}. Merge models of one architecture, or "
        f"rename the tensors."
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(repr(name) for name in names[:_LISTED]) + more


def _difference(tensor: Tensor, expected: Tensor, owner: str, widths: bool) -> str | None:
    """Say how shape or dtype differ from what is expected; None if they agree."""
    shape, other = tuple(tensor.shape), tuple(expected.shape)
    if (shape != other) if widths else (len(shape) != len(other)):
        return f"shape {shape}, {owner} has {other}. {_shape_advice(shape, other)}"
    both_float = tensor.is_floating_point() and expected.is_floating_point()
    if tensor.dtype != expected.dtype and not both_float:
        kind = f"dtype {tensor.dtype}, {owner} has {expected.dtype}"
        return f"{kind}. Convert one of the two: they do not hold the same kind of number."
    return None


def _shape_advice(shape: tuple[int, ...], other: tuple[int, ...]) -> str:
    if shape == other[::-1]:
        return "It looks transposed: transpose it in one of the two files."
    if len(shape) == len(other) and prod(shape) != prod(other):
        return 'Merge models of one width, or use align="optimal_transport".'
    return "Merge models of one architecture."
