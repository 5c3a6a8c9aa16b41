"""Augmentation of segments: what some members see of their own rows, drawn anew at every step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metamerge.errors import ConfigError

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
                strength = float(text) if text else KINDS[kind]
            except (KeyError, ValueError):
                strength = -1.0
            wrong = strength is not None and not 0 < strength < torch.inf
            if wrong or kind in found or (kind == "flip") != (strength is None):
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

    def apply(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """Change the inputs of one step.

        Args:
            inputs: ``[n, b, ..., places]``: images ``[n, b, c, h, w]``, signals ``[n, b, c, l]`` or
                tables ``[n, b, features]``, which take noise alone.
            generator: Source of randomness, on the CPU.

        Returns:
            New inputs of the same shape.
        """
        places = max(0, inputs.ndim - 3)
        if self.flip and places:
            chosen = torch.rand(inputs.shape[:2], generator=generator) < 0.5
            chosen = chosen.to(inputs.device).reshape(*inputs.shape[:2], *[1] * (inputs.ndim - 2))
            inputs = torch.where(chosen, inputs.flip(-1), inputs)
        for axis in range(inputs.ndim - places, inputs.ndim) if self.shift else ():
            inputs = self._shifted(inputs, axis, generator)
        if self.noise:
            noise = torch.randn(inputs.shape, generator=generator)
            inputs = inputs + self.noise * noise.to(inputs)
        return inputs

    def _shifted(self, inputs: Tensor, axis: int, generator: torch.Generator) -> Tensor:
        """Every image moved along one axis by a number of places of its own."""
        size, lead = inputs.shape[axis], inputs.shape[:2]
        moves = torch.randint(-self.shift, self.shift + 1, lead, generator=generator)
        source = torch.arange(size) - moves[..., None]  # [n, b, size]
        inside = (source >= 0) & (source < size)
        shape = [*lead, *[1] * (inputs.ndim - 2)]
        shape[axis] = size
        index = source.clamp(0, size - 1).reshape(shape).to(inputs.device)
        moved = inputs.take_along_dim(index.expand_as(inputs), axis)
        return moved * inside.reshape(shape).to(inputs)
