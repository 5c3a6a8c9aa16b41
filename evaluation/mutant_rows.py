"""The rows of a comparison of mutants, and families joined to a table."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from evaluation import controls, mutants
from evaluation.competitors import (
    Competitor,
    Images,
    control_rows,
    merger_rows,
    plain_rows,
    voting_rows,
)
from evaluation.contestants import Contestant, code_of
from evaluation.mutants import Case
from evaluation.scored import Scored
from metamerge.ensembles import fusing, pruning
from metamerge.ensembles.fusing import Mutant

START = "mutant at the start: mean-logit ensemble"
WIDE = "mutant, trained on"


def all_rows(case: Case, contestants: Sequence[Contestant]) -> Iterator[Competitor]:
    """Mutants, what merging makes of the same family and images, and controls.

    Args:
        case: The family.
        contestants: Trained mergers.

    Yields:
        The rows.
    """
    bench, budget = case.bench, case.budget
    images = Images(case.data, budget, bench.given(budget, labelled=True))
    data = case.data.replace("labelled", "unlabelled")
    unlabelled = Images(data, budget, bench.given(budget, labelled=False))
    yield from mutant_rows(case)
    for contestant in contestants:
        yield from merger_rows(bench, contestant, [unlabelled], [images], adapted=True, tuned=True)
    yield from plain_rows(bench, (), [unlabelled], [images])
    yield from voting_rows(bench)
    yield from control_rows(bench, [unlabelled], [images])


def mutant_rows(case: Case) -> Iterator[Competitor]:
    """Everything that is made by fusing, and its rivals at equal width or equal time.

    Args:
        case: The family.

    Yields:
        The rows, those that share a training one after the other.
    """
    code = code_of(mutants, fusing, pruning, controls)

    def row(
        name: str, data: str, make: Callable[[], mutants.Made], control: bool = False
    ) -> Competitor:
        return Competitor(name, data, code, partial(case.scored, name, data, make, control=control))

    def tried(make: mutants.Make) -> Callable[[], mutants.Made]:
        return partial(case.chosen, make)

    def cut_only(part: str, rate: float) -> Mutant:
        return case.cut(case.trained_on(part, rate), part, "taylor")

    images = case.data
    yield Competitor(START, "none", code, partial(_at_the_start, case))
    yield row(WIDE, images, tried(case.trained_on))
    yield row(f"{WIDE}, pruned", images, tried(cut_only))
    yield row(f"{WIDE}, pruned, trained on", images, tried(case.afterwards))
    yield row("mutant, pruned on the way", images, tried(case.on_the_way))
    for criterion in ("taylor", "magnitude", "random"):
        make = tried(partial(case.at_once, criterion))
        name = f"mutant, pruned at once ({criterion})"
        yield row(name, images, make, criterion == "random")
    for frozen, how in ((True, "frozen"), (False, "together")):
        name = f"joined at the last layer, {how}"
        yield row(name, images, tried(partial(case.joined, frozen)))
    if case.schedule.scratch_epochs:
        yield row(
            "network of the mutant's width, from scratch", images, tried(case.from_scratch), True
        )
    yield row("best member, fine-tuned as long", images, case.as_long, True)
    merged = "average, aligned + refit, fine-tuned"
    make = partial(case.bench.timed, merged, images, case.merged_and_tuned, control=False)
    yield Competitor(merged, images, code, make)
    if case.bench.judged.segments is not None:
        yield from _halves(case, row, tried)


def _halves(
    case: Case,
    row: Callable[..., Competitor],
    tried: Callable[[mutants.Make], Callable[[], mutants.Made]],
) -> Iterator[Competitor]:
    """Two networks of half the width, on a half of the family's segments each or on all of them."""
    for shared, name in ((False, "each on half of the segments"), (True, "each on all segments")):
        title = f"halves, {name}, fused"
        yield row(title, "segments", partial(case.halves, shared))

        def tuned(part: str, rate: float, shared: bool = shared) -> Mutant:
            return case.train(case.halves(shared), part, rate, case.schedule.epochs)

        yield row(f"{title}, trained on", f"segments, {case.data}", tried(tuned))


def _at_the_start(case: Case) -> Scored:
    """The vote of all members, whose mean of logits the mutant puts out; one network's size."""
    vote = lambda logits: logits.mean(1).argmax(-1)  # noqa: E731
    scored = case.bench.voted(START, vote, networks=case.bench.members)
    parameters = sum(t.numel() for t in case.start.weights.values() if t.is_floating_point())
    return replace(scored, parameters=parameters, control=False)


def joined(rows: Sequence[Scored]) -> Scored:
    """The same row of several families as one.

    Args:
        rows: One per family.

    Returns:
        The row, with the mean of their seconds.
    """
    return replace(
        rows[0],
        accuracies=torch.cat([row.accuracies for row in rows]),
        seconds=sum(row.seconds for row in rows) / len(rows),
    )
