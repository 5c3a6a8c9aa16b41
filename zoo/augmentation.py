"""Augmentation of segments: what some members see of their own rows, drawn anew at every step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metamerge.errors import ConfigError

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio, made odd
KINDS = {"flip": None, "shift": 2.0, "noise": 0.1}  # how strong they are where nobody says


@dataclass(frozen=True)
class Augmentation:
    """Changes of images that keep their class.

    Attributes:
        flip: Whether a segment is doubled by its mirror images.
        shift: Places that an image moves at most, up, down and sideways; its border turns 0.
        noise: Standard deviation of Gaussian noise.
    """

    flip: bool = False
    shift: int = 0
    noise: float = 0.0

    @classmethod
    def parse(cls, words: Sequence[str]) -> "Augmentation":
        """Read ``flip``, ``shift=2`` and ``noise=0.1``.

        Args:
            words: Any of these, each once.

        Returns:
            What they say.

        Raises:
            ConfigError: Naming the word that is none of these.
        """
        found: dict[str, float] = {}
        for word in words:
            kind, _, text = word.partition("=")
            try:
                strength = float(text) if text else KINDS.get(kind)
            except ValueError:
                strength = -1.0
            wrong = strength is not None and not 0 < strength < torch.inf
            known = kind in KINDS and (kind == "flip") == (strength is None)
            if wrong or not known or kind in found:
                raise ConfigError(
                    f"augment: got {word!r}, expected flip, shift=<places> or noise=<deviation>, "
                    "each once."
                )
            found[kind] = strength
        shift = found.get("shift", 0)
        if shift != int(shift):
            raise ConfigError(f"augment: shift is a whole number of places, got {shift}.")
        return cls("flip" in found, int(shift), found.get("noise", 0.0))

    def __bool__(self) -> bool:
        """Whether anything changes."""
        return self.flip or bool(self.shift) or bool(self.noise)

    def apply(self, inputs: Tensor, seeds: Tensor, step: int) -> Tensor:
        """Change the inputs of one step; what a network sees depends on its own seed alone.

        Args:
            inputs: ``[n, b, ..., places]``: images ``[n, b, c, h, w]``, signals ``[n, b, c, l]`` or
                tables ``[n, b, features]``, which take noise alone.
            seeds: Seed of each network, int64 ``[n]``.
            step: Number of the step.

        Returns:
            New inputs of the same shape.

        Raises:
            ConfigError: If a table is to be mirrored or moved.
        """
        lead, places = inputs.shape[:2], max(0, inputs.ndim - 3)
        if not places and (self.flip or self.shift):
            raise ConfigError("augment: columns of a table have no neighbours; tables take noise.")
        own = seeds.to(inputs.device)
        if self.flip:
            chosen = uniform(own, step, lead[1], stream=0) < 0.5
            chosen = chosen.reshape(*lead, *[1] * (inputs.ndim - 2))
            inputs = torch.where(chosen, inputs.flip(-1), inputs)
        for axis in range(inputs.ndim - places, inputs.ndim) if self.shift else ():
            drawn = uniform(own, step, lead[1], stream=axis)
            moves = (drawn * (2 * self.shift + 1)).long() - self.shift
            inputs = _shifted(inputs, axis, moves)
        if self.noise:
            count = inputs[0].numel()
            radius = (-2 * (1 - uniform(own, step, count, stream=8)).log()).sqrt()
            angle = 2 * torch.pi * uniform(own, step, count, stream=9)  # Box and Muller
            noise = (radius * angle.cos()).reshape(inputs.shape)
            inputs = inputs + self.noise * noise.to(inputs.dtype)
        return inputs


def uniform(seeds: Tensor, step: int, count: int, *, stream: int) -> Tensor:
    """Numbers in [0, 1) that follow from their place, for all networks at once and on any device.

    Paper: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014
    (SplitMix64).

    Args:
        seeds: Seed of each network, int64 ``[n]``.
        step: Number of the step.
        count: Numbers per network.
        stream: What they are for; different streams have nothing in common.

    Returns:
        Float32 ``[n, count]``, multiples of 2^-24.
    """
    places = torch.arange(1, count + 1, device=seeds.device)
    start = _mixed(_mixed(seeds + _signed(stream * _GOLDEN % 2**64)) + step)
    mixed = _mixed(start[:, None] + places * _signed(_GOLDEN))
    return _shifted_right(mixed, 40).float() / 2**24


def _mixed(z: Tensor) -> Tensor:
    z = (z ^ _shifted_right(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted_right(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shifted_right(z, 31)


def _shifted_right(z: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own repeats the sign."""
    return (z >> bits) & (2 ** (64 - bits) - 1)


def _signed(number: int) -> int:
    """Unsigned 64-bit number as the int64 of the same bits."""
    return number - 2**64 if number >= 2**63 else number


def _shifted(inputs: Tensor, axis: int, moves: Tensor) -> Tensor:
    """Every image moved along one axis by a number of places of its own, ``moves`` ``[n, b]``."""
    size = inputs.shape[axis]
    source = torch.arange(size, device=inputs.device) - moves[..., None]  # [n, b, size]
    inside = (source >= 0) & (source < size)
    shape = [*inputs.shape[:2], *[1] * (inputs.ndim - 2)]
    shape[axis] = size
    index = source.clamp(0, size - 1).reshape(shape)
    moved = inputs.take_along_dim(index.expand_as(inputs), axis)
    return moved * inside.reshape(shape)
