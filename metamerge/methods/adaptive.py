"""Adaptive: members' shares of a model, of every layer or of every unit, fitted on inputs.

Paper: Yang et al., "AdaMerging: Adaptive Model Merging for Multi-Task Learning", ICLR 2024,
arXiv:2310.02575, which learns the coefficients of task vectors by the entropy of predictions on
unlabelled inputs. We differ in three ways: there is no base, as coefficients are the members'
shares (a softmax, so what comes out lies between the members); there may be one per unit; and
without labels the fused network is fitted to its members' soft vote unless ``entropy`` is asked
for, because networks trained apart have a better ensemble than average.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metamerge.calibration import Batches, check_fit, collect, divergence, predict, targets
from metamerge.corrections.batch_norm import recalibrate
from metamerge.methods._combination import combine, restore, running
from metamerge.options import check_choice, check_count, check_number
from metamerge.registry import merge_method
from metamerge.structure import Execution, Layout, PermutationSpec
from metamerge.structure.operators import CONVOLUTIONS
from metamerge.weights import Weights, stack

_PER = ("model", "layer", "unit")
_OBJECTIVES = ("labels", "distillation", "entropy")
_BATCH = 128  # inputs per step
_LOOKS = 10  # how often the objective is measured on all inputs
_QUIET = 1e-3  # of the first gradients: far below there is only rounding, and Adam takes no steps


class _Slot(NamedTuple):
    """Tensors of one slot have the same shares, ``[m, rows]``.

    Attributes:
        module: What the names of the tensors have in common; empty for the whole model.
        units: What their rows are in the permutation spec: no two groups share.
        rows: Number of rows, each with shares of its own.
    """

    module: str
    units: Hashable
    rows: int


Shares = dict[_Slot, Tensor]


@merge_method(paper="arXiv:2310.02575")
def adaptive(
    weights: Sequence[Weights],
    *,
    layout: Layout,
    batches: Batches,
    per: str = "unit",
    objective: str | None = None,
    steps: int = 200,
    lr: float = 0.05,
    generator: torch.Generator | None = None,
    report: dict[str, Any] | None = None,
) -> Weights:
    """Mix members by shares that are fitted on calibration inputs, starting at the average.

    Shares are parametrised as softmax over members, fitted by Adam on batches of 128 inputs, and
    those of the look at all inputs that was best are taken: the fused network is never worse on
    the objective than the average. Batch normalisations use statistics of the batch meanwhile.
    Networks with convolutions are fitted in float32, others in float64, where the order of members
    and units does not even show in rounding.

    Args:
        weights: One state dict per member, of one architecture.
        layout: That architecture; its output is logits.
        batches: Calibration inputs, with labels or without.
        per: ``model`` for one share per member, ``layer`` for one per member and module, ``unit``
            for one per member and output unit of a module.
        objective: ``labels`` for their cross entropy, ``distillation`` for the divergence from the
            members' soft vote, ``entropy`` for that of the predictions; None for ``labels`` where
            there are any, otherwise ``distillation``.
        steps: Steps of Adam; 0 gives the average.
        lr: Its learning rate.
        generator: Draws the batches; without it a fixed seed.
        report: Takes ``objective``, ``per``, its values at each look in ``curve``, and the mean
            ``shares`` of the members.

    Returns:
        New state dict with the members' names, shapes and dtypes.

    Raises:
        ConfigError: If an option is out of its range, or the batches have no labels where they are
            asked for, or do not fit the network.
    """
    _check(per, objective, steps, lr)
    if len(weights) == 1:
        return combine(weights, [1.0])
    inputs, labels = collect(batches, labelled=objective == "labels")
    check_fit(layout.program, inputs)
    objective = objective or ("distillation" if labels is None else "labels")
    exact = {
        key: t.to(torch.promote_types(t.dtype, torch.float32)) if t.is_floating_point() else t
        for key, t in stack(weights).items()
    }
    members, inputs = _for_fitting(exact, layout, inputs)
    wanted = None
    if objective != "entropy":
        logits = predict(members, layout, inputs)
        wanted = targets(logits, labels if objective == "labels" else None)
    goal = _Goal(layout, inputs, wanted)
    slots = {k: _slot(k, t, layout.spec, per) for k, t in members.items() if t.is_floating_point()}
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    shares, curve = _fit(members, slots, goal, steps, lr, generator)
    if report is not None:
        mean = torch.cat(list(shares.values()), 1).mean(1)
        report.update(objective=objective, per=per, inputs=len(inputs), curve=curve)
        report["shares"] = [round(float(share), 4) for share in mean]
    return restore(_mixed(exact, slots, shares), weights)


@dataclass(frozen=True)
class _Goal:
    """What fused weights, ``[1, ...]``, are judged by.

    Attributes:
        layout: Their architecture.
        inputs: ``[b, ...]``.
        wanted: Probabilities ``[b, c]``; None for predictions of little entropy.
    """

    layout: Layout
    inputs: Tensor
    wanted: Tensor | None

    def on_rows(self, fused: Weights, rows: Tensor) -> Tensor:
        """The objective on some inputs, normalised by their own statistics."""
        program, training = self.layout.program, len(rows) > 1
        known = running(fused)  # torch writes to these, and does not follow that back
        fused = {key: t.detach() if key in known else t for key, t in fused.items()}
        execution = Execution(program, fused, [self.inputs[rows]], stacked=True, training=training)
        return self._measured(execution.run_all(), rows)

    @torch.no_grad()
    def on_all(self, fused: Weights) -> float:
        """The objective on all inputs, with running statistics that are measured on them."""
        fused = recalibrate(fused, self.layout.program, self.inputs)
        return float(self._measured(predict(fused, self.layout, self.inputs), slice(None)))

    def _measured(self, logits: Tensor, rows: Tensor | slice) -> Tensor:
        if self.wanted is not None:
            return divergence(logits, self.wanted[rows]).sum()
        return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()


def _for_fitting(weights: Weights, layout: Layout, inputs: Tensor) -> tuple[Weights, Tensor]:
    """Members and inputs in float64, or in float32 where there are convolutions."""
    # Where a ReLU switches, the gradient jumps, so many steps make much of the rounding of sums in
    # another order. Convolutions in float64 are several times as slow.
    slow = any(node.op in CONVOLUTIONS for node in layout.program.nodes)
    dtype = torch.float32 if slow else torch.float64
    made = {k: t.detach().to(dtype) if t.is_floating_point() else t for k, t in weights.items()}
    return made, inputs.to(dtype)


def _slot(key: str, tensor: Tensor, spec: PermutationSpec, per: str) -> _Slot:
    """Where a tensor of all members, ``[m, ...]``, gets its shares from."""
    module = "" if per == "model" else key.rpartition(".")[0]
    if per != "unit" or tensor.ndim == 1:
        return _Slot(module, None, 1)
    return _Slot(module, spec.axes.get(key, (None,))[0], tensor.shape[1])


def _fit(
    members: Weights,
    slots: dict[str, _Slot],
    goal: _Goal,
    steps: int,
    lr: float,
    generator: torch.Generator,
) -> tuple[Shares, list[float]]:
    """The best shares that were looked at, and what the objective was at every look."""
    count, device = len(next(iter(members.values()))), goal.inputs.device
    free = {s: goal.inputs.new_zeros(count, s.rows) for s in dict.fromkeys(slots.values())}
    optimizer = torch.optim.Adam([t.requires_grad_() for t in free.values()], lr)
    looks = {round(steps * look / _LOOKS) for look in range(1, _LOOKS + 1)}
    best = _softmax(free)
    curve = [goal.on_all(_family(members, slots, best))]
    with torch.enable_grad():  # merge() has it switched off
        for step in range(1, steps + 1):
            rows = torch.randperm(len(goal.inputs), generator=generator)[:_BATCH].to(device)
            loss = goal.on_rows(_family(members, slots, _softmax(free)), rows)
            optimizer.param_groups[0]["lr"] = lr * (1 - (step - 1) / steps)
            optimizer.zero_grad()
            loss.backward()
            if step == 1:
                optimizer.param_groups[0]["eps"] = _QUIET * _root_mean_square(free)
            optimizer.step()
            if step in looks:
                shares = _softmax(free)
                curve.append(goal.on_all(_family(members, slots, shares)))
                best = shares if curve[-1] < min(curve[:-1]) else best
    return {slot: t.detach() for slot, t in best.items()}, curve


def _root_mean_square(free: Shares) -> float:
    """Of all gradients, and not 0."""
    gradients = torch.cat([t.grad.flatten() for t in free.values() if t.grad is not None])
    return float(gradients.square().mean().sqrt().clamp_min(1e-12))


def _softmax(free: Shares) -> Shares:
    return {slot: t.softmax(0) for slot, t in free.items()}


def _family(members: Weights, slots: dict[str, _Slot], shares: Shares) -> Weights:
    """Members ``[m, ...]`` mixed into a stack of one network, ``[1, ...]``."""
    counters = {key: t.amax(0) for key, t in members.items() if key not in slots}
    return {key: t[None] for key, t in {**_mixed(members, slots, shares), **counters}.items()}


def _mixed(members: Weights, slots: dict[str, _Slot], shares: Shares) -> Weights:
    """Floating tensors of the members, each row times its shares and added up."""
    mixed = {}
    for key, slot in slots.items():
        tensor, own = members[key], shares[slot]
        own = own.reshape(len(own), *[slot.rows, *[1] * (tensor.ndim - 2)][: tensor.ndim - 1])
        mixed[key] = (own.to(tensor.dtype) * tensor).sum(0)
    return mixed


def _check(per: str, objective: str | None, steps: int, lr: float) -> None:
    check_choice("adaptive", "per", per, _PER)
    check_choice("adaptive", "objective", objective, (*_OBJECTIVES, None))
    check_count("adaptive", "steps", steps)
    check_number("adaptive", "lr", lr, "(0, inf)")
