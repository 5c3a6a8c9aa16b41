"""The rows of a comparison: mergers, plain methods and controls, each at every budget of images."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from evaluation import budgets, by_heart, controls
from evaluation.bench import Bench
from evaluation.budgets import Budget
from evaluation.contestants import Contestant, code_of, without_prior
from evaluation.merging import NOTHING, Given
from evaluation.methods.entries import AVERAGE, DATA, USUAL, Entry, entries, parse_entry
from evaluation.scored import Scored
from metamerge.errors import ConfigError
from metamerge.registry import get_method

SCRATCH_SEED = 2**62  # inits of controls: beyond those of any zoo
FEWEST = 3  # members that have clusters to speak of
ALL = "all"

PLAIN: tuple[tuple[str, Entry, str], ...] = (  # rows that stand in every table
    ("average", Entry(AVERAGE, None), "none"),
    ("average, aligned", Entry(AVERAGE, (USUAL,)), "none"),
    ("average, aligned + repair", Entry(AVERAGE, (USUAL,), ("repair",)), "unlabelled"),
    ("average, aligned + refit", Entry(AVERAGE, (USUAL,), ("refit",)), "unlabelled"),
)
CHOSEN: tuple[tuple[str, Entry, str], ...] = (  # and those where nobody names methods
    ("cluster, all", Entry("cluster", options={"keep": "all"}), "none"),
    ("rank average, aligned", Entry("rank_average"), "labelled"),
    ("cluster, best", Entry("cluster", options={"keep": "best"}), "labelled"),
)


@dataclass(frozen=True)
class Competitor:
    """A row that can be made.

    Attributes:
        method: What the row is called.
        data: What it is given: ``none``, ``segments``, ``unlabelled:n`` or ``labelled:n``.
        code: Hash of what it depends on, beside the families.
        score: Makes it.
        random: Whether another seed may give another row.
        optional: Whether the comparison goes on without it where it fails.
    """

    method: str
    data: str
    code: str
    score: Callable[[], Scored]
    random: bool = True
    optional: bool = False


@dataclass(frozen=True, eq=False)
class Images:
    """A budget, how rows that use it are marked, and what merges get of it."""

    data: str
    budget: Budget
    given: Given


def drawn_images(bench: Bench, kind: str, counts: Sequence[int], *, full: bool) -> list[Images]:
    """The budgets of one kind: few images, more, and all there are.

    Args:
        bench: The families, with all objective images and the seed of the draws.
        kind: ``unlabelled``, or ``labelled``, whose draws are stratified by class.
        counts: How many; 0 for none.
        full: Whether all images are a budget, too.

    Returns:
        The budgets, each once, small ones first.
    """
    budget, labelled = bench.budget, kind == "labelled"
    wanted = [*filter(None, counts), *[len(budget)] * full]
    sizes = sorted({min(count, len(budget)) for count in wanted})
    drawn = [budget.few(size, stratified=labelled, seed=bench.seed) for size in sizes]
    return [Images(f"{kind}:{len(own)}", own, bench.given(own, labelled=labelled)) for own in drawn]


def merger_rows(
    bench: Bench,
    contestant: Contestant,
    unlabelled: Sequence[Images],
    labelled: Sequence[Images],
    *,
    adapted: bool,
    tuned: bool,
) -> Iterator[Competitor]:
    """A merger with nothing but weights, with unlabelled and with labelled images.

    Args:
        bench: The families.
        contestant: The merger.
        unlabelled: Budgets of inputs.
        labelled: Budgets of inputs and labels.
        adapted: Whether to adapt it to labelled images.
        tuned: Whether to train its networks further on labelled images.

    Yields:
        The rows.
    """
    name, entry, merger = contestant.name, Entry(contestant.kind), contestant.merger

    def row(label: str, data: str, given: Given = NOTHING, merger: Any = merger) -> Competitor:
        score = partial(bench.merged, label, data, entry, given, merger)
        random = data != "none" or entry.random("none")
        return Competitor(label, data, contestant.code, score, random)

    yield row(name, "none")
    bare = without_prior(merger)
    if bare is not None:
        yield row(f"{name}, no prior", "none", merger=bare)
    for images in unlabelled:
        yield row(f"{name}, calibrated", images.data, images.given)
    for images in labelled if adapted else ():
        yield row(f"{name}, adapted", images.data, images.given)
    for images in labelled if tuned else ():
        label = f"{name}, then fine-tuned"
        make = partial(_tuned, bench, partial(bench.merge, entry, merger=merger), images.budget)
        score = partial(bench.timed, label, images.data, make, control=False)
        yield Competitor(label, images.data, contestant.code, score)


def plain_rows(
    bench: Bench,
    methods: Sequence[str],
    unlabelled: Sequence[Images],
    labelled: Sequence[Images],
    *,
    learned: Sequence[str] = (),
) -> Iterator[Competitor]:
    """Merge methods that have learned nothing.

    Args:
        bench: The families.
        methods: Names, see ``parse_entry``; ``all`` for every way to merge that fits; a few if
            there are none.
        unlabelled: Budgets of inputs.
        labelled: Budgets of inputs and labels.
        learned: Learned methods that have rows of their own.

    Yields:
        The rows; the plain and the aligned average are always among them.
    """
    images = {"none": [Images("none", bench.budget, NOTHING)]}
    images |= {"unlabelled": list(unlabelled), "labelled": list(labelled)}

    def rows(name: str, entry: Entry, kind: str, *, optional: bool = True) -> Iterator[Competitor]:
        for own in images[kind]:
            score = partial(bench.merged, name, own.data, entry, own.given)
            random = entry.random(own.data)
            yield Competitor(name, own.data, entry.code, score, random, optional)

    for name, entry, kind in PLAIN if methods else (*PLAIN, *CHOSEN):
        if entry.method != "cluster" or bench.members >= FEWEST:
            yield from rows(name, entry, kind, optional=False)
    known = {entry.label for _, entry, _ in PLAIN}
    for entry in chosen_entries(bench, methods, learned):
        if entry.label not in known:
            known.add(entry.label)
            for kind in filter(entry.possible, DATA):
                yield from rows(entry.label, entry, kind)


def chosen_entries(bench: Bench, methods: Sequence[str], learned: Sequence[str]) -> list[Entry]:
    """Ways to merge by name.

    Args:
        bench: The families.
        methods: Names, or ``all``.
        learned: Learned methods that have rows of their own and need none here.

    Returns:
        The entries.

    Raises:
        ConfigError: If a name is unknown, or a method cannot work on these families.
    """
    found: list[Entry] = []
    for name in methods:
        if name == ALL:
            start = "own" if bench.judged.bases is None else "common"
            found += entries(bench.layout, bench.members, start, learned=None)
            continue
        entry = parse_entry(name, bench.members)
        record = get_method(entry.method)
        if "merger" in record.resources and entry.method in learned:
            continue
        if "merger" in record.resources:
            raise ConfigError(f"methods: {entry.method} is learned; name one with --merger.")
        if "base" in record.required and bench.judged.bases is None:
            raise ConfigError(
                f"methods: {name} reads members as changes of a common base, and these families "
                "have none. Give --base with --checkpoints, or a zoo that was built with "
                "--init shared --shared-steps 50 --snapshots 1."
            )
        found.append(entry)
    return found


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
        yield Competitor(name, "none", code, score, random=False)
    for which in ("mean", "best") if bench.judged.training else ():
        name = f"{which} network of the training zoo"
        score = partial(bench.timed, name, "none", partial(bench.null, which), control=True)
        yield Competitor(name, "none", code_of(by_heart), score, random=False)


def control_rows(
    bench: Bench,
    unlabelled: Sequence[Images],
    labelled: Sequence[Images],
    *,
    trained: bool = True,
) -> Iterator[Competitor]:
    """Whatever else makes one network with the same images: choosing, distilling, training.

    Args:
        bench: The families.
        unlabelled: Budgets of inputs.
        labelled: Budgets of inputs and labels.
        trained: Whether to train any; choosing the best member is not training.

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
        if trained:
            tuned = partial(_tuned, bench, best, images.budget)
            yield row("best member, fine-tuned", images.data, tuned)
        if trained and bench.judged.network is not None:
            yield row("trained from scratch", images.data, partial(_scratch, bench, images.budget))
    for images in unlabelled if trained else ():
        for name, start in (
            ("best member", partial(bench.best, images.budget)),
            ("aligned average", average),
        ):
            make = partial(_distilled, bench, start, images.budget)
            yield row(f"distilled from {name}", images.data, make)
    if trained and bench.judged.segments is not None:
        yield row("trained on all segments (ceiling)", "segments", partial(_ceiling, bench))


def _tuned(bench: Bench, start: Callable[[], Any], budget: Budget) -> Any:
    return controls.fine_tuned(start(), bench.layout, budget, seed=bench.seed)[0]


def _distilled(bench: Bench, start: Callable[[], Any], budget: Budget) -> Any:
    told = (bench.families, bench.layout, budget)
    return controls.distilled(start(), *told, seed=bench.seed)[0]


def _scratch(bench: Bench, budget: Budget) -> Any:
    told = (bench.judged.network, _seeds(bench), bench.layout, budget)
    return controls.from_scratch(*told, seed=bench.seed)[0]


def _ceiling(bench: Bench) -> Any:
    judged, task = bench.judged, bench.judged.split.task
    return controls.on_union(
        judged.network,
        _seeds(bench),
        bench.layout,
        (task.inputs, task.targets),
        judged.segments,
        seed=bench.seed,
        **judged.recipe,
    )


def _seeds(bench: Bench) -> list[int]:
    """Seeds of inits that no member has."""
    first = SCRATCH_SEED + 2**32 * bench.seed + bench.first
    return [first + family for family in range(bench.count)]
