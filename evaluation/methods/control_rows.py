"""Rows of what a merge has to be held against: members, ensembles, and plain training."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from evaluation import controls
from evaluation.competitors import SCRATCH_SEED
from evaluation.methods.rows import Call, Make, row_of, scored
from evaluation.methods.settings import Draw, Setting
from evaluation.metrics import accuracy, family_logits
from metamerge.alignment import weight_matching
from metamerge.corrections.refit import refit
from metamerge.ensembles import get_ensemble, list_ensembles
from metamerge.structure import OUTPUTS
from metamerge.weights import Weights

GARBAGE = "one garbage member more"
PRIOR = "best member, prior fitted"


def control_calls(setting: Setting) -> Iterator[Call]:
    """Everything that a merge has to be held against.

    Args:
        setting: The setting.

    Yields:
        One call per row.
    """
    for start, draws in setting.starts.items():
        once = draws[:1] if setting.one_family else draws
        about = {"start": start, "method": "members, mean", "data": "none", "control": True}
        yield Call(about, partial(_member_row, setting, once))
        for kind in map(get_ensemble, list_ensembles()):
            if kind.numbers:
                continue
            about = {"start": start, "method": f"{kind.name.replace('_', '-')} ensemble"}
            about |= {"data": "labelled" if kind.fitted else "none", "control": True}
            some = draws if kind.fitted else once
            yield Call(about, partial(_ensemble_row, setting, some, kind.name))
        about = {"start": start, "method": f"soft-vote ensemble, {GARBAGE}"}
        about |= {"data": "none", "control": True}
        yield Call(about, partial(_ensemble_row, setting, [*map(_spoiled, draws)], "soft_vote"))
        for name, data, control, make in _controls(setting):
            if start == "common" and name in _FRESH:
                continue  # they do not start from members, so they are those of the other start
            if data == "segments" and draws[0].segments is None:
                continue
            if name == PRIOR and draws[0].shares is None:
                continue
            about = {"start": start, "method": name, "data": data, "control": control}
            yield Call(about, partial(scored, setting, draws, make))


_FRESH = ("trained from scratch", "trained on all segments (ceiling)")


def _controls(setting: Setting) -> Iterator[tuple[str, str, bool, Make]]:
    """Name, data, whether it merges nothing, and what makes it."""
    layout = setting.layout

    def best(draw: Draw) -> Weights:
        return controls.best_members(draw.families, layout, draw.budget)

    def corrected(draw: Draw) -> Weights:
        return controls.bias_corrected(draw.families, layout, draw.budget)[0]

    def fitted(draw: Draw) -> Weights:
        flat = {key: t.flatten(0, 1) for key, t in draw.families.items()}
        shares = draw.shares.flatten(0, 1)
        found, _ = controls.prior_corrected(flat, layout, draw.budget, shares)
        sizes = draw.shares.shape[:2]
        members = {key: t.unflatten(0, sizes) for key, t in found.items()}
        return controls.best_members(members, layout, draw.budget)

    def average(draw: Draw) -> Weights:
        return controls.aligned_average(draw.families, layout)

    def tuned(start: Make, draw: Draw) -> Weights:
        return controls.fine_tuned(start(draw), layout, draw.budget)[0]

    def distilled(start: Make, draw: Draw) -> Weights:
        return controls.distilled(start(draw), draw.families, layout, draw.budget)[0]

    def scratch(draw: Draw) -> Weights:
        return controls.from_scratch(setting.network, _seeds(draw), layout, draw.budget)[0]

    yield "best member", "labelled", True, best
    if all(layer.bias for layer in layout.producers(OUTPUTS)):
        yield "best member, bias fitted", "labelled", True, corrected
        yield PRIOR, "labelled", True, fitted
    yield f"aligned average, {GARBAGE}", "none", True, lambda draw: average(_spoiled(draw))
    yield "distilled from best member", "unlabelled", True, partial(distilled, best)
    yield "distilled from aligned average", "unlabelled", True, partial(distilled, average)
    yield "best member, fine-tuned", "labelled", True, partial(tuned, best)
    yield "aligned average, fine-tuned", "labelled", True, partial(tuned, average)
    refitted = partial(_refitted, setting)
    yield "refit, fine-tuned", "labelled", False, partial(tuned, refitted)
    yield "trained from scratch", "labelled", True, scratch
    yield "trained on all segments (ceiling)", "segments", True, partial(_ceiling, setting)


def _spoiled(draw: Draw) -> Draw:
    """Families with one more member, which knows nothing."""
    garbage = controls.garbage_members(draw.families, seed=draw.seed)
    joined = {key: torch.cat([t, garbage[key][:, :1]], 1) for key, t in draw.families.items()}
    return replace(draw, families=joined)


def _refitted(setting: Setting, draw: Draw) -> Weights:
    layout, inputs = setting.layout, draw.budget.everything[0]
    aligned = layout.spec.permute(draw.families, weight_matching(draw.families, layout.spec))
    fused = {key: tensor.mean(1) for key, tensor in aligned.items()}
    with torch.no_grad():
        return refit(fused, aligned, layout, inputs)


def _ceiling(setting: Setting, draw: Draw) -> Weights:
    return controls.on_union(
        setting.network,
        _seeds(draw),
        setting.layout,
        setting.images,
        draw.segments,
        **setting.recipe,
    )


def _seeds(draw: Draw) -> list[int]:
    """Seeds of inits that no member has."""
    return [SCRATCH_SEED + draw.seed + f for f in range(len(draw.members))]


def _member_row(setting: Setting, draws: Sequence[Draw]) -> dict[str, Any]:
    """Members as they are."""
    (inputs, targets), clock = setting.test, time.perf_counter()
    logits = [family_logits(setting.layout.program, draw.families, inputs) for draw in draws]
    scores = accuracy(torch.cat(logits), targets).mean(1)
    return row_of(setting, scores, (time.perf_counter() - clock) / len(scores), 1)


def _ensemble_row(setting: Setting, draws: Sequence[Draw], kind: str) -> dict[str, Any]:
    """An ensemble of every family; it keeps all members."""
    (inputs, targets), clock, layout = setting.test, time.perf_counter(), setting.layout
    said = [
        controls.ensembles(d.families, layout, d.budget, inputs, kind=kind, seed=d.seed)
        for d in draws
    ]
    scores = accuracy(torch.cat(said), targets)
    seconds = (time.perf_counter() - clock) / len(scores)
    return row_of(setting, scores, seconds, len(draws[0].members[0]))
