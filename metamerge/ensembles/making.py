"""``ensemble()``: load, check, watch, fit; like ``merge()``, but all members are kept."""

import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from metamerge.api import Merged
from metamerge.calibration import Batches, check_fit, collect
from metamerge.checkpoints import Checkpoint, Source, read_checkpoints
from metamerge.corrections.batch_norm import recalibrate
from metamerge.declaration import bind, check_options
from metamerge.ensembles.ensemble import Ensemble
from metamerge.ensembles.kinds import EnsembleKind, get_ensemble, list_ensembles
from metamerge.ensembles.regression import LinearPool
from metamerge.ensembles.votes import SoftVote
from metamerge.ensembles.watching import Seen, watch_all
from metamerge.errors import ConfigError
from metamerge.network import Data, Given, find_program, fit_members
from metamerge.sources import read_members
from metamerge.structure import Inputs, Program
from metamerge.weights import Weights, check_statistics, stack, widened

_SAME = {"rtol": 1e-5, "atol": 1e-6}  # float32 sums of equal numbers, by another kernel


def ensemble(
    checkpoints: Source | Iterable[Source],
    *,
    kind: str = "soft_vote",
    model: nn.Module | None = None,
    batches: Batches | None = None,
    tie_breaker: Source | Merged | None = None,
    recalibrated: bool = False,
    example_inputs: Inputs | None = None,
    seed: int = 0,
    **options: Any,
) -> Ensemble:
    """Make one network of K checkpoints that keeps them all.

    Where all members say the same of all batches, such as a single one, there is nothing to fit:
    whatever the kind, the ensemble then says what they say.

    Args:
        checkpoints: As in ``merge``.
        kind: One of ``list_ensembles()``. ``mean``, ``weighted_mean`` and ``stacked_mean`` are for
            networks that put out numbers, all others for classifiers.
        model: A module of the members' architecture; not needed where a checkpoint carries its
            program, or where a member is a module itself.
        batches: Inputs with labels, or with the numbers to put out, for kinds that are fitted.
        tie_breaker: A further network of the architecture, such as the merged one, that ends ties
            of ``majority_vote``.
        recalibrated: Whether the running statistics of the members' batch normalisations are
            measured anew on the inputs of ``batches``.
        example_inputs: What to trace the model with where ``batches`` do not say it.
        seed: Seed of everything random.
        **options: Options of the kind.

    Returns:
        The ensemble; its ``report`` says what was chosen and why.

    Raises:
        ConfigError: If there is no checkpoint, something is missing, or kind or option is unknown.
        CheckpointError: If a checkpoint cannot be read, is unsafe or holds NaN.
        StructureError: If the network cannot be followed.
        IncompatibleWeights: If the members differ in keys or shapes, or do not fit the model.

    Examples:
        >>> nets = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(3)]
        >>> ensemble(nets)(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
    """
    clock = time.perf_counter()
    record = get_ensemble(kind)
    _check(record, options, batches, recalibrated, tie_breaker)
    sources, members, named = read_members(checkpoints)
    if tie_breaker is not None:
        _, members, named = read_members([*members, _breaker(tie_breaker)])
        options = {**options, "tie_breaker": True}
    data = None if batches is None else _data(batches, record)
    if not recalibrated:
        check_statistics(named)
    program = find_program(Given(members, sources, model, data, None, example_inputs))
    named = fit_members(named, program)
    weights = stack(widened([own for _, own in named]))
    if data is not None:
        check_fit(program, data[0])
    if recalibrated:
        with torch.no_grad():
            weights = recalibrate(weights, program, data[0])
    report: dict[str, Any] = {
        "kind": kind,
        "members": [name for name, _ in named],
        "seed": seed,
        "recalibrated": bool(recalibrated),
    }
    told: dict[str, Any] = {}
    at_hand = {"generator": torch.Generator().manual_seed(seed), "report": told}
    consensus = _consensus(record, program, weights, data, at_hand, options)
    report.update({"chosen": told} if told else {})
    report["parameters"] = sum(t.numel() for t in weights.values() if t.is_floating_point())
    report["seconds"] = round(time.perf_counter() - clock, 4)
    return Ensemble(program, weights, consensus, report).eval()


def _check(
    record: EnsembleKind,
    options: Mapping[str, Any],
    batches: Any,
    recalibrated: bool,
    tie_breaker: Any,
) -> None:
    """Refuse what cannot be made, before any work."""
    check_options(record, options)
    if batches is None and record.fitted:
        what = "targets" if record.numbers else "labels"
        raise ConfigError(f"{record.name} needs batches=<(inputs, {what}) pairs>; none were given.")
    if batches is None and recalibrated:
        raise ConfigError("recalibrated=True needs batches=<inputs [b, ...]>; none were given.")
    if tie_breaker is not None and "tie_breaker" not in record.options:
        raise ConfigError(f"tie_breaker: {record.name} has no ties. Use kind='majority_vote'.")


def _breaker(tie_breaker: Source | Merged) -> Checkpoint:
    source = tie_breaker.weights if isinstance(tie_breaker, Merged) else tie_breaker
    found = read_checkpoints(source)
    if len(found) != 1:
        raise ConfigError(f"tie_breaker: it stands for {len(found)} checkpoints, expected one.")
    return found[0]


def _data(batches: Batches, record: EnsembleKind) -> Data:
    """Inputs, and the labels or the numbers that the kind is fitted to."""
    numbers = record.numbers or not record.fitted  # without a fit, whatever comes along will do
    inputs, wanted = collect(batches, labelled=record.fitted, numbers=numbers)
    return inputs, wanted if record.fitted else None


def _consensus(
    record: EnsembleKind,
    program: Program,
    weights: Weights,
    data: Data | None,
    at_hand: dict[str, Any],
    options: Mapping[str, Any],
) -> nn.Module:
    """Make the consensus; what is fitted is fitted to what members say about the inputs."""
    arguments = bind(record, at_hand, options)
    if not record.fitted:
        return record.function(**arguments)
    inputs, wanted = data
    activations = options.get("similar") == "activations"
    seen = watch_all(program, weights, inputs, activations=activations)
    _check_kind(record, seen)
    consensus = record.function(seen, wanted, **arguments)
    if torch.allclose(seen.outputs, seen.outputs[:1], **_SAME):
        at_hand["report"].clear()
        at_hand["report"]["note"] = "all members say the same: nothing was fitted"
        return LinearPool() if record.numbers else SoftVote()
    return consensus


def _check_kind(record: EnsembleKind, seen: Seen) -> None:
    if not record.numbers and seen.outputs.ndim == 3 and seen.outputs.shape[-1] < 2:
        numbers = [name for name in list_ensembles() if get_ensemble(name).numbers]
        raise ConfigError(
            f"{record.name} is for classifiers, and these networks put out one number. Use one of "
            f"{', '.join(numbers)}."
        )
