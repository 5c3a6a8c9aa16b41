"""``ensemble()``: load, check, watch, fit; like ``merge()``, but all members are kept."""

import inspect
import time
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from metamerge.api import Merged
from metamerge.calibration import Batches, check_fit, collect
from metamerge.checkpoints import Checkpoint, Source, read_checkpoints
from metamerge.corrections.batch_norm import recalibrate
from metamerge.ensembles.convolutional_consensus import convolutional_consensus
from metamerge.ensembles.ensemble import Ensemble
from metamerge.ensembles.gated_consensus import gated_consensus
from metamerge.ensembles.learned_consensus import learned_consensus
from metamerge.ensembles.regression import LinearPool, mean, stacked_mean, weighted_mean
from metamerge.ensembles.stacking import stacking
from metamerge.ensembles.votes import MajorityVote, SoftVote
from metamerge.ensembles.watching import Seen, watch_all
from metamerge.ensembles.weighted_consensus import weighted_consensus
from metamerge.errors import ConfigError
from metamerge.network import Data, Given, find_program, fit_members
from metamerge.sources import read_members
from metamerge.structure import Inputs, Program
from metamerge.weights import Weights, check_statistics, stack, widened

KINDS: Mapping[str, Callable[..., nn.Module]] = MappingProxyType(
    {
        "soft_vote": SoftVote,
        "majority_vote": MajorityVote,
        "weighted_consensus": weighted_consensus,
        "learned_consensus": learned_consensus,
        "convolutional_consensus": convolutional_consensus,
        "gated_consensus": gated_consensus,
        "stacking": stacking,
        "mean": mean,
        "weighted_mean": weighted_mean,
        "stacked_mean": stacked_mean,
    }
)
"""Name -> what makes the consensus; as with merge methods, its signature says what it needs."""

_AT_HAND = ("seen", "labels", "targets", "generator", "report", "tie_breaker")
_NUMBERS = ("mean", "weighted_mean", "stacked_mean")
_SAME = {"rtol": 1e-5, "atol": 1e-6}  # float32 sums of equal numbers, by another kernel


def list_ensembles() -> list[str]:
    """List the kinds of ensembles, sorted.

    Returns:
        Names for ``ensemble(..., kind=name)``.
    """
    return sorted(KINDS)


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
    wanted = _check(kind, options, batches, recalibrated, tie_breaker)
    sources, members, named = read_members(checkpoints)
    if tie_breaker is not None:
        _, members, named = read_members([*members, _breaker(tie_breaker)])
    data = None if batches is None else _data(batches, wanted)
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
    at_hand = {
        "generator": torch.Generator().manual_seed(seed),
        "report": told,
        "tie_breaker": tie_breaker is not None,
    }
    consensus = _consensus(kind, wanted, program, weights, data, at_hand, options)
    report.update({"chosen": told} if told else {})
    report["parameters"] = sum(t.numel() for t in weights.values() if t.is_floating_point())
    report["seconds"] = round(time.perf_counter() - clock, 4)
    return Ensemble(program, weights, consensus, report).eval()


def _check(
    kind: str, options: dict[str, Any], batches: Any, recalibrated: bool, tie_breaker: Any
) -> set[str]:
    """Refuse what cannot be made, before any work; the parameters of the kind's function."""
    if kind not in KINDS:
        raise ConfigError(f"kind: got {kind!r}, expected one of {', '.join(list_ensembles())}.")
    parameters = inspect.signature(KINDS[kind]).parameters
    known = [name for name in parameters if name not in _AT_HAND]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ConfigError(
            f"{kind} has no option {unknown[0]!r}. Its options: {', '.join(known) or 'none'}."
        )
    if batches is None and "seen" in parameters:
        what = "labels" if "labels" in parameters else "targets"
        raise ConfigError(f"{kind} needs batches=<(inputs, {what}) pairs>; none were given.")
    if batches is None and recalibrated:
        raise ConfigError("recalibrated=True needs batches=<inputs [b, ...]>; none were given.")
    if tie_breaker is not None and "tie_breaker" not in parameters:
        raise ConfigError(f"tie_breaker: {kind} has no ties. Use kind='majority_vote'.")
    return {*parameters}


def _breaker(tie_breaker: Source | Merged) -> Checkpoint:
    source = tie_breaker.weights if isinstance(tie_breaker, Merged) else tie_breaker
    found = read_checkpoints(source)
    if len(found) != 1:
        raise ConfigError(f"tie_breaker: it stands for {len(found)} checkpoints, expected one.")
    return found[0]


def _data(batches: Batches, wanted: set[str]) -> Data:
    """Inputs, and the labels or the numbers that the kind is fitted to."""
    if "labels" in wanted:
        return collect(batches, labelled=True)
    pairs = [batches] if isinstance(batches, tuple | Tensor) else list(batches)
    inputs = [pair if isinstance(pair, Tensor) else pair[0] for pair in pairs]
    together, _ = collect(inputs, labelled=False)
    if "targets" not in wanted:
        return together, None
    if any(isinstance(pair, Tensor) or len(pair[0]) != len(pair[1]) for pair in pairs):
        raise ConfigError("batches: expected pairs (inputs, targets) of one length, got others.")
    targets = torch.cat([pair[1] for pair in pairs])
    return together, targets[:, None] if targets.ndim == 1 else targets


def _consensus(
    kind: str,
    wanted: set[str],
    program: Program,
    weights: Weights,
    data: Data | None,
    at_hand: dict[str, Any],
    options: dict[str, Any],
) -> nn.Module:
    """Call what makes the kind with what it asks for."""
    if "seen" in wanted:
        activations = options.get("similar") == "activations"
        seen = watch_all(program, weights, data[0], activations=activations)
        _check_kind(kind, seen)
        at_hand = {**at_hand, "seen": seen, "labels": data[1], "targets": data[1]}
    consensus = KINDS[kind](**{k: at_hand[k] for k in wanted if k in at_hand}, **options)
    if "seen" in wanted and torch.allclose(seen.outputs, seen.outputs[:1], **_SAME):
        at_hand["report"].clear()
        at_hand["report"]["note"] = "all members say the same: nothing was fitted"
        return LinearPool() if kind in _NUMBERS else SoftVote()
    return consensus


def _check_kind(kind: str, seen: Seen) -> None:
    if kind not in _NUMBERS and seen.outputs.ndim == 3 and seen.outputs.shape[-1] < 2:
        raise ConfigError(
            f"{kind} is for classifiers, and these networks put out one number. Use one of "
            f"{', '.join(_NUMBERS)}."
        )
