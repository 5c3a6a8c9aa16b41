"""What every way of reading gives back: named weights, with what came along in the file."""

from dataclasses import dataclass, field

from metamerge.weights import Weights

MAX_BYTES = 64 * 2**30


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Weights of one member and what is known of them.

    Attributes:
        name: How messages call it: its path, its zoo address or the type of the module.
        weights: Plain, contiguous tensors on the CPU.
        program: JSON graph of the network, where the checkpoint carries its own.
        metadata: What the file says about itself; never used to decide how it is read.
        verified: Whether a sha256 checksum of a manifest was compared and agreed.
    """

    name: str
    weights: Weights
    program: dict | None = None
    metadata: dict = field(default_factory=dict)
    verified: bool = False
