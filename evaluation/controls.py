"""Controls: what else one could do with the same members and the same images.

A merge is worth something only beside these. All families are handled at once, each control may use
all objective images (those that a merger was trained on and those it was validated on), and the
learning rate of every trained control is chosen on the validation part before it is trained again
on all of them. Test images choose nothing.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from evaluation.budgets import Budget, Images
from evaluation.gates import noise
from evaluation.metrics import accuracy, family_logits
from metamerge.alignment import weight_matching
from metamerge.checkpoints import Checkpoint
from metamerge.corrections.batch_norm import recalibrate
from metamerge.ensembles import ensemble, majority_vote
from metamerge.ensembles.fitting import descend
from metamerge.errors import StructureError
from metamerge.structure import OUTPUTS, Layout
from metamerge.weights import Weights, unstack
from zoo.architectures import frozen
from zoo.training import Loss, cross_entropy, distillation, init_networks, predict, train_networks

RATES = (1e-3, 3e-3, 1e-2)
RIDGES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)  # of biases, falling
EM_STEPS = 200
MANY = 2000  # images from which on controls take larger batches
SCRATCH_EPOCHS = 60
TUNE_EPOCHS = 30
AT_ONCE = 1000  # images that an ensemble is asked about at a time


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


def bias_corrected(families: Weights, layout: Layout, budget: Budget) -> tuple[Weights, float]:
    """The member of each family that scores best once its output bias is fitted to the labels.

    Paper: Jordan, Sedghi, Saukh, Entezari, Neyshabur, "REPAIR", ICLR 2023, arXiv:2211.08403, merge
    networks of skewed class splits; what such a merge gains may be no more than a better prior, and
    a prior is what the output bias can mend in a single member. All members are corrected, ``c``
    numbers each; the ridge is chosen on the validation part.

    Args:
        families: ``[f, m, ...]``.
        layout: Weight graph of the architecture.
        budget: The images.

    Returns:
        ``[f, ...]``, and the ridge that was chosen.
    """
    inputs, targets = budget.everything
    logits = family_logits(layout.program, families, inputs).double()  # [f, m, b, c]
    flat, none = logits.flatten(0, 1), logits.new_zeros(logits.shape[-1])

    def fitted(part: str, ridge: float) -> Tensor:
        seen = torch.zeros(flat.shape[:2]).to(flat)
        seen[:, budget.rows(part)] = 1
        start = none.expand(len(flat), -1)
        return descend(lambda b: flat + b[:, None], start, none, targets, seen, ridge)

    def score(ridge: float) -> float:
        rows = budget.rows("validation")
        found = flat[:, rows] + fitted("objective", ridge)[:, None]
        return float(accuracy(found, targets[rows]).mean())

    chosen = max(RIDGES, key=score)
    shifts = fitted("everything", chosen).unflatten(0, logits.shape[:2])  # [f, m, c]
    return best_members(shifted(families, layout, shifts), layout, budget), chosen


def prior_corrected(
    start: Weights, layout: Layout, budget: Budget, shares: Tensor
) -> tuple[Weights, Tensor]:
    """Networks whose output bias is moved to the class shares of the objective images, unlabelled.

    Paper: Saerens, Latinne, Decaestecker, "Adjusting the Outputs of a Classifier to New a Priori
    Probabilities: A Simple Procedure", Neural Computation 14(1), 2002, equations 2.8 and 2.9: the
    new shares are found by expectation maximisation.

    Args:
        start: ``[f, ...]``.
        layout: Weight graph of the architecture.
        budget: The images; labels are not used.
        shares: Share of every class in what each network was trained on, ``[f, c]``, above 0.

    Returns:
        ``[f, ...]``, and the shares that were found, ``[f, c]``.
    """
    own = predict(layout.program, start, budget.everything[0]).double().log_softmax(-1)  # [f, b, c]
    known = shares.double().log()[:, None]  # [f, 1, c]
    found = known
    for _ in range(EM_STEPS):
        posterior = (own + found - known).softmax(-1)
        found = posterior.mean(1, keepdim=True).clamp_min(1e-12).log()
    return shifted(start, layout, (found - known)[:, 0]), found[:, 0].exp()


def shifted(weights: Weights, layout: Layout, shifts: Tensor) -> Weights:
    """Networks with numbers added to their output bias.

    Args:
        weights: ``[..., f]`` networks, every tensor with the same leading axes.
        layout: Weight graph of the architecture.
        shifts: What is added, ``[..., c]``.

    Returns:
        New weights.

    Raises:
        StructureError: If there is not one output layer with a bias.
    """
    layers = layout.producers(OUTPUTS)
    if len(layers) != 1 or layers[0].bias is None:
        raise StructureError(
            f"bias correction: the network has {len(layers)} output layers, expected one, with a "
            "bias. Leave this control out."
        )
    bias = layers[0].bias
    return {**weights, bias: weights[bias] + shifts.to(weights[bias])}


def recalibrated(families: Weights, layout: Layout, inputs: Tensor) -> Weights:
    """Members whose running statistics are measured anew, as those of merged networks are.

    Args:
        families: ``[f, m, ...]``.
        layout: Weight graph of the architecture.
        inputs: ``[b, ...]``.

    Returns:
        ``[f, m, ...]``; members without batch normalisation are the same.
    """
    measured = [
        recalibrate({key: t[f] for key, t in families.items()}, layout.program, inputs)
        for f in range(len(next(iter(families.values()))))
    ]
    return {key: torch.stack([own[key] for own in measured]) for key in families}


def garbage_members(families: Weights, *, seed: int = 0) -> Weights:
    """Random members with the mean and spread of the real ones' tensors.

    They know nothing. What a merger makes of them and the images it is given is its own.

    Args:
        families: ``[f, m, ...]``.
        seed: Seed of the noise.

    Returns:
        ``[f, m, ...]``; integer tensors are those of the families.
    """
    return noise(families, torch.Generator().manual_seed(seed))


def aligned_average(families: Weights, layout: Layout) -> Weights:
    """Mean of the aligned members, ``[f, m, ...]`` -> ``[f, ...]``."""
    aligned = layout.spec.permute(families, weight_matching(families, layout.spec))
    return {k: t.mean(1) if t.is_floating_point() else t[:, 0] for k, t in aligned.items()}


def fine_tuned(
    start: Weights, layout: Layout, budget: Budget, *, seed: int = 0
) -> tuple[Weights, float]:
    """Train given networks further on the labelled objective images.

    Args:
        start: ``[f, ...]``.
        layout: Weight graph of the architecture.
        budget: The images.
        seed: Seed of the order of images.

    Returns:
        ``[f, ...]``, and the learning rate that was chosen.
    """
    told = (budget.everything[1], cross_entropy, TUNE_EPOCHS)
    return _trained(start, layout, budget, *told, seed)


def from_scratch(
    factory: Callable[[], nn.Module],
    seeds: Sequence[int],
    layout: Layout,
    budget: Budget,
    *,
    seed: int = 0,
) -> tuple[Weights, float]:
    """Train fresh networks on the labelled objective images.

    Args:
        factory: Builds a freshly initialised network.
        seeds: One init seed per network.
        layout: Weight graph of the architecture.
        budget: The images.
        seed: Seed of the order of images.

    Returns:
        ``[f, ...]``, and the learning rate that was chosen.
    """
    start = init_networks(factory, seeds)
    told = (budget.everything[1], cross_entropy, SCRATCH_EPOCHS)
    return _trained(start, layout, budget, *told, seed)


def distilled(
    start: Weights, families: Weights, layout: Layout, budget: Budget, *, seed: int = 0
) -> tuple[Weights, float]:
    """Train given networks to imitate their family's soft vote on the objective images, unlabelled.

    Args:
        start: ``[f, ...]``.
        families: Their members, ``[f, m, ...]``.
        layout: Weight graph of the architecture.
        budget: The images; labels serve only to choose the learning rate.
        seed: Seed of the order of images.

    Returns:
        ``[f, ...]``, and the learning rate that was chosen.
    """
    teacher = family_logits(layout.program, families, budget.everything[0]).softmax(-1).mean(1)
    return _trained(start, layout, budget, teacher, distillation, TUNE_EPOCHS, seed)


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
    seed: int = 0,
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
        seed: Seed of the order of images.

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
        seed=seed,
        frozen=frozen(factory()),
    ).weights


def soft_vote(logits: Tensor) -> Tensor:
    """Classes that the mean of the members' probabilities chooses, ``[f, m, b, c] -> [f, b]``."""
    return logits.softmax(-1).mean(1).argmax(-1)


def majority(logits: Tensor) -> Tensor:
    """Classes that most of the members choose, ``[f, m, b, c] -> [f, b]``."""
    return torch.stack([majority_vote(own) for own in logits])


def ensembles(
    families: Weights, layout: Layout, budget: Budget, inputs: Tensor, *, kind: str, seed: int = 0
) -> Tensor:
    """What ensembles of one kind say, which are fitted to the labelled objective images if at all.

    Args:
        families: ``[f, m, ...]``.
        layout: Weight graph of the architecture.
        budget: The images that they may be fitted to.
        inputs: The images that they are asked about, ``[b, ...]``.
        kind: One of ``metamerge.ensembles.list_ensembles()``, for classifiers.
        seed: Seed of the first family's ensemble; each of the others has the next one.

    Returns:
        Logarithms of probabilities, ``[f, b, c]``.
    """
    program, said = layout.program.to_json(), []
    for index, family in enumerate(unstack(families)):
        sources = [Checkpoint(f"member {m}", w, program) for m, w in enumerate(unstack(family))]
        made = ensemble(sources, kind=kind, batches=budget.everything, seed=seed + index)
        with torch.no_grad():
            said.append(torch.cat([made(some) for some in inputs.split(AT_ONCE)]))
    return torch.stack(said)


def _trained(
    start: Weights,
    layout: Layout,
    budget: Budget,
    targets: Tensor,
    loss: Loss,
    epochs: float,
    seed: int,
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
            seed=seed,
            loss=loss,
            frozen=budget.frozen,
        ).weights

    def score(lr: float) -> float:
        logits = predict(layout.program, train("objective", lr), budget.validation[0])
        return float(accuracy(logits, budget.validation[1]).mean())

    chosen = max(RATES, key=score)
    return train("everything", chosen), chosen
