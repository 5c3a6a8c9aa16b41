"""Adapting: what a merger makes of a few labelled inputs beside its members' weights.

Fused networks are fine-tuned on the labelled inputs while probes hold them near their members'
consensus, as in learning without forgetting (Li and Hoiem, "Learning without Forgetting",
arXiv:1606.09282). What comes out of it is taken, or the point half way to it, which is often better
(Wortsman et al., "Robust Fine-Tuning of Zero-Shot Models", CVPR 2022, arXiv:2109.01903).
From where, how fast, how far, and whether at all, is chosen by the loss under cross-validation on
the same inputs, all settings and folds being trained side by side; the chosen one is then trained
on all of them.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metamerge.calibration import check_fit, check_logits, divergence, predict
from metamerge.mergers.gate import answers_of, consensus
from metamerge.mergers.ordering import in_canonical_order
from metamerge.mergers.refining import descend, fuse_on, refine, start_of
from metamerge.mergers.watching import watched_inputs
from metamerge.structure import Layout, run
from metamerge.weights import Weights

RATES = (1e-3, 3e-3)
WAYS = (0.5, 1.0)  # how far to go from the start to what fine-tuning makes of it
FOLDS = 4
MANY = 1000  # inputs from which on one fold is enough to choose by
PASSES = 32  # over the inputs: six left half a point and more of 5,000 labels unused
STEPS = (100, 1000)  # at least and at most: hundreds of passes over few inputs do harm
HELD = 500  # inputs from which on the anchor counts for less
BATCH = 128


class Setting(NamedTuple):
    """One way to adapt: from which start, at which rate, how far; to stay is the rate 0."""

    start: str
    lr: float
    way: float

    def __str__(self) -> str:
        """Such as ``calibrated, lr 0.001, 50% of the way``."""
        told = f"{self.start}, lr {self.lr:g}"
        return told if self.way in (0, 1) else f"{told}, {self.way:.0%} of the way"


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
        report: Takes ``start``, ``lr``, ``way``, and loss and accuracy of all settings under
            cross-validation.

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
    given, anchor = (inputs, labels), (probes, wanted)
    folds = _folds(labels, generator).to(labels.device)  # [b]
    count = int(folds.max()) + 1 if len(labels) < MANY else 1
    seen = folds != torch.arange(count, device=labels.device)[:, None]  # [count, b]
    pairs = [(start, lr) for start in starts for lr in RATES]
    first = {k: torch.cat([starts[s][k] for s, _ in pairs for _ in range(count)]) for k in members}
    rates = torch.tensor([lr for _, lr in pairs]).repeat_interleave(count)
    everywhere = seen.repeat(len(pairs), 1)
    trained = _tune(first, layout, given, anchor, everywhere, rates, generator)
    found = {
        Setting(name, 0.0, 0.0): _judged(_copies(start, count), layout, given, seen, count)[0]
        for name, start in starts.items()
    }
    for way in WAYS:
        scores = _judged(_between(first, trained, way), layout, given, everywhere, count)
        found |= {Setting(*pair, way): own for pair, own in zip(pairs, scores, strict=True)}
    best = min(found, key=lambda setting: float(found[setting][0].nan_to_num(nan=torch.inf)))
    if report is not None:
        report.update(_told(found, best, len(labels), count))
    start = starts[best.start]
    if best.lr:
        everything, rate = torch.ones_like(seen[:1]), torch.tensor([best.lr])
        tuned = _tune(start, layout, given, anchor, everything, rate, generator)
        start = _between(start, tuned, best.way)
    return layout.spec.unpermute(start, perm)


def _judged(
    weights: Weights,
    layout: Layout,
    labelled: tuple[Tensor, Tensor],
    seen: Tensor,
    count: int,
) -> Tensor:
    """Loss and accuracy on what ``count`` folds of each setting left out, ``[settings, 2]``."""
    inputs, labels = labelled
    logits = predict(weights, layout, inputs)  # [n, b, c]
    losses = F.cross_entropy(logits.movedim(-1, 1), labels.expand(len(seen), -1), reduction="none")
    right = (logits.argmax(-1) == labels).to(losses)
    left = (~seen).unflatten(0, (-1, count))  # [settings, count, b]
    scores = torch.stack([losses, right]).unflatten(1, left.shape[:2])
    return ((scores * left).sum((2, 3)) / left.sum((1, 2))).mT


def _between(start: Weights, end: Weights, way: float) -> Weights:
    """The network some way from one to another."""
    if way == 1:
        return end
    return {k: t.lerp(end[k], way) if t.is_floating_point() else end[k] for k, t in start.items()}


def _copies(weights: Weights, count: int) -> Weights:
    return {key: tensor.expand(count, *tensor.shape[1:]) for key, tensor in weights.items()}


def _starts(
    merger: nn.Module, members: Weights, layout: Layout, inputs: Tensor
) -> tuple[dict[str, Weights], Tensor, Tensor]:
    """Networks to start from, the inputs that hold them, and whom to trust there."""
    (watched,) = watched_inputs(merger, members, layout)
    starts = {"weights only": fuse_on(merger, members, layout, watched).weights}
    fused, trust = merger(members, layout, inputs)
    answers = answers_of(members, layout, inputs)
    start, _ = start_of(merger, fused, members, answers, trust)
    told = {"steps": merger.config.refine, "answers": answers}
    starts["calibrated"] = refine(start, members, layout, inputs, trust, **told)
    return starts, torch.cat([watched.inputs, inputs]), trust


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

    steps = min(max(PASSES * len(inputs) // BATCH, STEPS[0]), STEPS[1])
    return descend(weights, layout, loss, steps=steps, lr=rates)


def _told(found: Mapping[Setting, Tensor], best: Setting, count: int, folds: int) -> dict[str, Any]:
    return {
        **best._asdict(),
        "chosen_on": f"{folds}-fold cross-validation on the {count} labelled inputs"
        if folds > 1
        else f"a quarter of the {count} labelled inputs",
        "losses": {str(setting): round(float(own[0]), 4) for setting, own in found.items()},
        "accuracies": {str(setting): round(float(own[1]), 4) for setting, own in found.items()},
    }
