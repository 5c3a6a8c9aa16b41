"""Controls: what else one could do with the same members and the same images.

A merge is worth something only beside these. All families are handled at once, each control may use
all objective images (those that a merger was trained on and those it was validated on), and the
learning rate of every trained control is chosen on the validation part before it is trained again
on all of them. Test images choose nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from evaluation.metrics import accuracy, family_logits
from metamerge.alignment import weight_matching
from metamerge.ensembles import majority_vote
from metamerge.structure import Layout
from metamerge.weights import Weights
from zoo.architectures import frozen
from zoo.training import Loss, cross_entropy, distillation, init_networks, predict, train_networks

RATES = (1e-3, 3e-3, 1e-2)
MANY = 2000  # images from which on controls take larger batches
SCRATCH_EPOCHS = 60
TUNE_EPOCHS = 30

Images = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Budget:
    """The images that controls may use.

    Attributes:
        objective: Inputs and targets that a merger is trained on.
        validation: Inputs and targets that it is validated on.
        frozen: Keys of float tensors that no control trains; see ``zoo.architectures.frozen``.
    """

    objective: Images
    validation: Images
    frozen: tuple[str, ...] = ()

    @property
    def everything(self) -> Images:
        """Both parts, objective first."""
        pairs = zip(self.objective, self.validation, strict=True)
        inputs, targets = (torch.cat(pair) for pair in pairs)
        return inputs, targets

    def rows(self, part: str) -> Tensor:
        """Rows of ``everything`` that belong to ``objective``, ``validation`` or ``everything``."""
        first, second = len(self.objective[1]), len(self.validation[1])
        ends = {
            "objective": (0, first),
            "validation": (first, first + second),
            "everything": (0, first + second),
        }
        return torch.arange(*ends[part])


def best_members(families: Weights, layout: Layout, budget: Budget) -> Weights:
    """The member of each family that scores best on all objective images.

    Args:
        families: ``[f, m, ...]``.
        layout: Weight graph of the architecture.
        budget: The images.

    Returns:
        ``[f, ...]``.
    """
    inputs, targets = budget.everything
    scores = accuracy(family_logits(layout.program, families, inputs), targets)  # [f, m]
    chosen = scores.argmax(1)
    return {key: t[torch.arange(len(chosen)), chosen] for key, t in families.items()}


def aligned_average(families: Weights, layout: Layout) -> Weights:
    """Mean of the aligned members, ``[f, m, ...]`` -> ``[f, ...]``."""
    aligned = layout.spec.permute(families, weight_matching(families, layout.spec))
    return {k: t.mean(1) if t.is_floating_point() else t[:, 0] for k, t in aligned.items()}


def fine_tuned(start: Weights, layout: Layout, budget: Budget) -> tuple[Weights, float]:
    """Train given networks further on the labelled objective images.

    Args:
        start: ``[f, ...]``.
        layout: Weight graph of the architecture.
        budget: The images.

    Returns:
        ``[f, ...]``, and the learning rate that was chosen.
    """
    return _trained(start, layout, budget, budget.everything[1], cross_entropy, TUNE_EPOCHS)


def from_scratch(
    factory: Callable[[], nn.Module], seeds: Sequence[int], layout: Layout, budget: Budget
) -> tuple[Weights, float]:
    """Train fresh networks on the labelled objective images.

    Args:
        factory: Builds a freshly initialised network.
        seeds: One init seed per network.
        layout: Weight graph of the architecture.
        budget: The images.

    Returns:
        ``[f, ...]``, and the learning rate that was chosen.
    """
    start = init_networks(factory, seeds)
    return _trained(start, layout, budget, budget.everything[1], cross_entropy, SCRATCH_EPOCHS)


def distilled(
    start: Weights, families: Weights, layout: Layout, budget: Budget
) -> tuple[Weights, float]:
    """Train given networks to imitate their family's soft vote on the objective images, unlabelled.

    Args:
        start: ``[f, ...]``.
        families: Their members, ``[f, m, ...]``.
        layout: Weight graph of the architecture.
        budget: The images; labels serve only to choose the learning rate.

    Returns:
        ``[f, ...]``, and the learning rate that was chosen.
    """
    teacher = family_logits(layout.program, families, budget.everything[0]).softmax(-1).mean(1)
    return _trained(start, layout, budget, teacher, distillation, TUNE_EPOCHS)


def on_union(
    factory: Callable[[], nn.Module],
    seeds: Sequence[int],
    layout: Layout,
    images: Images,
    rows: Sequence[Tensor],
    *,
    epochs: float,
    batch_size: int,
    lr: float,
) -> Weights:
    """Train one fresh network per family on all images of its segments: the ceiling.

    Args:
        factory: Builds a freshly initialised network.
        seeds: One init seed per family.
        layout: Weight graph of the architecture.
        images: Inputs and targets of the whole task.
        rows: Rows of each family's segments, without repeats.
        epochs: Passes, as the members made.
        batch_size: As the members had.
        lr: As the members had.

    Returns:
        ``[f, ...]``.
    """
    start = init_networks(factory, seeds)
    return train_networks(
        layout.program,
        start,
        *images,
        rows,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        frozen=frozen(factory()),
    ).weights


def votes(families: Weights, layout: Layout, inputs: Tensor) -> dict[str, Tensor]:
    """Classes that the ensembles choose; they run all members, so they merge nothing.

    Args:
        families: ``[f, m, ...]``.
        layout: Weight graph of the architecture.
        inputs: ``[b, ...]``.

    Returns:
        ``soft_vote`` and ``majority_vote``, each ``[f, b]``.
    """
    logits = family_logits(layout.program, families, inputs)  # [f, m, b, c]
    return {
        "soft_vote": logits.softmax(-1).mean(1).argmax(-1),
        "majority_vote": torch.stack([majority_vote(own) for own in logits]),
    }


def _trained(
    start: Weights, layout: Layout, budget: Budget, targets: Tensor, loss: Loss, epochs: float
) -> tuple[Weights, float]:
    """Choose the learning rate on the validation part, then train on everything."""
    inputs, _ = budget.everything
    count = len(next(iter(start.values())))

    def train(part: str, lr: float) -> Weights:
        rows = [budget.rows(part)] * count
        return train_networks(
            layout.program,
            start,
            inputs,
            targets,
            rows,
            epochs=epochs,
            batch_size=32 if len(inputs) < MANY else 128,
            lr=lr,
            loss=loss,
            frozen=budget.frozen,
        ).weights

    def score(lr: float) -> float:
        logits = predict(layout.program, train("objective", lr), budget.validation[0])
        return float(accuracy(logits, budget.validation[1]).mean())

    chosen = max(RATES, key=score)
    return train("everything", chosen), chosen
