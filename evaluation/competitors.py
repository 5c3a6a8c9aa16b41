"""The rows of a comparison: mergers, plain methods and controls, each at every budget of images."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from evaluation import budgets, by_heart, controls
from evaluation.bench import USUAL, Bench
from evaluation.budgets import Budget
from evaluation.contestants import Contestant, code_of, without_residual
from evaluation.methods.entries import Entry
from evaluation.report import Scored

SCRATCH_SEED = 2**62  # inits of controls: beyond those of any zoo
ALIGNED = {"method": "average", "align": USUAL}
FEWEST = 3  # members that have clusters to speak of


@dataclass(frozen=True)
class Competitor:
    """A row that can be made.

    Attributes:
        method: What the row is called.
        data: What it is given: ``none``, ``segments``, ``unlabelled:n`` or ``labelled:n``.
        code: Hash of what it depends on, beside the families.
        score: Makes it.
    """

    method: str
    data: str
    code: str
    score: Callable[[], Scored]


@dataclass(frozen=True)
class Images:
    """A budget and how rows that use it are marked."""

    data: str
    budget: Budget


def drawn_images(
    budget: Budget, kind: str, counts: Sequence[int], *, full: bool, seed: int
) -> list[Images]:
    """The budgets of one kind: few images, more, and all there are.

    Args:
        budget: All objective images.
        kind: ``unlabelled``, or ``labelled``, whose draws are stratified by class.
        counts: How many; 0 for none.
        full: Whether all images are a budget, too.
        seed: Seed of the draws.

    Returns:
        The budgets, each once, small ones first.
    """
    wanted = [*filter(None, counts), *[len(budget)] * full]
    stratified = kind == "labelled"
    return [
        Images(f"{kind}:{size}", budget.few(size, stratified=stratified, seed=seed))
        for size in sorted({min(count, len(budget)) for count in wanted})
    ]


def merger_rows(
    bench: Bench,
    contestant: Contestant,
    unlabelled: Sequence[Images],
    labelled: Sequence[Images],
    *,
    tuned: bool,
) -> Iterator[Competitor]:
    """A merger with nothing but weights, with unlabelled and with labelled images.

    Args:
        bench: The families.
        contestant: The merger.
        unlabelled: Budgets of inputs.
        labelled: Budgets of inputs and labels.
        tuned: Whether to train its networks further on labelled images.

    Yields:
        The rows.
    """
    name, own = contestant.name, {"method": contestant.kind, "merger": contestant.merger}

    def row(label: str, data: str, **given: Any) -> Competitor:
        score = partial(bench.merged, label, data, **{**own, **given})
        return Competitor(label, data, contestant.code, score)

    yield row(name, "none")
    bare = without_residual(contestant.merger)
    if bare is not None:
        yield row(f"{name}, no residual, no prior", "none", merger=bare)
    for images in unlabelled:
        yield row(f"{name}, calibrated", images.data, budget=images.budget)
    for images in labelled:
        yield row(f"{name}, adapted", images.data, budget=images.budget, labelled=True)
    for images in labelled if tuned else ():
        label = f"{name}, then fine-tuned"
        make = partial(_tuned, bench, partial(bench.merge, **own), images.budget)
        score = partial(bench.timed, label, images.data, make, control=False)
        yield Competitor(label, images.data, contestant.code, score)


def plain_rows(
    bench: Bench, unlabelled: Sequence[Images], labelled: Sequence[Images]
) -> Iterator[Competitor]:
    """Merge methods that have learned nothing.

    Args:
        bench: The families.
        unlabelled: Budgets of inputs.
        labelled: Budgets of inputs and labels.

    Yields:
        The rows.
    """

    def row(label: str, data: str, method: str, **given: Any) -> Competitor:
        correct = (given["correct"],) if "correct" in given else ()
        code = Entry(method, given.get("align", "default"), correct).code
        score = partial(bench.merged, label, data, method=method, **given)
        return Competitor(label, data, code, score)

    clusters = bench.members >= FEWEST
    yield row("average", "none", "average", align=None)
    yield row("average, aligned", "none", **ALIGNED)
    if clusters:
        yield row("cluster, all", "none", "cluster", keep="all")
    for name in ("repair", "refit"):
        for images in unlabelled:
            given = {**ALIGNED, "correct": name, "budget": images.budget}
            yield row(f"average, aligned + {name}", images.data, **given)
    for images in labelled:
        given = {"budget": images.budget, "labelled": True}
        yield row("rank average, aligned", images.data, "rank_average", **given)
        if clusters:
            yield row("cluster, best", images.data, "cluster", keep="best", **given)


def voting_rows(bench: Bench) -> Iterator[Competitor]:
    """What members say alone and together, and what a merger could know by heart.

    Args:
        bench: The families.

    Yields:
        The rows.
    """
    votes = {
        "mean member": (lambda logits: logits.argmax(-1), 1),
        "soft-vote ensemble": (controls.soft_vote, bench.members),
        "majority-vote ensemble": (controls.majority, bench.members),
    }
    code = code_of(controls)
    for name, (vote, networks) in votes.items():
        score = partial(bench.voted, name, vote, networks=networks)
        yield Competitor(name, "none", code, score)
    for which in ("mean", "best") if bench.judged.training else ():
        name = f"{which} network of the training zoo"
        score = partial(bench.timed, name, "none", partial(bench.null, which), control=True)
        yield Competitor(name, "none", code_of(by_heart), score)


def control_rows(
    bench: Bench, unlabelled: Sequence[Images], labelled: Sequence[Images]
) -> Iterator[Competitor]:
    """Whatever else makes one network with the same images: choosing, distilling, training.

    Args:
        bench: The families.
        unlabelled: Budgets of inputs.
        labelled: Budgets of inputs and labels.

    Yields:
        The rows.
    """
    code = code_of(controls, budgets)

    def row(name: str, data: str, make: Callable[[], Any]) -> Competitor:
        return Competitor(name, data, code, partial(bench.timed, name, data, make, control=True))

    average = partial(controls.aligned_average, bench.families, bench.layout)
    for images in labelled:
        best = partial(bench.best, images.budget)
        yield row("best member", images.data, best)
        tuned = partial(_tuned, bench, best, images.budget)
        yield row("best member, fine-tuned", images.data, tuned)
        yield row("trained from scratch", images.data, partial(_scratch, bench, images.budget))
    for images in unlabelled:
        for name, start in (
            ("best member", partial(bench.best, images.budget)),
            ("aligned average", average),
        ):
            make = partial(_distilled, bench, start, images.budget)
            yield row(f"distilled from {name}", images.data, make)
    if bench.judged.segments is not None:
        yield row("trained on all segments (ceiling)", "segments", partial(_ceiling, bench))


def _tuned(bench: Bench, start: Callable[[], Any], budget: Budget) -> Any:
    return controls.fine_tuned(start(), bench.layout, budget)[0]


def _distilled(bench: Bench, start: Callable[[], Any], budget: Budget) -> Any:
    return controls.distilled(start(), bench.families, bench.layout, budget)[0]


def _scratch(bench: Bench, budget: Budget) -> Any:
    return controls.from_scratch(bench.judged.network, _seeds(bench), bench.layout, budget)[0]


def _ceiling(bench: Bench) -> Any:
    judged, task = bench.judged, bench.judged.split.task
    return controls.on_union(
        judged.network,
        _seeds(bench),
        bench.layout,
        (task.inputs, task.targets),
        judged.segments,
        **judged.recipe,
    )


def _seeds(bench: Bench) -> list[int]:
    return [SCRATCH_SEED + bench.first + family for family in range(bench.count)]
