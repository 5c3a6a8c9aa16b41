"""What segments may be cut by: features of rows, some of them told by a reference network."""

from dataclasses import replace

import torch
from torch import Tensor

from metamerge.errors import ConfigError
from metamerge.structure import Execution, Program
from metamerge.weights import Weights
from zoo import architectures
from zoo.parts import TaskSplit
from zoo.recipe import ZooOptions, factory_for
from zoo.splits import features
from zoo.training import cross_entropy, init_networks, predict, squared_error, train_networks

_BATCH = 4096  # rows that a reference network reads at a time
_IMPORTANT = 32  # inputs that are kept at most, and no more than half of them


def features_for(options: ZooOptions, split: TaskSplit) -> dict[str, Tensor]:
    """Compute what the split of a zoo asks for beside targets and rows.

    Args:
        options: Of the zoo.
        split: Its task; no row but those of the segments has a say.

    Returns:
        ``features`` ``[task rows, d]``, ``scores`` ``[task rows]``, or nothing.
    """
    task, rows = split.task, split.rows("segments")
    if options.split == "difficulty":
        return {"scores": features.difficulty_scores(_judged_unseen(options, split), task.targets)}
    if options.split != "clusters":
        return {}
    generator = torch.Generator().manual_seed(options.seed)
    by = {
        "inputs": lambda: features.inputs(task.inputs),
        "important": lambda: features.important_inputs(
            task.inputs,
            task.targets,
            rows,
            keep=min(_IMPORTANT, -(-task.inputs[0].numel() // 2)),
            generator=generator,
        ),
        "labels": lambda: _labels(split),
        "targets": lambda: _targets(split),
        "errors": lambda: features.errors(_judged_unseen(options, split), task.targets),
        "activations": lambda: features.activations(_hidden(options, split)),
    }
    return {"features": by[options.by]()}


def _labels(split: TaskSplit) -> Tensor:
    """Targets as numbers that can be clustered."""
    task = split.task
    if task.regression:
        return task.targets
    return torch.nn.functional.one_hot(task.targets, task.classes).float()


def _targets(split: TaskSplit) -> Tensor:
    """Targets as numbers that can be clustered; those of a regression in ten bins each."""
    task = split.task
    if not task.regression:
        return _labels(split)
    return features.binned_targets(task.targets, split.rows("segments")).float()[:, None]


def _judged_unseen(options: ZooOptions, split: TaskSplit) -> Tensor:
    """Outputs for the rows of the segments by a network that was trained on the other half."""
    rows, task = split.rows("segments"), split.task
    generator = torch.Generator().manual_seed(options.seed)
    halves = rows[torch.randperm(len(rows), generator=generator)].tensor_split(2)
    program, weights = _trained(options, split, list(halves))
    outputs = torch.zeros(len(task.inputs), task.outputs)
    for network, unseen in enumerate(reversed(halves)):
        own = {key: tensor[network : network + 1] for key, tensor in weights.items()}
        for batch in unseen.split(_BATCH):
            outputs[batch] = predict(program, own, task.inputs[batch])[0]
    return outputs


def _hidden(options: ZooOptions, split: TaskSplit) -> Tensor:
    """What the last layer of a network reads, for the rows of the segments, ``[task rows, u]``."""
    rows, task = split.rows("segments"), split.task
    program, weights = _trained(options, split, [rows])
    own = {key: tensor[0] for key, tensor in weights.items()}
    linear = [i for i, node in enumerate(program.nodes) if node.op == "linear.default"]
    if not linear:
        raise ConfigError(f"by: {options.architecture!r} has no linear layer to be read before.")
    last = linear[-1]
    hidden = None
    for batch in rows.split(_BATCH):
        run = Execution(program, own, [task.inputs[batch]], stacked=False)
        with torch.no_grad():
            for node in program.nodes[:last]:
                run.step(node)
        found = run.argument(program.nodes[last], 0).value
        hidden = found.new_zeros(len(task.inputs), *found.shape[1:]) if hidden is None else hidden
        hidden[batch] = found
    return hidden


def _trained(options: ZooOptions, split: TaskSplit, rows: list[Tensor]) -> tuple[Program, Weights]:
    """Reference networks, one per set of rows: the zoo's architecture with its options."""
    task = split.task
    network = factory_for(replace(options, classes_per_family=0), task)  # it knows all of them
    program = architectures.program_of(network(), task.inputs.shape[1:])
    trained = train_networks(
        program,
        init_networks(network, [options.seed] * len(rows)),
        task.inputs,
        task.targets,
        rows,
        epochs=options.reference_epochs,
        batch_size=options.batch_size,
        lr=options.lr[0],
        seed=options.seed,
        loss=squared_error if task.regression else cross_entropy,
        frozen=architectures.frozen(network()),
    )
    return program, trained.weights
