"""Refining: a few steps of distillation that bring fused weights nearer to a consensus.

Distillation (Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network",
arXiv:1503.02531) of a consensus that a merger has learned to weigh, from a start that it has fused,
on probes that it has learned: no images are needed, and some dozens of steps are enough. A few
hundred probes are soon learned by heart, by the closed form of the fit before as well: mixtures of
them can stand beside them.
"""

import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metamerge.calibration import check_fit, divergence, predict
from metamerge.mergers.gate import TOLD, answers_of, consensus
from metamerge.mergers.ordering import in_canonical_order, member_order
from metamerge.mergers.probes import filled_up, with_spare
from metamerge.mergers.watching import Watched, watched_beside, watched_inputs
from metamerge.structure import Layout, run
from metamerge.weights import Weights

log = logging.getLogger(__name__)
BATCH = 64  # inputs per step
TEMPERATURE = 2.0  # by which the consensus is softened, section 2 of the paper
BETAS = (0.9, 0.999)  # of Adam
DAMPING = 0.03  # smallest divisor of Adam's steps, relative to the first gradient
ALONE = 400  # steps, at least, on given inputs without any probes beside them
WATCHED = 2**27  # numbers in the widest maps of the members that are merged at a time
SAME_ON_MADE = (
    "the members agree on nearly all inputs that were made from them: the one that agrees most "
    "with the others is "
)
KEPT = SAME_ON_MADE + (
    "kept as it is. Pass a hundred inputs of their task or more (batches=) for it to learn what "
    "all of them say."
)
LEARNS_MADE = (
    SAME_ON_MADE + "the start, and learns the consensus on these, as steps were asked for."
)
SAME_VOTES = (
    "the members cast the same votes on nearly all of the inputs: the one that agrees most with "
    "the others "
)
LEARNS = SAME_VOTES + "is the start, and learns the soft vote of all on the inputs."
FROM_MEMBER = (
    "the member that says most of what the consensus says is the start, and learns the consensus: "
    "validation families preferred it to the fused network when the merger was trained."
)
COULD_LEARN = SAME_VOTES + "is kept as it is. With steps (refine=) it learns the soft vote of all."
AGREED = 1e-6  # divergence below which there is nothing to refine
PAUSE = 5.0  # seconds between two lines of the log


class Refined(NamedTuple):
    """What became of some families.

    Attributes:
        weights: ``[f, ...]``.
        members: Numbers of the members that refining started from, ``[f]``; None where it started
            from fused networks, or did not start.
    """

    weights: Weights
    members: Tensor | None = None


def fuse(
    merger: nn.Module,
    members: Weights,
    layout: Layout,
    inputs: Tensor | None = None,
    *,
    steps: int | None = None,
    report: dict[str, Any] | None = None,
) -> Weights:
    """Merge aligned members, and refine what comes out.

    Args:
        merger: A trained merger.
        members: Aligned members of ``f`` families, ``[f, m, ...]``.
        layout: Their architecture.
        inputs: Calibration inputs that take the place of the merger's probes, ``[b, ...]``.
        steps: Steps of refining; None for as many as proved best when the merger was trained.
        report: Takes what members of the first family were ``watched_on``, if not on inputs, and
            the number of the one that was ``kept`` as it is or ``started_from``, if any.

    Returns:
        Fused weights, ``[f, ...]``.

    Raises:
        ConfigError: If the inputs are not those of this architecture.
    """
    given = members
    members, perm = in_canonical_order(members, layout)
    if inputs is None:
        watched = watched_inputs(merger, members, layout)
        if report is not None:
            taken = _enough(merger, watched[0]) if steps is None else steps
            _tell(watched[0], given, taken, report)
    else:
        check_fit(layout.program, inputs)
        every = torch.arange(len(next(iter(members.values()))))
        watched = [Watched(every, inputs, f"{len(inputs)} inputs")]
    parts = []
    for each in watched:
        own = {key: tensor[each.families.to(tensor.device)] for key, tensor in members.items()}
        parts.append(fuse_on(merger, own, layout, each, steps=steps))
    if report is not None:
        _tell_start(parts[0], int(watched[0].families[0]), given, report)
    back = torch.cat([each.families for each in watched]).argsort()
    joined = {key: torch.cat([part.weights[key] for part in parts]) for key in members}
    fused = {key: tensor[back.to(tensor.device)] for key, tensor in joined.items()}
    return layout.spec.unpermute(fused, perm)


def fuse_beside(
    merger: nn.Module,
    members: Weights,
    layout: Layout,
    inputs: Tensor,
    *,
    steps: int | None = None,
    report: dict[str, Any] | None = None,
) -> Weights:
    """Merge aligned members on inputs of their task and on probes, whichever are of use.

    Args:
        merger: A trained merger.
        members: Aligned members of one family, ``[1, m, ...]``.
        layout: Their architecture.
        inputs: Inputs of their task, ``[b, ...]``.
        steps: Steps of refining; None for as many as proved best when the merger was trained, but
            at least ``ALONE`` on inputs that stand alone.
        report: Takes what members were ``watched_on``, and the number of the one that was ``kept``
            as it is or ``started_from``, if any.

    Returns:
        Fused weights, ``[1, ...]``.

    Raises:
        ConfigError: If the inputs are not those of this architecture.
    """
    ordered, perm = in_canonical_order(members, layout)
    watched = watched_beside(merger, ordered, layout, inputs)
    steps = _enough(merger, watched) if steps is None else steps
    fused = fuse_on(merger, ordered, layout, watched, steps=steps)
    if report is not None:
        _tell(watched, members, steps, report)
        _tell_start(fused, 0, members, report)
    return layout.spec.unpermute(fused.weights, perm)


def fuse_on(
    merger: nn.Module,
    members: Weights,
    layout: Layout,
    watched: Watched,
    *,
    steps: int | None = None,
) -> Refined:
    """Merge and refine families that are watched on the same inputs, or take one of their members.

    Families are merged side by side, as many at a time as their members' maps fit into memory.

    Args:
        merger: A trained merger.
        members: Their aligned members in canonical order, ``[f, m, ...]``.
        layout: Their architecture.
        watched: What they are watched on, and which member is to be kept or to learn from others.
        steps: Steps of refining; None for as many as proved best when the merger was trained, at
            least ``ALONE`` on inputs that stand alone, and none where a member is to be kept.

    Returns:
        Weights, with units in the order of the members, and which of these they were.
    """
    steps = _enough(merger, watched) if steps is None else steps
    at_once = _at_once(merger, members, layout, watched.inputs)
    split = zip(*(tensor.split(at_once) for tensor in members.values()), strict=True)
    parts = [
        _fuse_some(merger, dict(zip(members, some, strict=True)), layout, watched, steps)
        for some in split
    ]
    weights = {key: torch.cat([part.weights[key] for part in parts]) for key in members}
    numbers = [part.members for part in parts if part.members is not None]
    return Refined(weights, torch.cat(numbers) if numbers else None)


def _fuse_some(
    merger: nn.Module, members: Weights, layout: Layout, watched: Watched, steps: int
) -> Refined:
    """Those that fit into memory at once."""
    if watched.kept is not None:
        kept = {key: tensor[:, watched.kept] for key, tensor in members.items()}
        if not steps:
            return Refined(kept)
    shown = filled_up(watched.inputs, layout, merger.config.mixtures)
    if watched.voters is not None:
        voters = {key: tensor[:, watched.voters] for key, tensor in members.items()}
        return Refined(refine(kept, voters, layout, shown, None, steps=steps))
    fused, trust = merger(members, layout, shown)
    if not steps:
        return Refined(fused)
    shown = with_spare(shown.detach(), watched.spare)
    answers = answers_of(members, layout, shown).detach()
    if watched.kept is None:
        start, numbers = start_of(merger, fused, members, answers, trust)
    else:
        start, numbers = kept, None
    told = {"steps": steps, "answers": answers}
    return Refined(refine(start, members, layout, shown, trust, **told), numbers)


def start_of(
    merger: nn.Module, fused: Weights, members: Weights, answers: Tensor, trust: Tensor
) -> tuple[Weights, Tensor | None]:
    """What refining starts from, as its ``config`` says.

    Args:
        merger: A trained merger.
        fused: What it has fused, ``[f, ...]``.
        members: Aligned members, ``[f, m, ...]``.
        answers: Their logits, ``[f, m, b, c]``.
        trust: What the gate read of them, ``[f, m, c, TOLD]``.

    Returns:
        Weights ``[f, ...]``, and numbers of the members that they are, ``[f]``, if they are any.
    """
    if merger.config.start == "fused":
        return fused, None
    return nearest_members(members, answers, trust)


def nearest_members(members: Weights, answers: Tensor, trust: Tensor) -> tuple[Weights, Tensor]:
    """The member of each family that says most of what their consensus says.

    Args:
        members: Aligned members, ``[f, m, ...]``.
        answers: Their logits, ``[f, m, b, c]``.
        trust: What the gate read of them, ``[f, m, c, TOLD]``.

    Returns:
        Their weights ``[f, ...]`` and numbers ``[f]``.
    """
    wanted = consensus(trust, answers).softmax(-1)  # [f, b, c]
    numbers = divergence(answers, wanted[:, None]).argmin(1)
    rows = torch.arange(len(numbers), device=numbers.device)
    return {key: tensor[rows, numbers] for key, tensor in members.items()}, numbers


def refine(
    fused: Weights,
    members: Weights,
    layout: Layout,
    inputs: Tensor,
    trust: Tensor | None,
    *,
    steps: int,
    lr: float = 1e-3,
    answers: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Weights:
    """Take steps of Adam towards the consensus of the members, for all families at once.

    Args:
        fused: Fused weights of ``f`` families, ``[f, ...]``.
        members: Their aligned members, ``[f, m, ...]``.
        layout: Their architecture.
        inputs: Probes or calibration inputs, ``[b, ...]``.
        trust: What the gate read of the members, ``[f, m, c, TOLD]``; None to trust all alike.
        steps: Number of steps; the learning rate falls to 0 over them.
        lr: Learning rate of the first step.
        answers: The members' logits on the inputs, ``[f, m, b, c]``, where they are known.
        generator: Source of the order of inputs.

    Returns:
        New weights ``[f, ...]``; what belongs to no layer is as it was, and so is a network that
        says what its members say already.
    """
    chosen = generator or torch.Generator().manual_seed(0)
    with torch.no_grad():
        answers = answers_of(members, layout, inputs) if answers is None else answers
        if trust is None:
            trust = answers.new_zeros(*answers.shape[:2], answers.shape[-1], TOLD)
        agreed = consensus(trust.detach(), answers)
        apart = divergence(predict(fused, layout, inputs), agreed.softmax(-1))
        wanted = (agreed / TEMPERATURE).softmax(-1)
    rates = lr * (apart > AGREED)

    def loss(weights: Weights) -> Tensor:
        rows = torch.randperm(len(inputs), generator=chosen)[:BATCH].to(inputs.device)
        logits = run(layout.program, weights, [inputs[rows]], stacked=True)
        return divergence(logits / TEMPERATURE, wanted[:, rows])

    return descend(fused, layout, loss, steps=steps, lr=rates)


def descend(
    weights: Weights,
    layout: Layout,
    loss: Callable[[Weights], Tensor],
    *,
    steps: int,
    lr: float | Tensor,
) -> Weights:
    """Train the layers of stacked networks by Adam, each on its own loss.

    Paper: Kingma and Ba, "Adam: A Method for Stochastic Optimization", arXiv:1412.6980, with a
    learning rate that falls to 0 in a straight line, and with a floor under its divisors that is
    relative to the tensor's first gradient, so that rounding errors do not become full steps.

    Args:
        weights: Weights of ``n`` networks, ``[n, ...]``; they are not changed.
        layout: Their architecture.
        loss: Weights -> one number per network, ``[n]``.
        steps: Number of steps.
        lr: Learning rate of the first step, one for all or one per network, ``[n]``.

    Returns:
        New weights ``[n, ...]``; what belongs to no layer (running statistics) is as it was.

    Long work says every few seconds how far it is, by ``logging`` at the level of ``INFO``.
    """
    keys = [key for layer in layout.layers for key in (layer.weight, layer.bias) if key]
    trained = {key: weights[key].detach().clone().requires_grad_() for key in keys}
    first = {key: torch.zeros_like(tensor) for key, tensor in trained.items()}
    second = {key: torch.zeros_like(tensor) for key, tensor in trained.items()}
    floors: Weights = {}
    rate = torch.as_tensor(lr, dtype=torch.float32)
    said = time.monotonic()
    with torch.enable_grad():
        for step in range(1, steps + 1):
            if time.monotonic() - said >= PAUSE:
                said = time.monotonic()
                log.info("step %d of %d, networks: %d", step, steps, len(trained[keys[0]]))
            value = loss({**weights, **_tied(trained, layout)}).sum()
            grads = torch.autograd.grad(value, list(trained.values()), allow_unused=True)
            with torch.no_grad():
                now = rate * (1 - (step - 1) / steps) / (1 - BETAS[0] ** step)
                for (key, tensor), grad in zip(trained.items(), grads, strict=True):
                    if grad is None:
                        continue
                    if step == 1:
                        floors[key] = DAMPING * _typical(grad)
                    first[key].lerp_(grad, 1 - BETAS[0])
                    second[key].mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
                    size = (second[key] / (1 - BETAS[1] ** step)).sqrt_().add_(floors[key])
                    each = now.reshape(-1, *[1] * (tensor.ndim - 1)).to(tensor)
                    tensor.sub_(each * first[key] / size)
    done = {key: tensor.detach() for key, tensor in trained.items()}
    return {**{key: tensor.clone() for key, tensor in weights.items()}, **_tied(done, layout)}


def _at_once(merger: nn.Module, members: Weights, layout: Layout, inputs: Tensor) -> int:
    """Families that are merged at a time: all maps of their members are held at once."""
    count = next(iter(members.values())).shape[1]
    numbers = count * max(len(inputs), merger.config.mixtures) * layout.program.widest
    return max(1, WATCHED // numbers)


def _enough(merger: nn.Module, watched: Watched) -> int:
    """Steps of refining: none for a member that is kept, and more on inputs that stand alone."""
    if watched.kept is not None and watched.voters is None:
        return 0
    # Probes have learned to be fitted at once, inputs have not.
    return max(merger.config.refine, ALONE) if watched.given else merger.config.refine


def _tell(watched: Watched, members: Weights, steps: int, report: dict[str, Any]) -> None:
    """Say what the first family was watched on, and who is kept, by the number it came with."""
    report["watched_on"] = watched.told
    if steps and watched.spare is not None:
        report["watched_on"] += f" (and {len(watched.spare)} spare ones to refine on)"
    if watched.kept is not None:
        order = member_order(members)[int(watched.families[0])]
        report["started_from" if steps else "kept"] = int(order[watched.kept])
        notes = (KEPT, LEARNS_MADE) if watched.voters is None else (COULD_LEARN, LEARNS)
        report["note"] = notes[steps > 0]


def _tell_start(made: Refined, family: int, members: Weights, report: dict[str, Any]) -> None:
    """Say which member of its first family refining began with, by the number that it came with."""
    if made.members is not None:
        order = member_order(members)[family]
        report |= {"started_from": int(order[int(made.members[0])]), "note": FROM_MEMBER}


def _typical(grad: Tensor) -> Tensor:
    """Root mean square of every network's gradient, ``[n, 1, ...]``; never 0."""
    dims = tuple(range(1, grad.ndim))
    return grad.square().mean(dims, keepdim=True).sqrt().clamp_min(1e-12)


def _tied(trained: Weights, layout: Layout) -> Weights:
    """Trained tensors, and their other names."""
    tied = layout.program.tied.items()
    return {**trained, **{alias: trained[key] for alias, key in tied if key in trained}}
