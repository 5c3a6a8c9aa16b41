"""The pictures of a comparison: which there are, of which families, and what stands below them."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from evaluation.bench import Bench
from evaluation.contestants import Contestant
from evaluation.judged import Judged
from evaluation.methods.entries import AVERAGE, USUAL, Entry
from evaluation.pictures import comparison_figures, family_figures, training_figure

MOST = 10  # members of a family that is drawn, where there are families of so many

CAPTIONS: Mapping[str, str] = {
    "leaderboard": "Accuracy of every row on test images. Thick: 95 % interval of the mean; thin: "
    "standard deviation over families; hollow: controls.",
    "cost": "Seconds per family against accuracy. The dotted line joins rows that no other row "
    "beats in both.",
    "accuracy_by_members": "Accuracy against the number of members, with the interval of its mean.",
    "interpolation": "Loss and accuracy on the lines between all pairs of members of one family, "
    "before and after alignment.",
    "barriers": "How much the loss rises between two members of the family, at most, beyond the "
    "mean of its ends.",
    "weight_plane": "The family in the plane in which its members differ most, before and after "
    "alignment, over the loss on test images.",
    "variance": "Variance of units in fused networks over that in their members, layer by layer; "
    "below 1 they have collapsed.",
    "reliability": "Accuracy against confidence; on the diagonal a network knows how sure it is.",
    "mixing": "Which share every member has in every unit of the merged network, and in every "
    "class; one that is kept as it is has all.",
    "training": "The training of the merger: objective, accuracy and the share of validation "
    "families above their threshold.",
}


def figures_of(
    rows: Sequence[Mapping[str, Any]],
    judged: Sequence[Judged],
    contestants: Sequence[Contestant],
    *,
    seed: int,
    title: str,
    family: bool,
) -> dict[str, Figure]:
    """Draw a comparison.

    Args:
        rows: Rows of its ``leaderboard.json``.
        judged: Its families, one entry per number of members.
        contestants: The mergers.
        seed: Seed of merges.
        title: What was compared on.
        family: Whether to draw a family as well: lines, planes, layers.

    Returns:
        Name of a file -> figure, in the order in which they are shown.
    """
    figures = comparison_figures(rows, title=title)
    for contestant in contestants:
        history = contestant.card.get("history")
        if history:
            told = f"training of {contestant.name}"
            figures[_name("training", contestant, contestants)] = training_figure(
                history, title=told, target=contestant.card["options"].get("target")
            )
    return figures | (_drawn(judged, contestants, seed, title) if family else {})


def caption(name: str) -> str:
    """What stands below a picture.

    Args:
        name: Its name, as ``figures_of`` gives it.

    Returns:
        A sentence or two.
    """
    kind, _, merger = name.partition("-")
    return CAPTIONS[kind] + (f" Merger: {merger}." if merger else "")


def _drawn(
    judged: Sequence[Judged], contestants: Sequence[Contestant], seed: int, title: str
) -> dict[str, Figure]:
    """Pictures of the first family of the largest size that can be drawn."""
    by_size = sorted(judged, key=lambda one: one.members)
    fitting = [one for one in by_size if one.members <= MOST]
    bench = Bench((fitting or by_size)[-1 if fitting else 0], seed)
    fused = {"average, aligned": bench.merge(Entry(AVERAGE, (USUAL,)))}
    for one in contestants:
        fused[one.name] = bench.merge(Entry(one.kind), merger=one.merger)
    first = contestants[0].merger if contestants else None
    return family_figures(bench, fused, merger=first, title=title)


def _name(kind: str, contestant: Contestant, contestants: Sequence[Contestant]) -> str:
    return kind if len(contestants) == 1 else f"{kind}-{contestants.index(contestant) + 1}"
