"""``merge()``: load, check, align, fuse, correct."""

import copy
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metamerge.alignment.aligning import (
    align_members,
    check_align_options,
    chosen_alignments,
    listed,
)
from metamerge.calibration import Batches, collect
from metamerge.checkpoints import Source, save_checkpoint
from metamerge.corrections.correcting import correct_fused
from metamerge.corrections.variance import variance_ratio
from metamerge.declaration import Record, bind, check_options
from metamerge.errors import ConfigError, IncompatibleWeights, StructureError
from metamerge.network import Data, Given, carried_program, find_network
from metamerge.registry import Alignment, MergeMethod, get_correction, get_method
from metamerge.sources import choose_device, read_base, read_members, read_merger
from metamerge.structure import Inputs, Layout, PermutationSpec, Program
from metamerge.structure.rebuilding import rebuilt
from metamerge.weights import (
    Weights,
    check_finite,
    check_statistics,
    stack,
    widened,
)

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
            model: A module of the members' architecture; it is not changed. Its widths may be
                others where the program is known.

        Returns:
            The copy.

        Raises:
            IncompatibleWeights: If the weights do not fit the module.
        """
        own = model.state_dict()
        same = all(k not in own or own[k].shape == t.shape for k, t in self.weights.items())
        if self.program is not None and not same:
            return rebuilt(model, self.program, self.weights)
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
    align: str | Sequence[str] | None = "default",
    correct: str | Sequence[str] | None = None,
    model: nn.Module | None = None,
    merger: Any = None,
    batches: Batches | None = None,
    base: Source | None = None,
    spec: PermutationSpec | None = None,
    example_inputs: Inputs | None = None,
    seed: int = 0,
    device: str = "auto",
    align_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Merged:
    """Make one network of K checkpoints.

    Where there are ``batches``, running statistics of batch normalisations are measured anew on
    them, whatever the method.

    Args:
        checkpoints: Paths, folders, state dicts, modules, zoo members or addresses of MLflow such
            as ``runs:/<run>/<model>`` and ``models:/<name>@<alias>``, in any mixture; a zoo address
            such as ``zoos/digits#test-k8/3`` stands for all members of a family.
        method: One of ``list_methods()``.
        align: One of ``list_alignments()`` or several, one after the other, such as
            ``["canonical", "weight_matching"]``; None for members as they are; ``"default"`` for
            what the method wants, or weight matching where it wants none and ``correct`` does.
        correct: One of ``list_corrections()``, such as ``"repair"`` or ``"refit"``, or several:
            what is done to the fused weights on the inputs of ``batches``.
        model: A module of the members' architecture; not needed where a checkpoint carries its
            program, as those of a zoo do, or where a member is a module itself.
        merger: A trained merger, its folder or its address in MLflow, for learned methods; None
            for the one that comes with the package.
        batches: Calibration data: inputs ``[b, ...]``, a pair (inputs, labels), or an iterable of
            these.
        base: The checkpoint that the members were fine-tuned from, for methods that want it.
        spec: A permutation spec of your own; it is proved before use. A model that cannot be traced
            needs one.
        example_inputs: What to trace the model with where ``batches`` do not say it: a tensor, a
            tuple of them, or a mapping from the names of forward()'s arguments.
        seed: Seed of everything random.
        device: ``"cpu"``, ``"cuda"``, or ``"auto"`` for a GPU where there is one.
        align_options: Options of the alignment.
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
    if align == "default":
        align = record.align
        if correct and align is None and "base" not in record.required:
            align = "weight_matching"  # corrections compare slots with the members' units
    alignments = chosen_alignments(align)
    corrections = [get_correction(name) for name in listed(correct)]
    _check_kinds(model=(model, nn.Module), spec=(spec, PermutationSpec), seed=(seed, int))
    check_options(record, options)
    check_align_options(alignments, align_options or {})
    if corrections and batches is None:
        raise ConfigError(
            f"correct={correct!r} needs batches=<calibration inputs [b, ...]>; none were given."
        )
    if alignments and "base" in record.required:
        raise ConfigError(
            f"align={align!r}: {method} reads members as changes of their base, and permuting them "
            "would take them away from it. Leave align out, or pass align=None."
        )
    where = choose_device(device)
    elastic = bool(alignments) and alignments[0].elastic  # later ones get members of one width
    sources, members, named = read_members(checkpoints, elastic=elastic)
    report: dict[str, Any] = {
        "method": method,
        "align": align if align is None or isinstance(align, str) else list(align),
        "correct": correct if correct is None or isinstance(correct, str) else list(correct),
        "members": [name for name, _ in named],
        "verified": [member.verified for member in members],
        "seed": seed,
    }
    if len(named) == 1:
        report["note"] = "one checkpoint: returned as it is"
        same = {key: tensor.clone() for key, tensor in named[0][1].items()}
        return Merged(same, report, carried_program(members))

    data = None if batches is None else collect(batches, labelled=False)
    if data is None:
        check_statistics(named)
    learned = read_merger(merger, method) if "merger" in record.resources else None
    layout = None
    if _needs_network(record, alignments, corrections, data, named):
        given = Given(members, sources, model, data, learned, example_inputs, spec)
        layout, named = find_network(given, named, elastic=elastic)
    resources = {
        "layout": layout,
        "merger": learned,
        "batches": data if data is None or data[1] is not None else data[0],
        "labels": None if data is None else data[1],
        "base": read_base(base, named),
        "generator": torch.Generator().manual_seed(seed),
        "report": {},
    }
    arguments = _on(bind(record, resources, options), where)
    aligned = [_to(weights, where) for _, weights in named]
    if alignments:
        at_hand = _on({k: resources[k] for k in ("batches", "generator")}, where)
        aligned, told = align_members(
            aligned, layout, align, resources=at_hand, options=align_options
        )
        report["alignment"] = told
        ends = {"matching_cost": told[-1], "matching_cost_before": told[0]}
        report.update({name: end[name] for name, end in ends.items() if name in end})
    with torch.no_grad():
        fused = record.function(aligned, **arguments)
        wider = any(fused[key].shape != tensor.shape for key, tensor in aligned[0].items())
        if wider and corrections:
            raise ConfigError(
                f"correct={correct!r} compares units with the members', and {method} made a "
                "network of other widths. Leave correct out."
            )
        if data and layout and layout.program and not wider:
            here = tuple(None if t is None else t.to(where) for t in data)
            fused, report["corrections"] = correct_fused(fused, aligned, layout, here, corrections)
    if resources["report"]:
        report["chosen"] = resources["report"]
    fused = _finished(fused, named, layout)
    measured = data and len(data[0]) > 1 and not wider  # one input has no variance
    if layout and layout.program and measured:
        try:
            inputs = data[0][:REPORTED]
            report["variance_ratio"] = _variance_ratio(fused, aligned, layout, inputs)
        except StructureError as error:  # aligned and averaged all the same
            report["variance_ratio"] = f"not measured: {error}"
    report["parameters"] = sum(t.numel() for t in fused.values() if t.is_floating_point())
    report["seconds"] = round(time.perf_counter() - clock, 4)
    program = (layout and layout.program) or carried_program(members)
    return Merged(fused, report, None if wider else program)  # the program says the widths


def _needs_network(
    record: MergeMethod,
    alignments: list[Alignment],
    corrections: list[Record],
    data: Data | None,
    named: list[tuple[str, Weights]],
) -> bool:
    """Whether anything has to know how the tensors hang together."""
    if alignments or corrections or "layout" in record.required:
        return True
    normalised = any(key.endswith("running_var") for key in named[0][1])
    return data is not None and ("layout" in record.resources or normalised)


def _check_kinds(**given: tuple[Any, type]) -> None:
    for name, (value, kind) in given.items():
        if value is not None and not isinstance(value, kind):
            raise ConfigError(
                f"{name}: got {value!r} of type {type(value).__name__}, expected {kind.__name__}."
            )


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
    members = {key: tensor[None] for key, tensor in stack(widened(aligned)).items()}
    own = {key: tensor[None] for key, tensor in widened([fused])[0].items()}
    found = variance_ratio(own, members, layout, inputs)
    return {key: float(ratio) for key, ratio in found.items()}


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
