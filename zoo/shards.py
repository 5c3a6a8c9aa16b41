"""Train one shard of a zoo: some families, all of their members side by side."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from metamerge.errors import ZooError
from metamerge.structure import Program
from metamerge.weights import Weights
from zoo import architectures
from zoo.augmentation import Augmentation
from zoo.chunks import Transform
from zoo.families import Drawn, draw_families
from zoo.parts import TaskSplit
from zoo.recipe import ZooOptions, factory_for
from zoo.splits import describe
from zoo.store import SEGMENT
from zoo.training import (
    Trained,
    cross_entropy,
    init_networks,
    predict,
    squared_error,
    train_networks,
)


def train_shard(
    options: ZooOptions,
    split: TaskSplit,
    program: Program,
    place: tuple[str, int],
    families: Sequence[int],
    given: dict[str, Tensor],
    device: torch.device | str,
    progress: Callable[[int], None] | None,
) -> dict[str, Weights]:
    """Draw, train and judge some families.

    Args:
        options: Of the zoo.
        split: Its task.
        program: Its architecture.
        place: Part of the zoo, and members per family.
        families: Numbers of the families in that part.
        given: What the split of the zoo asks for beside rows; see ``zoo.reference``.
        device: Where networks are trained.
        progress: Called with the number of members that are done.

    Returns:
        ``weights``, ``records`` and ``snapshots``, every tensor ``[f, m, ...]`` on the CPU.

    Raises:
        ZooError: If segments cannot be cut, or members diverge.
    """
    members = place[1]
    with split.training():
        drawn = draw_families(options, split, place, families, given)
        trained = _train(options, split, program, drawn, members, device, progress)
        _check_converged(trained.weights, options)
        there = {key: tensor.to(device) for key, tensor in trained.weights.items()}
        scores = _scores(split, program, there, drawn, members)
    records = _records(split, drawn, trained, scores, members)
    stacked = {"weights": trained.weights, "records": records, "snapshots": trained.snapshots}
    whole = {
        kind: {key: t.unflatten(0, (len(families), members)) for key, t in tensors.items()}
        for kind, tensors in stacked.items()
    }
    whole["records"] |= drawn.variants.records(members)
    return whole


def _train(
    options: ZooOptions,
    split: TaskSplit,
    program: Program,
    drawn: Drawn,
    members: int,
    device: torch.device | str,
    progress: Callable[[int], None] | None,
) -> Trained:
    task, network = split.task, factory_for(options, split.task)
    flips = Augmentation.parse(options.augment).flip
    rows = [
        own.repeat(2) if flips and doubled else own  # met twice, mirrored or not by a coin
        for own, doubled in zip(drawn.segments, drawn.augmented.tolist(), strict=True)
    ]
    common = {
        "batch_size": options.batch_size,
        "loss": squared_error if task.regression else cross_entropy,
        "frozen": architectures.frozen(network()),
        "precision": None if options.precision == "float32" else torch.bfloat16,
    }
    inputs, targets = task.inputs.to(device), task.targets.to(device)
    start = init_networks(network, drawn.init_seeds)
    if options.shared_steps:
        start = _trained_together(
            options, program, start, (inputs, targets), drawn, members, common
        )
    return train_networks(
        program,
        start,
        inputs,
        targets,
        rows,
        **drawn.hyper,
        seed=drawn.order_seeds,
        held_back=drawn.held_back,
        patience=options.patience,
        snapshots=options.snapshots,
        transform=_transform(options, drawn, members),
        progress=progress,
        **common,
    )


def _trained_together(
    options: ZooOptions,
    program: Program,
    start: Weights,
    data: tuple[Tensor, Tensor],
    drawn: Drawn,
    members: int,
    common: dict,
) -> Weights:
    """What a family learns before its members part: one network on all rows, as they are."""
    # Frankle, Dziugaite, Roy and Carbin, "Linear Mode Connectivity and the Lottery Ticket
    # Hypothesis", ICML 2020, arXiv:1912.05671; here the learning rate falls in both stretches.
    firsts = range(0, len(drawn.segments), members)
    union = [torch.cat(drawn.segments[i : i + members]) for i in firsts]
    lengths = torch.tensor([len(own) for own in union])
    trained = train_networks(
        program,
        {key: tensor[::members] for key, tensor in start.items()},
        *data,
        union,
        epochs=(options.shared_steps - 0.5) * options.batch_size / lengths,  # rounded up
        lr=drawn.hyper["lr"][::members],
        weight_decay=drawn.hyper["weight_decay"][::members],
        seed=[drawn.order_seeds[i] + 1 for i in firsts],
        transform=_seen_by_families(drawn) if drawn.variants else None,
        **common,
    )
    return {key: t.repeat_interleave(members, 0) for key, t in trained.weights.items()}


def _seen_by_families(drawn: Drawn) -> Transform:
    """Every family's variant of the task, where a family is one network."""
    return lambda inputs, targets, families, _: drawn.variants.seen(inputs, targets, families)


def _transform(options: ZooOptions, drawn: Drawn, members: int) -> Transform | None:
    """What members see of rows: their family's variant of the task, augmented or not."""
    augmentation = Augmentation.parse(options.augment)
    seeds = torch.tensor(drawn.order_seeds)
    if not drawn.augmented.any() and not drawn.variants:
        return None

    def transform(
        inputs: Tensor, targets: Tensor, networks: Tensor, step: int | None
    ) -> tuple[Tensor, Tensor]:
        chosen = drawn.augmented[networks]
        if step is not None and chosen.any():
            there = chosen.to(inputs.device)
            changed = augmentation.apply(inputs[there], seeds[networks[chosen]], step)
            inputs = inputs.index_put((there,), changed)
        return drawn.variants.seen(inputs, targets, networks // members)

    return transform


def _check_converged(weights: Weights, options: ZooOptions) -> None:
    if not all(t.isfinite().all() for t in weights.values() if t.is_floating_point()):
        raise ZooError(f"Some members diverged at lr={options.lr[-1]}. Build with a smaller --lr.")


def _scores(
    split: TaskSplit,
    program: Program,
    weights: Weights,
    drawn: Drawn,
    members: int,
) -> Tensor:
    """Accuracy, or R2 of a regression, of every member on validation images, ``[n]``."""
    device = next(iter(weights.values())).device
    if not drawn.variants:
        inputs, targets = (tensor.to(device) for tensor in split.images("validation"))
        return _score(predict(program, weights, inputs), targets, split.task.regression).cpu()
    scores = []
    for family in range(len(drawn.segments) // members):
        own = {k: t[family * members : (family + 1) * members] for k, t in weights.items()}
        seen = drawn.variants.images(split, "validation", family)
        inputs, targets = (tensor.to(device) for tensor in seen)
        scores.append(_score(predict(program, own, inputs), targets, split.task.regression))
    return torch.cat(scores).cpu()


def _score(outputs: Tensor, targets: Tensor, regression: bool) -> Tensor:
    """Outputs ``[n, b, c]`` and targets ``[b]`` or ``[b, c]`` -> ``[n]``."""
    if not regression:
        return (outputs.argmax(-1) == targets).float().mean(1)
    left = (outputs - targets).square().sum((1, 2))
    return 1 - left / (targets - targets.mean(0)).square().sum()


def _records(
    split: TaskSplit, drawn: Drawn, trained: Trained, scores: Tensor, members: int
) -> Weights:
    """Where every member comes from, ``[n, ...]``."""
    seen = drawn.segments
    if drawn.held_back is not None:
        seen = [torch.cat(pair) for pair in zip(drawn.held_back, seen, strict=True)]
    rows = torch.nn.utils.rnn.pad_sequence(seen, batch_first=True, padding_value=-1)
    regression = split.task.regression
    records = {
        "init_seed": torch.tensor(drawn.init_seeds),
        "order_seed": torch.tensor(drawn.order_seeds),
        "rows": torch.tensor([len(own) for own in seen]),
        "augmented": drawn.augmented,
        "steps": trained.steps,
        "validation_r2" if regression else "validation_accuracy": scores,
        "losses": trained.losses,
        SEGMENT: rows.int(),
        **{name: values.float() for name, values in drawn.hyper.items()},
    }
    if not regression:
        records["rows_per_class"] = describe(seen, split.task.targets, split.task.classes)
    if drawn.held_back is not None:
        records["held_back_losses"] = trained.held_back
    return records
