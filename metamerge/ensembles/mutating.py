"""``mutant()``: load, check, fuse, prune; unlike ``ensemble()`` it makes one ordinary network."""

import time
from collections.abc import Iterable, Mapping

from torch import nn

from metamerge.api import Merged
from metamerge.calibration import Batches, collect
from metamerge.checkpoints import Source
from metamerge.ensembles.fusing import Mutant, fused
from metamerge.ensembles.pruning import CRITERIA, pruned
from metamerge.errors import ConfigError
from metamerge.network import Given, find_network
from metamerge.options import check_choice
from metamerge.sources import read_members
from metamerge.structure import Inputs, Layout


def mutant(
    checkpoints: Source | Iterable[Source],
    *,
    width: float | Mapping[str, int] | None = None,
    criterion: str = "taylor",
    model: nn.Module | None = None,
    batches: Batches | None = None,
    example_inputs: Inputs | None = None,
) -> Merged:
    """Make one wide network of K checkpoints, their ensemble of mean logits, and prune it if asked.

    What comes out is to be trained on: before that, a pruned network is worth little.

    Args:
        checkpoints: As in ``merge``.
        width: How wide the network shall be: a multiple of one member's width, such as 1.0, or
            group -> number of units, by the names of the wide network's own permutation spec. By
            default all units stay.
        criterion: What units are kept by: ``taylor`` (arXiv:1611.06440), which needs labelled
            batches, or ``magnitude`` (arXiv:1608.08710), which needs nothing.
        model: A module of the members' architecture; not needed where a checkpoint carries its
            program, or where a member is a module itself.
        batches: Inputs with labels, for ``taylor``.
        example_inputs: What to trace the model with where ``batches`` do not say it.

    Returns:
        Weights of the wide or pruned network with its program; ``to_module(model)`` gives a module.

    Raises:
        ConfigError: If something is missing or unknown, or the width cannot be had.
        CheckpointError: If a checkpoint cannot be read, is unsafe or holds NaN.
        StructureError: If the network cannot be followed, or cannot be fused.
        IncompatibleWeights: If the members differ in keys or shapes, or do not fit the model.

    Examples:
        >>> import torch
        >>> nets = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(3)]
        >>> wide = mutant(nets).to_module(nets[0])
        >>> wide[0].out_features, wide(torch.zeros(2, 4)).shape
        (24, torch.Size([2, 3]))
    """
    clock = time.perf_counter()
    check_choice("mutant", "criterion", criterion, tuple(CRITERIA))
    if width is not None and criterion == "taylor" and batches is None:
        raise ConfigError("mutant: taylor needs batches=<(inputs, labels) pairs>; none were given.")
    sources, members, named = read_members(checkpoints)
    data = None if batches is None else collect(batches, labelled=width is not None)
    layout, named = find_network(Given(members, sources, model, data, None, example_inputs), named)
    made = fused([own for _, own in named], layout)
    if width is not None:
        widths = width if isinstance(width, Mapping) else _widths(width, layout, made)
        made = pruned(made, widths, CRITERIA[criterion](made.weights, made.layout, *(data or ())))
    report = {
        "kind": "mutant",
        "members": [name for name, _ in named],
        "widths": dict(made.layout.spec.groups),
        "criterion": criterion if width is not None else None,
        "parameters": sum(t.numel() for t in made.weights.values() if t.is_floating_point()),
        "seconds": round(time.perf_counter() - clock, 4),
    }
    return Merged(made.weights, report, made.layout.program)


def _widths(times: float, layout: Layout, wide: Mutant) -> dict[str, int]:
    """A multiple of one member's widths, for groups that are nested in none."""
    own, spec = layout.spec, wide.layout.spec
    if spec.groups.keys() != own.groups.keys() or spec.within != own.within:
        raise ConfigError(
            f"width: fusing has nested units that were not nested, so {times} times a member's "
            f"width can be cut in several ways. Give widths by group, of {dict(spec.groups)}."
        )
    widths = {g: max(1, round(times * n)) for g, n in own.groups.items() if not own.outer(g)}
    if not times > 0 or any(n > spec.groups[g] for g, n in widths.items()):
        raise ConfigError(
            f"width: got {times}, expected a multiple of one member's width, above 0 and up to the "
            "number of members."
        )
    return widths
