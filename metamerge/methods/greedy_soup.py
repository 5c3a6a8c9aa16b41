"""Greedy soup: take the best member, add the next best as long as the average does not get worse.

Paper: Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves
accuracy without increasing inference time", ICML 2022, arXiv:2203.05482 (recipe 1). We differ in
two ways: members that are equally good are tried together, so that their order does not matter;
and batch normalisations are judged with statistics measured anew, which ``merge()`` gives them.
"""

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from metamerge.calibration import Batches, check_fit, collect, divergence, predict, targets
from metamerge.corrections.batch_norm import recalibrate
from metamerge.methods._combination import combine
from metamerge.options import check_choice
from metamerge.registry import merge_method
from metamerge.structure import Layout
from metamerge.weights import Weights, stack, widened

_CRITERIA = ("loss", "accuracy")


@merge_method(paper="arXiv:2203.05482")
def greedy_soup(
    weights: Sequence[Weights],
    *,
    layout: Layout,
    batches: Batches,
    criterion: str = "loss",
    report: dict[str, Any] | None = None,
) -> Weights:
    """Average the best members: each next best one is taken unless it makes the average worse.

    Args:
        weights: One state dict per member, of one architecture.
        layout: That architecture; its output is logits.
        batches: Calibration inputs with labels.
        criterion: ``loss`` for the mean cross entropy; ``accuracy`` for the share of errors, as in
            the paper, where of equally many errors the lower loss comes first.
        report: Takes ``criterion``, the members that were ``taken``, best first, what each member
            scores alone in ``members``, and the ``soup``; all of these the lower the better.

    Returns:
        New state dict with the members' names, shapes and dtypes.

    Raises:
        ConfigError: If ``criterion`` is unknown, or the batches have no labels or do not fit the
            network.
    """
    check_choice("greedy_soup", "criterion", criterion, _CRITERIA)
    if len(weights) == 1:
        return combine(weights, [1.0])
    inputs, labels = collect(batches, labelled=True)
    check_fit(layout.program, inputs)
    score = partial(_scores, layout=layout, inputs=inputs, labels=labels, criterion=criterion)
    alone = score(weights)
    ranked = sorted(range(len(weights)), key=alone.__getitem__)
    equals = [list(group) for _, group in groupby(ranked, key=alone.__getitem__)]
    taken: list[int] = []
    best = None
    for group in equals:
        mean = _mean(weights, taken + group)
        (found,) = score([mean])
        if best is None or found[0] <= best[0]:
            taken, best, soup = taken + group, found, mean
    if report is not None:
        report.update(criterion=criterion, taken=taken, soup=best[0])
        report["members"] = [own[0] for own in alone]
    return soup


def _mean(weights: Sequence[Weights], taken: list[int]) -> Weights:
    """Mean of some members; dtypes and counters are those of all."""
    return combine(weights, [(i in taken) / len(taken) for i in range(len(weights))])


def _scores(
    weights: Sequence[Weights], layout: Layout, inputs: Tensor, labels: Tensor, criterion: str
) -> list[tuple[float, ...]]:
    """What every model is ranked by, the lower the better; overflow comes last."""
    stacked = {key: t.detach() for key, t in stack(widened(weights)).items()}
    logits = predict(recalibrate(stacked, layout.program, inputs), layout, inputs)  # [m, b, c]
    loss = divergence(logits, targets(logits, labels)).nan_to_num(nan=torch.inf)
    if criterion == "loss":
        return [(value,) for value in loss.tolist()]
    errors = (logits.argmax(-1) != labels).float().mean(1)
    return list(zip(errors.tolist(), loss.tolist(), strict=True))
