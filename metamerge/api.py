"""``merge()``: load, check, align, fuse, correct."""

import copy
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metamerge.alignment import ALIGNMENTS, matching_cost
from metamerge.calibration import Batches, collect
from metamerge.checkpoints import Checkpoint, Source, read_checkpoints, save_checkpoint
from metamerge.errors import ConfigError, IncompatibleWeights, StructureError
from metamerge.network import Given, carried_program, find_network
from metamerge.refit import observe, refit
from metamerge.registry import bind, check_options, get_method
from metamerge.repair import repair
from metamerge.structure import Inputs, Layout, PermutationSpec, Program
from metamerge.weights import (
    Weights,
    check_compatible,
    check_finite,
    stack,
    strip_wrappers,
    unstack,
)

CORRECTIONS = {"repair": repair, "refit": refit}
REPORTED = 256  # calibration inputs that the variance ratios of the report are measured on


@dataclass(frozen=True)
class Merged:
    """What ``merge`` gives back.

    Attributes:
        weights: Fused state dict, in memory of its own.
        report: What was done: members, alignment and its cost, variance ratio per layer, seconds.
        program: The traced network, where one was needed or a checkpoint carried one.
    """

    weights: Weights
    report: dict[str, Any]
    program: Program | None = None

    def to_module(self, model: nn.Module) -> nn.Module:
        """A copy of a module that carries the fused weights.

        Args:
            model: A module of the members' architecture; it is not changed.

        Returns:
            The copy.

        Raises:
            IncompatibleWeights: If the weights do not fit the module.
        """
        module = copy.deepcopy(model)
        try:
            module.load_state_dict(self.weights)
        except RuntimeError as error:
            raise IncompatibleWeights(f"{type(model).__name__}: {error}") from error
        return module

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write weights and report as a checkpoint that ``merge`` reads again.

        Args:
            folder: Target folder.
            overwrite: Whether a checkpoint that lies there may be replaced.

        Returns:
            The folder.
        """
        program = self.program.to_json() if self.program else None
        return save_checkpoint(
            self.weights,
            folder,
            metadata={"merge": self.report},
            program=program,
            overwrite=overwrite,
        )


def merge(
    checkpoints: Source | Iterable[Source],
    *,
    method: str = "gnn",
    align: str | None = "default",
    correct: str | None = None,
    model: nn.Module | None = None,
    merger: Any = None,
    batches: Batches | None = None,
    base: Source | None = None,
    spec: PermutationSpec | None = None,
    example_inputs: Inputs | None = None,
    seed: int = 0,
    device: str = "auto",
    **options: Any,
) -> Merged:
    """Make one network of K checkpoints.

    Args:
        checkpoints: Paths, folders, state dicts, modules or zoo members, in any mixture; a zoo
            address such as ``zoos/digits#test-k8/3`` stands for all members of a family.
        method: One of ``list_methods()``.
        align: ``"weight_matching"``, None for members as they are, or ``"default"`` for what the
            method wants.
        correct: ``"repair"`` or ``"refit"`` the fused weights on the inputs of ``batches``.
        model: A module of the members' architecture; not needed where a checkpoint carries its
            program, as those of a zoo do, or where a member is a module itself.
        merger: A trained merger, or its folder, for learned methods.
        batches: Calibration data: inputs ``[b, ...]``, a pair (inputs, labels), or an iterable of
            these.
        base: The checkpoint that the members were fine-tuned from, for methods that want it.
        spec: A permutation spec of your own; it is proved before use. A model that cannot be traced
            needs one.
        example_inputs: What to trace the model with where ``batches`` do not say it: a tensor, a
            tuple of them, or a mapping from the names of forward()'s arguments.
        seed: Seed of everything random.
        device: ``"cpu"``, ``"cuda"``, or ``"auto"`` for a GPU where there is one.
        **options: Options of the method.

    Returns:
        Fused weights and the report.

    Raises:
        ConfigError: If there is no checkpoint, something is missing, or method, alignment, device
            or an option is unknown.
        CheckpointError: If a checkpoint cannot be read, is unsafe or holds NaN.
        StructureError: If the network cannot be followed, or the spec fails its proof.
        IncompatibleWeights: If the members differ in keys or shapes, or do not fit the model.

    Examples:
        >>> nets = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(3)]
        >>> fused = merge(nets, method="average").to_module(nets[0])
        >>> fused(torch.zeros(1, 4)).shape
        torch.Size([1, 3])
    """
    clock = time.perf_counter()
    record = get_method(method)
    align = record.align if align == "default" else align
    _check_choice("align", align, ALIGNMENTS)
    _check_choice("correct", correct, CORRECTIONS)
    _check_kinds(model=(model, nn.Module), spec=(spec, PermutationSpec), seed=(seed, int))
    check_options(record, options)
    if correct and batches is None:
        raise ConfigError(
            f"correct={correct!r} needs batches=<calibration inputs [b, ...]>; none were given."
        )
    where = _device(device)
    sources = _listed(checkpoints)
    members = [found for source in sources for found in read_checkpoints(source)]
    named = _checked(members)
    report: dict[str, Any] = {
        "method": method,
        "align": align,
        "correct": correct,
        "members": [name for name, _ in named],
        "verified": [member.verified for member in members],
        "seed": seed,
    }
    if len(named) == 1:
        report["note"] = "one checkpoint: returned as it is"
        same = {key: tensor.clone() for key, tensor in named[0][1].items()}
        return Merged(same, report, carried_program(members))

    data = None if batches is None else collect(batches, labelled=False)
    learned = _merger(merger) if "merger" in record.resources else None
    layout = None
    wanted = "layout" in record.required or ("layout" in record.resources and data is not None)
    if align or correct or wanted:
        given = Given(members, sources, model, data, learned, example_inputs, spec)
        layout, named = find_network(given, named)
    resources = {
        "layout": layout,
        "merger": learned,
        "batches": data if data is None or data[1] is not None else data[0],
        "base": _base(base, named),
        "generator": torch.Generator().manual_seed(seed),
    }
    arguments = bind(record, resources, options)
    aligned = _aligned([weights for _, weights in named], layout, align, report)
    with torch.no_grad():
        fused = record.function([_to(w, where) for w in aligned], **_on(arguments, where))
        if correct:
            fused = _corrected(fused, aligned, layout, data[0], correct)
    fused = _finished(fused, named, layout)
    if layout and layout.program and data and len(data[0]) > 1:  # one input has no variance
        try:
            report["variance_ratio"] = _variance_ratio(fused, aligned, layout, data[0][:REPORTED])
        except StructureError as error:  # aligned and averaged all the same
            report["variance_ratio"] = f"not measured: {error}"
    report["parameters"] = sum(t.numel() for t in fused.values() if t.is_floating_point())
    report["seconds"] = round(time.perf_counter() - clock, 4)
    return Merged(fused, report, (layout and layout.program) or carried_program(members))


def _check_choice(name: str, value: str | None, known: Mapping[str, Any]) -> None:
    if value is not None and value not in list(known):
        raise ConfigError(f"{name}: got {value!r}, expected None or one of {sorted(known)}.")


def _check_kinds(**given: tuple[Any, type]) -> None:
    for name, (value, kind) in given.items():
        if value is not None and not isinstance(value, kind):
            raise ConfigError(
                f"{name}: got {value!r} of type {type(value).__name__}, expected {kind.__name__}."
            )


def _listed(checkpoints: Any) -> list[Any]:
    """One source stands for itself; anything else that can be walked through holds sources."""
    if isinstance(checkpoints, str | os.PathLike | nn.Module | Mapping | Checkpoint):
        return [checkpoints]
    advice = "Pass at least one path, state dict or module."
    if not isinstance(checkpoints, Iterable):
        raise ConfigError(f"checkpoints: got {checkpoints!r}. {advice}")
    sources = list(checkpoints)
    if not sources:
        raise ConfigError(f"checkpoints: got none. {advice}")
    return sources


def _checked(members: list[Checkpoint]) -> list[tuple[str, Weights]]:
    named = strip_wrappers([(member.name, member.weights) for member in members])
    check_compatible(named)
    for index, (name, weights) in enumerate(named):
        check_finite(f"checkpoints[{index}] ({name})", weights)
    return named


def _merger(merger: Any) -> Any:
    if isinstance(merger, str | os.PathLike):
        from metamerge.mergers import load_merger  # torch_geometric takes a second to import

        return load_merger(merger)
    return merger


def _base(base: Source | None, named: list[tuple[str, Weights]]) -> Weights | None:
    if base is None:
        return None
    found = read_checkpoints(base)[0]
    pair = strip_wrappers([named[0], (f"base, {found.name}", found.weights)])
    check_compatible(pair)
    check_finite(*pair[1])
    return pair[1][1]


def _aligned(
    weights: list[Weights], layout: Layout | None, align: str | None, report: dict[str, Any]
) -> list[Weights]:
    if align is None or layout is None:
        return weights
    spec = layout.spec
    stacked = {key: t[None] for key, t in stack([_wide(w) for w in weights]).items()}  # [1, m, ...]
    perm = ALIGNMENTS[align](stacked, spec)
    report["matching_cost"] = float(matching_cost(stacked, spec, perm))
    report["matching_cost_before"] = float(matching_cost(stacked, spec, spec.identity()))
    return [
        spec.permute(own, {group: index[0, m] for group, index in perm.items()})
        for m, own in enumerate(weights)
    ]


def _wide(weights: Weights) -> Weights:
    """Floating tensors in float32, so that members of different dtypes can be stacked."""
    return {key: t.float() if t.is_floating_point() else t for key, t in weights.items()}


def _corrected(
    fused: Weights, aligned: list[Weights], layout: Layout, inputs: Tensor, correct: str
) -> Weights:
    device = next(iter(fused.values())).device
    members = {k: t[None].to(device) for k, t in stack([_wide(w) for w in aligned]).items()}
    start = {k: t[None] for k, t in _wide(fused).items()}
    return unstack(CORRECTIONS[correct](start, members, layout, inputs.to(device)))[0]


def _finished(fused: Weights, named: list[tuple[str, Weights]], layout: Layout | None) -> Weights:
    """Back to the CPU, the members' dtype and ties, and nothing that is not finite."""
    kinds = {key: _promoted([weights[key] for _, weights in named]) for key in named[0][1]}
    done = {key: fused[key].detach().cpu().to(kinds[key]).contiguous() for key in kinds}
    for alias, key in layout.program.tied.items() if layout and layout.program else ():
        done[alias] = done[key].clone()
    check_finite("the fused weights", done)
    return done


def _promoted(tensors: list[Tensor]) -> torch.dtype:
    kind = tensors[0].dtype
    for tensor in tensors[1:]:
        kind = torch.promote_types(kind, tensor.dtype)
    return kind


def _variance_ratio(
    fused: Weights, aligned: list[Weights], layout: Layout, inputs: Tensor
) -> dict[str, float]:
    """Variance of the fused pre-activations over the members' mean, per layer; 1 is healthy."""
    with torch.no_grad():
        members = observe(
            {k: t[None] for k, t in stack([_wide(w) for w in aligned]).items()}, layout, inputs
        )
        own = observe({k: t[None, None] for k, t in _wide(fused).items()}, layout, inputs)
    return {
        layer.weight: float(
            own[layer.node].var(2).mean() / members[layer.node].var(2).mean().clamp_min(1e-12)
        )
        for layer in layout.layers
    }


def _device(device: str) -> torch.device:
    there = torch.cuda.is_available()
    if device == "auto":
        return torch.device("cuda" if there else "cpu")
    kind = str(device).partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"device: got {device!r}, expected 'auto', 'cpu' or 'cuda'.")
    if kind == "cuda" and not there:
        raise ConfigError(f"device: got {device!r}, but torch sees no GPU here. Use 'cpu'.")
    return torch.device(device)


def _to(weights: Weights, device: torch.device) -> Weights:
    return {key: tensor.to(device) for key, tensor in weights.items()}


def _on(arguments: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Move what a method computes with to the device; everything else stays as it is."""
    moved = dict(arguments)
    if isinstance(moved.get("merger"), nn.Module):
        moved["merger"] = (
            copy.deepcopy(moved["merger"]).to(device) if device.type != "cpu" else moved["merger"]
        )
    if moved.get("base") is not None:
        moved["base"] = _to(moved["base"], device)
    if isinstance(moved.get("batches"), Tensor):
        moved["batches"] = moved["batches"].to(device)
    elif moved.get("batches") is not None:
        moved["batches"] = tuple(t.to(device) for t in moved["batches"])
    return moved
