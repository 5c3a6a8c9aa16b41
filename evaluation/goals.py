"""What a comparison was to show, and whether it did."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evaluation.scored import Scored

SOFT_VOTE = "soft-vote ensemble"
OWN = "itself"
NATIVE = "merger trained on such networks"


@dataclass(frozen=True)
class Goal:
    """One figure that is to be reached by every merger of a row.

    Attributes:
        over: Accuracy, or the method that the merger is held against, on the same families; OWN is
            the merger itself with what ``over_data`` says, NATIVE the one that was trained on
            networks like those that are judged.
        by: Accuracy that it must have beyond that; below 0, what it may lack.
        row: What is said behind the merger's name: ``calibrated``, ``adapted`` or nothing.
        data: ``none``, or kind and number of images, such as ``unlabelled:500``; a kind alone
            stands for all objective images.
        members: Members per family; 0 for families of all sizes together.
        share: Share of families on which it must be above; 0 looks at the mean of all.
        over_data: What the rival was given; by default what the merger was, or nothing.
    """

    over: float | str
    by: float = 0.0
    row: str = ""
    data: str = "none"
    members: int = 0
    share: float = 0.0
    over_data: str = ""

    @property
    def text(self) -> str:
        """What is to be reached, in words."""
        rival = f"{100 * self.over:.1f}" if isinstance(self.over, float) else self.over
        rival += f" ({self.over_data})" if self.over_data else ""
        distance = f" {'+' if self.by > 0 else '-'} {100 * abs(self.by):.1f}" if self.by else ""
        return f"{rival}{distance}" + (f" on {self.share:.0%} of families" if self.share else "")


def outcomes(
    goals: Sequence[Goal], scored: Sequence[Scored], mergers: Sequence[str]
) -> list[dict[str, Any]]:
    """Look up what was reached.

    Args:
        goals: What was to be reached.
        scored: All rows of all comparisons, for any numbers of members.
        mergers: Names of the mergers.

    Returns:
        One line per goal and merger: ``members``, ``data``, ``merger``, ``accuracy``, ``ensemble``,
        ``best_control`` (the best single network that was given as much) with its ``control``
        accuracy, ``families``, ``target`` and ``reached``; None where a row is missing.
    """
    return [_outcome(goal, scored, name) for goal in goals for name in mergers]


def _outcome(goal: Goal, scored: Sequence[Scored], merger: str) -> dict[str, Any]:
    rows = [one for one in scored if not goal.members or one.members == goal.members]
    method = f"{merger}, {goal.row}" if goal.row else merger
    data = _data(goal.data, rows, method)
    own = _joined(rows, lambda s: s.method == method and s.data == data)
    rivals = {
        s.method
        for s in rows
        if s.control and s.data in ("none", data) and "ensemble" not in s.method
    }
    found = {
        name: _joined(rows, lambda s, name=name: s.method == name and s.data in ("none", data))
        for name in rivals
    }
    controls = {name: float(t.mean()) for name, t in found.items() if t is not None}
    best = max(controls, key=controls.__getitem__, default=None)
    ensemble = _joined(rows, lambda s: s.method == SOFT_VOTE)
    return {
        "members": goal.members,
        "data": data,
        "merger": method,
        "accuracy": None if own is None else float(own.mean()),
        "families": 0 if own is None else len(own),
        "ensemble": None if ensemble is None else float(ensemble.mean()),
        "best_control": best,
        "control": controls.get(best) if best else None,
        "target": goal.text,
        "reached": _reached(goal, own, _rival(goal, rows, data, merger)),
    }


def _rival(goal: Goal, rows: Sequence[Scored], data: str, merger: str) -> Tensor | None:
    """Accuracies of what the merger is held against."""
    if isinstance(goal.over, float):
        return torch.tensor(goal.over)
    method = merger if goal.over == OWN else goal.over
    given = _data(goal.over_data, rows, method)
    allowed = (given,) if given else ("none", data)
    return _joined(rows, lambda s: s.method == method and s.data in allowed)


def _reached(goal: Goal, own: Tensor | None, rival: Tensor | None) -> bool | None:
    if own is None or rival is None:
        return None
    if goal.share:
        return float((own > rival + goal.by).double().mean()) >= goal.share
    return float((own - rival).double().mean()) >= goal.by


def _data(wanted: str, rows: Sequence[Scored], method: str) -> str:
    """A kind of images alone stands for the most that the method was given."""
    if wanted not in ("unlabelled", "labelled"):
        return wanted
    given = [s.data for s in rows if s.method == method and s.data.startswith(f"{wanted}:")]
    return max(given, key=lambda data: int(data.partition(":")[2]), default=wanted)


def _joined(rows: Sequence[Scored], chosen: Callable[[Scored], bool]) -> Tensor | None:
    """Accuracies of the families of all rows that are chosen, one behind the other."""
    found = [s.accuracies for s in rows if chosen(s)]
    return torch.cat(found) if found else None
