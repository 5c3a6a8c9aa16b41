"""What is left to do once a merger is trained: steps of refining, gates, card, files."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from evaluation.gates import Gate, collapse_gates
from evaluation.tracking import Run
from metamerge.errors import MetaMergeError
from metamerge.mergers import Merger, fuse, refine, save_merger
from metamerge.mergers.gate import answers_of
from metamerge.mergers.probes import filled_up, with_spare
from metamerge.mergers.refining import fuse_on, nearest_members
from metamerge.mergers.watching import Watched, told_apart
from trainers.families import Data, Families
from trainers.outcome import Outcome
from trainers.validating import Goal, judged, score

FILL = 1024  # inputs that mixtures of probes fill up to


class Way(NamedTuple):
    """A way to refine: steps, inputs that mixtures fill up to, and where the steps start from."""

    steps: int
    mixtures: int
    start: str = "fused"

    def __str__(self) -> str:
        """Such as ``400 steps of refining on mixtures, from a member``."""
        told = f"{self.steps} steps of refining{' on mixtures' * bool(self.mixtures)}"
        return told if self.start == "fused" else f"{told}, from a member"


REFINING = (  # what validation families choose from
    # 25 steps are as good on a merger's own sizes, and not on narrower ones
    *(Way(steps, fill) for fill in (0, FILL) for steps in (0, 100, 200, 400)),
    *(Way(*told, "member") for told in ((100, 0), (100, FILL), (400, FILL))),
)
LONG = Way(1000, 0)  # is tried where the most steps on nothing but probes are as good as fewer
ENOUGH = 5e-4  # accuracy below the best that fewer steps may have
WORTH = 1e-3  # accuracy that members, and mixtures and many steps, which take long, have to add
STRANGE = 0.85  # of what its validation families tell apart is too little for a merger's probes
SHOWN = 500  # inputs, at most, that are tried beside the probes
HARM = 5e-3  # accuracy that they have to cost to be left out: networks at hand may need them more
GATED = 12  # families per size that gates are run on


def finish(
    record: Mapping[str, Any],
    goal: Goal,
    console: Console,
    data: Data,
    best: Outcome,
    tracked: Run,
) -> None:
    """Choose steps of refining, run the gates, write and log card and files of the best merger.

    Args:
        record: Options of the training.
        goal: What families are judged by.
        console: Where to print.
        data: Zoos and families.
        best: The best merger.
        tracked: The run of the training.

    Raises:
        MetaMergeError: If a gate is broken; the files are written all the same, with the gates in
            the card.
    """
    merger = best.merger
    merger.load_state_dict(best.weights)
    merger.eval()
    refined = try_refining(merger, data.validation, goal, REFINING)
    if promising(refined):
        refined |= try_refining(merger, data.validation, goal, (LONG,))
    least = familiarity(merger, data.validation)
    merger.config = replace(merger.config, familiar=least)
    way, gates = settle(merger, refined, data.validation)
    accuracy = float(refined[way].mean())
    joined = float(try_inputs(merger, data, goal).mean())
    useful = joined > accuracy - HARM
    merger.config = replace(merger.config, inputs=useful)
    card = {
        "options": dict(record),
        "zoos": [
            {"digest": zoo.digest, "options": zoo.options, "task": zoo.manifest["task"]}
            for zoo in data.zoos
        ],
        "validation": best.scores,
        "refining": [
            {**one._asdict(), "accuracy": float(each.mean())} for one, each in refined.items()
        ],
        "inputs": {"accuracy": joined, "useful": useful},
        "familiar": least,
        "step": best.step,
        "stopped_at_target": best.stopped,
        "seconds": round(best.seconds, 1),
        "run": best.run,
        "history": best.history,
        "gates": {k: [gate.record for gate in found] for k, found in gates.items()},
    }
    folder = save_merger(merger.cpu(), record["out"], card)
    tracked.text(json.dumps(card, indent=1), "card.json")
    tracked.metrics({"refined_accuracy": accuracy, "best_step": best.step})
    tracked.metrics({f"gates/{k}/{g.name}": g.value for k, own in gates.items() for g in own})
    failed = [
        f"{k} {g.name} = {g.value:.3g} > {g.limit:.3g}"
        for k, f in gates.items()
        for g in f
        if not g.passed
    ]
    tracked.merger(folder, registered=None if failed else record.get("registered"))
    share = best.scores["share_above_threshold"]
    console.print(
        f"[bold]merger[/] {folder}: validation accuracy {best.scores['validation_accuracy']:.3f}, "
        f"{accuracy:.3f} after {way}, "
        f"{share:.0%} of families above threshold, {best.seconds:.0f} s"
    )
    if failed:
        raise MetaMergeError(f"{folder} fails the collapse gates: {'; '.join(failed)}.")
    console.print(f"[bold]gates[/] all {sum(map(len, gates.values()))} passed")


@torch.no_grad()
def try_refining(
    merger: Merger, groups: Sequence[Families], goal: Goal, ways: Sequence[Way]
) -> dict[Way, Tensor]:
    """Refine merged validation families in several ways.

    Args:
        merger: The merger.
        groups: Validation families.
        goal: What they are judged by.
        ways: How.

    Returns:
        Way -> accuracy of every family, ``[f]``, in float64.
    """
    found: dict[Way, list[Tensor]] = {way: [] for way in ways}
    for group in groups:
        (wanted, _), layout, probes = judged(group, goal), group.layout, _probes(merger, group)
        spare = merger.probes.spare(probes.shape[1:])
        banks = {fill: filled_up(probes, layout, fill) for fill in {way.mixtures for way in ways}}
        for rows in torch.arange(len(group)).split(max(1, goal.at_once // 4)):  # inputs are many
            members = {k: t[rows.to(t.device)] for k, t in group.weights.items()}
            own = wanted[rows.to(wanted.device)]
            for size in sorted({len(bank) for bank in banks.values()}):  # many are mixed with none
                alike = [way for way in ways if len(banks[way.mixtures]) == size]
                shown = banks[alike[0].mixtures]
                fused, trust = merger(members, layout, shown)
                shown = with_spare(shown, spare)
                answers = answers_of(members, layout, shown)
                starts = {"fused": fused, "member": nearest_members(members, answers, trust)[0]}
                scores = {}
                for steps, start in {(way.steps, way.start) for way in alike}:
                    made, told = starts[start], {"steps": steps, "answers": answers}
                    if steps:
                        made = refine(made, members, layout, shown, trust, **told)
                    scores[steps, start] = score(made, group, own)
                for way in alike:
                    found[way].append(scores[way.steps, way.start])
    return {way: torch.cat(scores).double().cpu() for way, scores in found.items()}


@torch.no_grad()
def try_inputs(merger: Merger, data: Data, goal: Goal) -> Tensor:
    """Merge validation families with inputs of their task beside the probes.

    Args:
        merger: The merger, with its steps of refining.
        data: Families; the first objective images of training are the inputs, without labels.
        goal: What they are judged by.

    Returns:
        Accuracy of every validation family, ``[f]``, in float64.
    """
    scores = []
    for known, group in zip(data.training, data.validation, strict=True):
        wanted, _ = judged(group, goal)
        shown = torch.cat([known.images[0][:SHOWN], _probes(merger, group)])
        spare = merger.probes.spare(shown.shape[1:])
        for rows in torch.arange(len(group)).split(goal.at_once):
            members = {k: t[rows.to(t.device)] for k, t in group.weights.items()}
            watched = Watched(rows, shown, "inputs and probes", spare=spare)
            fused = fuse_on(merger, members, group.layout, watched).weights
            scores.append(score(fused, group, wanted[rows.to(wanted.device)]))
    return torch.cat(scores).double().cpu()


def promising(refined: Mapping[Way, Tensor]) -> bool:
    """Whether many steps on nothing but probes might gain.

    Args:
        refined: What ``try_refining`` found.

    Returns:
        Whether to try ``LONG``: the most steps of ``REFINING`` are better than none, and no worse
        than the best number of them by more than the standard error over families.
    """
    plain = [way for way in REFINING if way[1:] == LONG[1:]]
    none, most = min(plain), max(plain)
    best = max(plain, key=lambda way: float(refined[way].mean()))
    gained, lost = refined[most] - refined[none], refined[best] - refined[most]  # [f], paired
    return bool(gained.mean() > 0 and lost.mean() <= _error(lost))


def chosen(refined: Mapping[Way, Tensor]) -> Way:
    """Choose how to refine: many steps, mixtures and members where these clearly gain.

    A merge takes longer with many steps and with mixtures, and a fused network, which owes
    something to all members, is the start unless a member is better. Gains have to exceed their
    standard error over families (the one-SE rule of Breiman, Friedman, Olshen, Stone,
    "Classification and Regression Trees", 1984).

    Args:
        refined: What ``try_refining`` found.

    Returns:
        The way.
    """
    fused = _better(_plain(refined), _fewest(refined, FILL, "fused"), refined)
    member = _better(*(_fewest(refined, fill, "member") for fill in (0, FILL)), refined)
    return _better(fused, member, refined)


def settle(
    merger: Merger, refined: Mapping[Way, Tensor], groups: Sequence[Families]
) -> tuple[Way, dict[str, list[Gate]]]:
    """Set how a merger refines, and run its gates; what breaks one is not chosen.

    Members go first, then mixtures, then many steps, then refining altogether.

    Args:
        merger: The merger; its configuration is changed.
        refined: What ``try_refining`` found.
        groups: Validation families.

    Returns:
        The way, and the gates of every group.
    """
    few, plain = _fewest(refined, 0, "fused"), _plain(refined)
    mixed = _better(plain, _fewest(refined, FILL, "fused"), refined)
    for way in dict.fromkeys((chosen(refined), mixed, plain, few, REFINING[0])):
        told = {"refine": way.steps, "mixtures": way.mixtures, "start": way.start}
        merger.config = replace(merger.config, **told)
        gates = {group.name: gates_of(merger, group) for group in groups}
        if all(gate.passed for own in gates.values() for gate in own):
            break
    return way, gates


def _better(one: Way, other: Way, refined: Mapping[Way, Tensor]) -> Way:
    """The other where its gain over the first is worth something, and exceeds its error."""
    gain = refined[other] - refined[one]  # [f], paired
    if len(gain) > 1 and gain.mean() > max(WORTH, _error(gain)):
        return other
    return one


def _error(differences: Tensor) -> float:
    """Standard error of a mean over families, ``[f]``; 0 of a single one."""
    return float(differences.std()) / len(differences) ** 0.5 if len(differences) > 1 else 0.0


def _plain(refined: Mapping[Way, Tensor]) -> Way:
    """The best way from fused networks on nothing but probes."""
    few = _fewest(refined, 0, "fused")
    return _better(few, LONG, refined) if LONG in refined else few


def _fewest(refined: Mapping[Way, Tensor], fill: int, start: str) -> Way:
    """The fewest steps of ``REFINING`` that are as good as any."""
    ways = [way for way in REFINING if way[1:] == (fill, start)]
    means = {way: float(refined[way].mean()) for way in ways}
    return min(way for way, mean in means.items() if mean >= max(means.values()) - ENOUGH)


@torch.no_grad()
def familiarity(merger: Merger, groups: Sequence[Families]) -> float:
    """What members have to tell apart among the merger's probes for these not to be strange.

    Args:
        merger: The merger.
        groups: Validation families, which its probes are for.

    Returns:
        Somewhat less than the family of them that tells least apart; 0 if it tells nothing apart.
    """
    least = min(
        float(told_apart(answers_of(group.weights, group.layout, _probes(merger, group))).min())
        for group in groups
    )
    return max(0.0, STRANGE * least)


def _probes(merger: Merger, group: Families) -> Tensor:
    """The merger's probes for the networks of a group."""
    first = {key: tensor[:1] for key, tensor in group.weights.items()}
    return merger.probes.for_members(first, group.layout)


def gates_of(merger: Merger, group: Families) -> list[Gate]:
    """Run the collapse gates on families as they are merged in use.

    Args:
        merger: The merger.
        group: Validation families of one zoo and size.

    Returns:
        The gates.
    """
    classes = group.variants.classes
    return collapse_gates(
        lambda members: fuse(merger, members, group.layout),
        {key: tensor[:GATED] for key, tensor in group.weights.items()},
        group.layout,
        *group.images,
        labels=None if classes is None else classes[:GATED],
    )
