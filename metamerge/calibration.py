"""Calibration data: what users pass as ``batches``, checked and put into one tensor.

Shape comments: m models, b inputs, c classes.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metamerge.errors import ConfigError, IncompatibleWeights, NonFinite, StructureError
from metamerge.structure import Layout, Program, run
from metamerge.weights import Weights, stack

Batch = Tensor | tuple[Tensor, Tensor]
Batches = Batch | Iterable[Batch]

_CHUNK = 256  # inputs per pass: the widest feature map of all members has to fit into memory
_GIVE = "Give a tensor of inputs [b, ...], a pair (inputs, labels), or an iterable of these."


def collect(
    batches: Batches, *, labelled: bool, numbers: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Check calibration data and join its batches.

    Args:
        batches: Inputs ``[b, ...]``, a tuple of inputs and labels ``[b]``, or an iterable of either
            (such as a ``DataLoader``), which is read once to its end.
        labelled: Whether labels are needed.
        numbers: Whether targets, numbers ``[b, o]`` or ``[b]`` that the network should put out,
            stand where otherwise labels do.

    Returns:
        Inputs ``[b, ...]`` in float32, and labels ``[b]`` or targets ``[b, o]``; None for these if
        there are none.

    Raises:
        ConfigError: If there is nothing, labels are needed and missing, or a batch has the wrong
            type, shape or dtype or holds values that are not finite.

    Examples:
        >>> inputs, labels = collect([torch.zeros(2, 3), torch.ones(1, 3)], labelled=False)
        >>> inputs.shape, labels
        (torch.Size([3, 3]), None)
    """
    pairs, what = [], "targets" if numbers else "labels"
    for where, batch in _named(batches):
        inputs, labels = _split(where, batch)
        _check_inputs(where, inputs, pairs[0][0] if pairs else None)
        if labels is not None:
            check = _check_targets if numbers else _check_labels
            check(where, labels, len(inputs))
        elif labelled:
            raise ConfigError(f"{where} has no {what}. Pass pairs (inputs, {what}).")
        pairs.append((inputs.to(torch.float32), labels))
    if not pairs or not sum(len(inputs) for inputs, _ in pairs):
        raise ConfigError(f"batches holds no inputs. {_GIVE}")
    having = [labels is not None for _, labels in pairs]
    if any(having) and not all(having):
        raise ConfigError(
            f"batches[{having.index(False)}] has no {what}, batches[{having.index(True)}] has. "
            f"Pass {what} with all batches or with none."
        )
    inputs = torch.cat([inputs for inputs, _ in pairs])
    if not all(having):
        return inputs, None
    if not numbers:
        return inputs, torch.cat([labels.long() for _, labels in pairs])
    targets = [t[:, None] if t.ndim == 1 else t for _, t in pairs]
    if len({t.shape[1:] for t in targets}) > 1:
        shapes = ", ".join(str(tuple(t.shape)) for t in targets)
        raise ConfigError(f"batches: targets have shapes {shapes}. Only the first axis may differ.")
    return inputs, torch.cat(targets)


def losses(weights: Sequence[Weights], layout: Layout, inputs: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of each of several models, all of them in one batched pass.

    Args:
        weights: One state dict per model.
        layout: Their architecture; its output is logits ``[b, c]``.
        inputs: ``[b, ...]``, float32.
        labels: ``[b]``.

    Returns:
        One loss per model, ``[m]``, in float64.

    Raises:
        ConfigError: If inputs or labels are not those of this architecture.
        IncompatibleWeights: If the network's output is not logits.
        NonFinite: If a model's loss is not finite.
    """
    check_fit(layout.program, inputs)
    stacked = {k: t.float() if t.is_floating_point() else t for k, t in stack(weights).items()}
    total = torch.zeros(len(weights), dtype=torch.float64, device=inputs.device)
    for some, wanted in zip(inputs.split(_CHUNK), labels.split(_CHUNK), strict=True):
        logits = run(layout.program, stacked, [some], stacked=True)  # [m, b, c]
        check_logits(logits, wanted)
        targets = wanted.expand(len(weights), -1)  # [m, b]
        total = total + F.cross_entropy(logits.mT, targets, reduction="none").double().sum(1)
    bad = (~total.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise NonFinite(
            f"weights[{bad[0]}] has a loss of {float(total[bad[0]])} on the batches. Leave this "
            f"model out, or look for inputs that are out of its range."
        )
    return total / len(inputs)


def predict(weights: Weights, layout: Layout, inputs: Tensor) -> Tensor:
    """Logits of several models on all inputs, some inputs at a time.

    Args:
        weights: Stacked models, every tensor ``[m, ...]``, float32.
        layout: Their architecture; its output is logits ``[b, c]``.
        inputs: ``[b, ...]``, float32.

    Returns:
        ``[m, b, c]``.

    Raises:
        ConfigError: If the inputs are not those of this architecture.
        IncompatibleWeights: If the network's output is not logits.
    """
    check_fit(layout.program, inputs)
    parts = [run(layout.program, weights, [some], stacked=True) for some in inputs.split(_CHUNK)]
    check_logits(parts[0])
    return torch.cat(parts, 1)


def targets(logits: Tensor, labels: Tensor | None) -> Tensor:
    """Probabilities that a merged classifier should have: its labels', or its members' soft vote.

    Args:
        logits: The members', ``[..., m, b, c]``.
        labels: ``[b]``, or None where there are none.

    Returns:
        ``[b, c]`` for labels, ``[..., b, c]`` for the soft vote.

    Raises:
        ConfigError: If the labels are not those of this network.
    """
    if labels is None:
        return logits.softmax(-1).mean(-3)
    check_logits(logits.flatten(0, -3), labels)
    return F.one_hot(labels, logits.shape[-1]).to(logits.dtype)


def divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence of models from wanted probabilities.

    Against labels, which have no entropy, this is the cross entropy.

    Args:
        logits: ``[..., b, c]``.
        wanted: Probabilities ``[b, c]`` or ``[..., b, c]``.

    Returns:
        ``[...]``.
    """
    predicted = logits.log_softmax(-1)
    pointwise = F.kl_div(predicted, wanted.expand_as(predicted), reduction="none")
    return pointwise.sum(-1).mean(-1)


def check_fit(program: Program | None, inputs: Tensor) -> None:
    """Refuse calibration inputs that are not of the network's shape.

    Args:
        program: The network.
        inputs: ``[b, ...]``.

    Raises:
        ConfigError: If the shapes differ.
        StructureError: If the network cannot be traced, or only takes batches of the size it was
            traced with.
    """
    if program is None:
        raise StructureError(
            "The network cannot be traced, so nothing can be run on batches: choose a method that "
            'does without, such as method="average".'
        )
    program.check_rows()
    wanted = program.input_shape()[1:]
    if tuple(inputs.shape[1:]) != tuple(wanted):
        raise ConfigError(
            f"batches: inputs have shape {tuple(inputs.shape)}, the network takes (b, "
            f"{', '.join(map(str, wanted))}). Pass inputs of the checkpoints' task."
        )


def check_logits(logits: Tensor, labels: Tensor | None = None) -> None:
    """Refuse outputs that are not logits, and labels that they do not have.

    Args:
        logits: ``[m, b, c]``.
        labels: ``[b]``.

    Raises:
        IncompatibleWeights: If the outputs have another number of axes.
        ConfigError: If a label lies beyond the classes.
    """
    if logits.ndim != 3:
        raise IncompatibleWeights(
            f"The network's output has shape {tuple(logits.shape[1:])}, expected logits (b, c). "
            f"Losses are there for classifiers only; choose a method that does without labels."
        )
    if labels is not None and int(labels.max()) >= logits.shape[-1]:
        raise ConfigError(
            f"batches: labels reach {int(labels.max())}, the network has classes 0 to "
            f"{logits.shape[-1] - 1}. Pass labels of the checkpoints' task."
        )


def _named(batches: Any) -> Iterator[tuple[str, Any]]:
    """Walk over the batches, each with its name for messages."""
    if isinstance(batches, Tensor) or _is_pair(batches, tuple):
        yield "batches", batches
        return
    try:
        iterator = iter(batches)
    except TypeError:
        raise ConfigError(f"batches is a {type(batches).__name__}. {_GIVE}") from None
    for index, batch in enumerate(iterator):
        yield f"batches[{index}]", batch


def _is_pair(value: Any, kind: type | tuple[type, ...]) -> bool:
    """Whether this is inputs and labels; a DataLoader makes lists of them."""
    return isinstance(value, kind) and len(value) == 2 and all(isinstance(v, Tensor) for v in value)


def _split(where: str, batch: Any) -> tuple[Tensor, Tensor | None]:
    if isinstance(batch, Tensor):
        return batch, None
    if _is_pair(batch, (tuple, list)):
        return batch[0], batch[1]
    raise ConfigError(
        f"{where} is a {type(batch).__name__}, expected a tensor or a pair of tensors. {_GIVE}"
    )


def _check_inputs(where: str, inputs: Tensor, first: Tensor | None) -> None:
    if inputs.ndim < 2 or not inputs.is_floating_point():
        raise ConfigError(
            f"{where}: inputs have shape {tuple(inputs.shape)} and dtype {inputs.dtype}, expected "
            f"(b, ...) and a floating dtype. Add the batch axis, and scale inputs as in training."
        )
    if first is not None and inputs.shape[1:] != first.shape[1:]:
        raise ConfigError(
            f"{where}: inputs have shape {tuple(inputs.shape)}, those of batches[0] have "
            f"{tuple(first.shape)}. Only the first axis may differ."
        )
    bad = inputs.numel() - int(torch.isfinite(inputs).sum())
    if bad:
        raise ConfigError(
            f"{where}: inputs hold {bad} values of {inputs.numel()} that are NaN or infinite. "
            f"Leave these inputs out."
        )


def _check_targets(where: str, targets: Tensor, count: int) -> None:
    if targets.shape[:1] != (count,):
        raise ConfigError(
            f"{where}: targets have shape {tuple(targets.shape)}, expected ({count}, outputs), the "
            f"numbers that the network should put out for each input."
        )


def _check_labels(where: str, labels: Tensor, count: int) -> None:
    kind = labels.dtype
    whole = not (kind.is_floating_point or kind.is_complex or kind == torch.bool)
    if labels.shape != (count,) or not whole:
        raise ConfigError(
            f"{where}: labels have shape {tuple(labels.shape)} and dtype {kind}, expected "
            f"({count},) and whole numbers, one class per input. Put several batches into "
            f"a list."
        )
    if count and int(labels.min()) < 0:
        raise ConfigError(
            f"{where}: labels hold {int(labels.min())}, expected classes from 0. Leave out inputs "
            f"without a class."
        )
