"""Checkpoints of the user's own as families to compare on, and the images of a task to judge by."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor, nn

from evaluation.judged import Judged
from metamerge.errors import ConfigError
from metamerge.network import carried_program, find_layout, fit_members
from metamerge.sources import Members, read_base, read_members
from metamerge.structure import Layout, Program
from metamerge.weights import Weights, check_compatible, stack
from zoo import architectures
from zoo.imports.checkpoint_folder import checkpoint_files
from zoo.parts import TaskSplit, split_task
from zoo.tasks import Task, load_task
from zoo.training import predict

MOST = 2000  # objective images where nobody says how many
INDEX = "*.index.json"  # of a checkpoint that is cut into shards


@dataclass(frozen=True)
class OwnOptions:
    """Checkpoints to compare on, and the task that judges them.

    Attributes:
        checkpoints: Files, or folders that hold a family each.
        task: A data set by name, or a file.
        base: What the members were fine-tuned from.
        model: Architecture, as a zoo names it; None where checkpoints carry their own.
        widths: Units or channels per hidden layer of the model.
        data: Folder with the task's files.
        target: Column to predict, of the user's own file.
        drop: Columns to leave out.
        objective: Images for merges and controls; 0 for half of what is not test.
    """

    checkpoints: tuple[str, ...]
    task: str
    base: str | None = None
    model: str | None = None
    widths: tuple[int, ...] | None = None
    data: str | None = None
    target: str | None = None
    drop: tuple[str, ...] = ()
    objective: int = 0


def own_families(options: OwnOptions, *, seed: int) -> Judged:
    """Read checkpoints as families, and cut a task into the images that judge them.

    Args:
        options: Which checkpoints, and which task.
        seed: Seed of the cut.

    Returns:
        The families. Which images they learned from nobody knows.

    Raises:
        ConfigError: If the checkpoints make no families, nothing says what network they are, or
            the task is not theirs.
        CheckpointError: If one cannot be read, is unsafe or holds NaN.
        IncompatibleWeights: If members differ in keys or shapes.
        StructureError: If they do not fit the model.
        ZooError: If the task cannot be read.
    """
    task = load_task(options.task, options.data, target=options.target, drop=options.drop)
    if task.regression:
        raise ConfigError(f"task: {task.name} asks for numbers; classifications are compared here.")
    split = _split(replace(task, standardise=False), options.objective, seed)
    families = _read_families(options.checkpoints)
    network, program = _network(options, task, families)
    layout = find_layout(program, None, families[0].named[0])
    named = [fit_members(family.named, program) for family in families]
    check_compatible([pair for family in named for pair in family])
    weights = stack([_floats(stack([own for _, own in family])) for family in named])
    _check_outputs(layout, weights, split)
    base = read_base(options.base, families[0].named)
    bases = None if base is None else {k: t.expand(len(named), *t.shape) for k, t in base.items()}
    return Judged(
        name="checkpoints",
        layout=layout,
        families=weights,
        classes=None,
        split=split,
        network=network,
        segments=None,
        recipe={},
        training=None,
        identity={"members": _digest(weights), "task": task.digest, "parts": _parts(split, seed)},
        bases=None if bases is None else _floats(bases),
        note=_note(split, weights, layout),
    )


# ----------------------------------------------------------------------------------------------
# members


def _read_families(sources: Sequence[str]) -> list[Members]:
    """One family of all files, or one of each folder or zoo address that holds several."""
    found = [read_members(_files(source)) for source in sources]
    sizes = [len(members.named) for members in found]
    if all(size == 1 for size in sizes):
        found, sizes = [read_members(list(sources))], [len(sources)]
    if len(set(sizes)) > 1 or sizes[0] < 2:
        told = ", ".join(f"{s} ({n})" for s, n in zip(sources, sizes, strict=False))
        raise ConfigError(
            f"checkpoints: expected two files or more, or folders that hold as many each, got "
            f"{told}. Files make one family; every folder makes one."
        )
    return found


def _files(source: str) -> list[str]:
    """The checkpoints that a source stands for: those of a folder, unless it is one itself."""
    folder = Path(source).expanduser()
    if not folder.is_dir() or any(folder.glob(INDEX)):
        return [source]
    files = checkpoint_files(folder)
    return [source] if len(files) == 1 else [str(folder / file) for file in files]


def _network(
    options: OwnOptions, task: Task, families: Sequence[Members]
) -> tuple[Callable[[], nn.Module] | None, Program]:
    """What makes a fresh network, if anything does, and the traced one."""
    shape = tuple(task.inputs.shape[1:])
    if options.model:
        build = partial(architectures.build, options.model, shape, task.outputs)
        network = partial(build, widths=options.widths)
        return network, architectures.program_of(network(), shape)
    program = carried_program(families[0].checkpoints)
    if program is None:
        raise ConfigError(
            "model: the checkpoints do not say what network they belong to. Give --model: "
            f"{', '.join(architectures.ARCHITECTURES)} (with --widths), or a factory of your own "
            "as package.module:factory, which is called with the shape of an input and the number "
            "of classes."
        )
    expected = tuple(program.input_shape()[1:])
    if expected != shape:
        raise ConfigError(
            f"task: {task.name} has inputs of shape {shape}, the checkpoints' network reads "
            f"{expected}. Name the task that they were trained on."
        )
    return None, program


def _check_outputs(layout: Layout, families: Weights, split: TaskSplit) -> None:
    one = {key: tensor[0, :1] for key, tensor in families.items()}
    outputs = predict(layout.program, one, split.task.inputs[:2]).shape[-1]
    if outputs != split.task.classes:
        raise ConfigError(
            f"task: {split.task.name} has {split.task.classes} classes, the checkpoints' networks "
            f"put out {outputs} numbers. Name the task that they were trained on."
        )


def _floats(weights: Weights) -> Weights:
    """All floats in single precision, in which everything is compared."""
    return {k: t.float() if t.is_floating_point() else t for k, t in weights.items()}


def _digest(weights: Weights) -> str:
    digest = sha256()
    for key, tensor in sorted(weights.items()):
        digest.update(key.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


# ----------------------------------------------------------------------------------------------
# images


def _split(task: Task, objective: int, seed: int) -> TaskSplit:
    test = len(task.test_rows) if task.test_rows else round(len(task.targets) / 4)
    free = len(task.targets) - test
    return split_task(task, seed=seed, objective=objective or min(MOST, free // 2))


def _parts(split: TaskSplit, seed: int) -> dict[str, int]:
    return {"objective": len(split.objective), "test": len(split.test), "seed": seed}


def _note(split: TaskSplit, families: Weights, layout: Layout) -> str:
    """What nobody knows, and whether members seem to read these inputs at all."""
    drawn = "the official test images" if split.task.test_rows else "a quarter of the rows, drawn"
    note = (
        f"nobody knows which images these members learned from. Test images are {drawn}; where "
        "members have seen some of them, figures are too high."
    )
    inputs, targets = split.images("validation")
    members = {key: tensor.flatten(0, 1) for key, tensor in families.items()}
    said = predict(layout.program, members, inputs).argmax(-1)  # [f * m, b]
    known, chance = float((said == targets).float().mean()), _chance(targets)
    if known < 1.5 * chance:
        note += (
            f" They score {100 * known:.0f} % on average, not far from chance: are inputs scaled "
            "as they were in training? Here they are as the task has them."
        )
    return note


def _chance(targets: Tensor) -> float:
    """Share of the commonest class."""
    return float(torch.bincount(targets).max()) / len(targets)
