"""Adapting: what a merger makes of a few labelled inputs beside its members' weights.

Fused networks are fine-tuned on the labelled inputs while probes hold them near their members'
consensus, as in learning without forgetting (Li and Hoiem, "Learning without Forgetting",
arXiv:1606.09282). From where, how fast, and whether at all, is chosen by cross-validation on the
same inputs, all settings and folds being trained side by side; the chosen one is then trained on
all of them.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metamerge.calibration import check_fit, check_logits, divergence, predict
from metamerge.mergers.gate import consensus
from metamerge.mergers.ordering import in_canonical_order
from metamerge.mergers.refining import answers_of, descend, refine
from metamerge.structure import Layout, run
from metamerge.weights import Weights

RATES = (0.0, 1e-3, 3e-3)  # 0: stay
FOLDS = 4
MANY = 1000  # inputs from which on one fold is enough to choose by
STEPS = (100, 300)  # at least and at most: six passes over the inputs
HELD = 500  # inputs from which on the anchor counts for less
BATCH = 128


class Setting(NamedTuple):
    """One way to adapt: from which start, at which rate."""

    start: str
    lr: float


def adapt(
    merger: nn.Module,
    members: Weights,
    layout: Layout,
    inputs: Tensor,
    labels: Tensor,
    *,
    generator: torch.Generator | None = None,
    report: dict[str, Any] | None = None,
) -> Weights:
    """Merge one family with the help of labelled inputs.

    Args:
        merger: A trained merger.
        members: Aligned members of one family, ``[1, m, ...]``.
        layout: Their architecture.
        inputs: ``[b, ...]``.
        labels: Their classes, ``[b]``.
        generator: Source of randomness: folds, and order of inputs.
        report: Takes ``start``, ``lr`` and the accuracy of all settings under cross-validation.

    Returns:
        Fused weights, ``[1, ...]``.

    Raises:
        ConfigError: If inputs or labels are not those of this architecture.
    """
    check_fit(layout.program, inputs)
    generator = generator or torch.Generator().manual_seed(0)
    members, perm = in_canonical_order(members, layout)
    starts, probes, trust = _starts(merger, members, layout, inputs)
    answers = answers_of(members, layout, probes)
    check_logits(answers[0], labels)
    wanted = consensus(trust, answers).softmax(-1)[0]  # [p, c]
    anchor = (probes, wanted)
    folds = _folds(labels, generator).to(labels.device)  # [b]
    count = int(folds.max()) + 1 if len(labels) < MANY else 1
    settings = [Setting(start, lr) for start in starts for lr in RATES]
    first = {
        k: torch.cat([starts[s.start][k] for s in settings for _ in range(count)]) for k in members
    }
    own = torch.arange(count, device=labels.device).repeat(len(settings))
    seen = folds != own[:, None]  # [n, b]
    rates = torch.tensor([s.lr for s in settings]).repeat_interleave(count)
    trained = _tune(first, layout, (inputs, labels), anchor, seen, rates, generator)
    logits = predict(trained, layout, inputs)  # [n, b, c]
    right = (logits.argmax(-1) == labels) & ~seen
    losses = (
        F.cross_entropy(logits.movedim(-1, 1), labels.expand(len(seen), -1), reduction="none")
        * ~seen
    )
    tested = (~seen).unflatten(0, (-1, count)).sum((1, 2))
    accuracy = right.unflatten(0, (-1, count)).sum((1, 2)) / tested
    loss = losses.unflatten(0, (-1, count)).sum((1, 2)) / tested
    best = max(range(len(settings)), key=lambda i: (float(accuracy[i]), -float(loss[i])))
    if report is not None:
        report.update(_told(settings, accuracy, best, len(labels), count))
    everything = torch.ones_like(seen[:1])
    start = starts[settings[best].start]
    rate = torch.tensor([settings[best].lr])
    done = _tune(start, layout, (inputs, labels), anchor, everything, rate, generator)
    return layout.spec.unpermute(done, perm)


def _starts(
    merger: nn.Module, members: Weights, layout: Layout, inputs: Tensor
) -> tuple[dict[str, Weights], Tensor, Tensor]:
    """Networks to start from, the inputs that hold them, and whom to trust there."""
    steps, fill = merger.config.refine, merger.config.mixtures
    probes = merger.probes.for_members(members, layout)
    starts = {}
    for name, watched in (("weights only", probes), ("calibrated", inputs)):
        fused, trust = merger(members, layout, watched)
        starts[name] = refine(fused, members, layout, watched, trust, steps=steps, fill=fill)
    return starts, torch.cat([probes, inputs]), trust


def _folds(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Fold of every input, dealt out class by class, ``[b]``."""
    shuffled = torch.randperm(len(labels), generator=generator)
    order = shuffled[labels.cpu()[shuffled].argsort(stable=True)]
    folds = torch.empty(len(labels), dtype=torch.long)
    folds[order] = torch.arange(len(labels)) % min(FOLDS, len(labels))
    return folds


def _tune(
    weights: Weights,
    layout: Layout,
    labelled: tuple[Tensor, Tensor],
    anchor: tuple[Tensor, Tensor],
    seen: Tensor,
    rates: Tensor,
    generator: torch.Generator,
) -> Weights:
    """Fine-tune networks, each on the inputs that it may see, ``[n, b]``, held by the anchor."""
    (inputs, labels), (probes, wanted) = labelled, anchor
    hold = min(1.0, HELD / len(inputs))
    moving = rates > 0
    if not moving.any():
        return weights
    seen = seen[moving.to(seen.device)]

    def loss(now: Weights) -> Tensor:
        rows = torch.randperm(len(inputs), generator=generator)[:BATCH].to(inputs.device)
        held = torch.randperm(len(probes), generator=generator)[:BATCH].to(inputs.device)
        both = torch.cat([inputs[rows], probes[held]])
        logits = run(layout.program, now, [both], stacked=True)
        told, kept = logits.split([len(rows), len(held)], 1)
        own = seen[:, rows].to(logits.dtype)
        wrong = F.cross_entropy(
            told.movedim(-1, 1), labels[rows].expand(len(told), -1), reduction="none"
        )
        known = (wrong * own).sum(1) / own.sum(1).clamp_min(1)
        return known + hold * divergence(kept, wanted[held])

    moved = {key: tensor[moving.to(tensor.device)] for key, tensor in weights.items()}
    steps = min(max(6 * len(inputs) // BATCH, STEPS[0]), STEPS[1])
    moved = descend(moved, layout, loss, steps=steps, lr=rates[moving])
    done = {key: tensor.clone() for key, tensor in weights.items()}
    for key, tensor in done.items():
        tensor[moving.to(tensor.device)] = moved[key]
    return done


def _told(
    settings: list[Setting], accuracy: Tensor, best: int, count: int, folds: int
) -> dict[str, Any]:
    return {
        "start": settings[best].start,
        "lr": settings[best].lr,
        "chosen_on": f"{folds}-fold cross-validation on the {count} labelled inputs"
        if folds > 1
        else f"a quarter of the {count} labelled inputs",
        "accuracies": {
            f"{s.start}, lr {s.lr:g}": round(float(a), 4)
            for s, a in zip(settings, accuracy, strict=True)
        },
    }
