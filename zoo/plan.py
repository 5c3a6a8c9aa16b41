"""Cut a zoo into shards: families that are trained and stored as one piece, found by a key."""

import json
from dataclasses import dataclass
from hashlib import sha256
from math import prod

from metamerge.structure import Program
from zoo.parts import TaskSplit
from zoo.recipe import COUNTS, ZooOptions
from zoo.store import FAMILY_PARTS

WORK = 5e12  # floating-point operations of a shard: half a minute on two CPU cores
MOST = 4096  # members of a shard


@dataclass(frozen=True)
class Shard:
    """Families that are trained and stored as one piece."""

    part: str
    members: int
    families: range
    key: str

    @property
    def size(self) -> int:
        """Number of networks."""
        return len(self.families) * self.members


def plan_shards(options: ZooOptions, split: TaskSplit, program: Program) -> list[Shard]:
    """All shards of a zoo, each with a key that says what is in it.

    Args:
        options: Of the zoo.
        split: Its task.
        program: Its architecture.

    Returns:
        The shards, part after part; keys do not depend on how many there are.
    """
    known = {k: v for k, v in options.shaping.items() if k not in COUNTS}
    made_of = sha256(json.dumps(program.to_json(), sort_keys=True).encode()).hexdigest()
    common = json.dumps([known, split.task.digest, made_of], sort_keys=True)
    plan = []
    for part in FAMILY_PARTS:
        for members in options.members:
            count, size = options.families(part), _shard_size(options, split, program, members)
            for start in range(0, count, size):
                families = range(start, min(start + size, count))
                place = f"{common}/{part}/{members}/{families.start}/{families.stop}"
                key = sha256(place.encode()).hexdigest()[:24]
                plan.append(Shard(part, members, families, key))
    return plan


def _shard_size(options: ZooOptions, split: TaskSplit, program: Program, members: int) -> int:
    """Families per shard: as many as make about the same work."""
    if options.shard:
        return max(1, options.shard // members)
    everything = len(split.rows("segments"))
    shared = everything if options.split == "everything" else everything / members
    rows = options.segment_size or shared
    each = 6 * max(1, multiply_adds(program)) * rows * options.epochs[-1]
    return max(1, int(min(MOST, WORK / each)) // members)


def multiply_adds(program: Program) -> int:
    """Multiply-adds of one input in the linear and convolutional layers of a network."""
    total = 0
    for node in program.nodes:
        if node.op == "linear.default" or node.op.startswith("conv"):
            fan_in = prod(program.shapes[node.args[1].name][1:])
            made = prod(size or 1 for size in program.shapes[node.name])  # the batch has none
            total += fan_in * made
    return total
