"""What a comparison leaves behind: rows, paired differences, files and the table."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

RIVALS = (
    *("soft-vote ensemble", "average, aligned", "best member", "best member, fine-tuned"),
    *("distilled from best member", "distilled from aligned average", "trained from scratch"),
)


@dataclass(frozen=True)
class Scored:
    """One way of getting predictions, scored on all test families of one size."""

    method: str
    members: int
    data: str
    accuracies: Tensor  # [f]
    seconds: float
    parameters: int
    control: bool

    @property
    def label(self) -> str:
        """Method and images, which are one row of a table."""
        return self.method if self.data in ("none", "segments") else f"{self.method}, {self.data}"

    def record(self) -> dict[str, Any]:
        """What a ledger keeps, accuracies of all families included."""
        return {**vars(self), "accuracies": self.accuracies.tolist()}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Scored":
        """What ``record`` gave, read again."""
        return cls(**{**record, "accuracies": torch.tensor(record["accuracies"])})

    def row(self) -> dict[str, Any]:
        """The row of ``leaderboard.json``."""
        spread = (
            self.accuracies.std(correction=1) if len(self.accuracies) > 1 else torch.tensor(0.0)
        )
        return {
            "method": self.method,
            "members": self.members,
            "data": self.data,
            "accuracy_mean": round(float(self.accuracies.mean()), 6),
            "accuracy_std": round(float(spread), 6),
            "accuracy_worst": round(float(self.accuracies.min()), 6),
            "families": len(self.accuracies),
            "seconds": round(self.seconds, 6),
            "parameters": self.parameters,
            "control": self.control,
        }


def differences(scored: Sequence[Scored], mergers: Sequence[str]) -> list[dict[str, Any]]:
    """Mergers against their rivals, paired over families.

    With nothing but weights a merger is held against all of them; with images against those that
    got none or as many.

    Args:
        scored: Everything that was scored.
        mergers: Names of the mergers.

    Returns:
        One row per number of members, merger's row and rival: mean difference in accuracy and the
        half width of its 95 % interval (normal approximation over families).
    """
    rows = []
    for own in scored:
        if own.method.partition(", ")[0] not in mergers or own.control:
            continue
        for rival in scored:
            fair = own.data == "none" or rival.data in ("none", own.data)
            if rival.method not in RIVALS or rival.members != own.members or not fair:
                continue
            gaps = own.accuracies - rival.accuracies
            half = 1.96 * float(gaps.std(correction=1)) / len(gaps) ** 0.5 if len(gaps) > 1 else 0.0
            rows.append(
                {
                    "members": own.members,
                    "merger": own.label,
                    "against": rival.label,
                    "difference": float(gaps.mean()),
                    "half_width": half,
                }
            )
    return rows


def write_leaderboard(out: Path, rows: list[dict[str, Any]], meta: dict[str, Any]) -> None:
    """Write ``leaderboard.json`` and ``leaderboard.meta.json``, each whole or not at all.

    Args:
        out: Folder, made if missing.
        rows: Rows of the leaderboard.
        meta: Task, split, seeds, merger, gates.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name, content in (("leaderboard.json", rows), ("leaderboard.meta.json", meta)):
        partial = out / f".{name}.partial"
        partial.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(partial, out / name)


def print_leaderboard(
    console: Console, scored: Sequence[Scored], meta: dict[str, Any], sizes: Sequence[int]
) -> None:
    """Print the table, the paired differences and the gates.

    Args:
        console: Where to print.
        scored: Everything that was scored.
        meta: What ``leaderboard.meta.json`` holds.
        sizes: Numbers of members, one column each.
    """
    by_label: dict[str, dict[int, Scored]] = {}
    for one in scored:
        by_label.setdefault(one.label, {})[one.members] = one
    largest, families = max(sizes), len(scored[0].accuracies)
    table = Table(
        title=f"{meta['task']['name']}: test accuracy in %, mean ± std over {families} families",
        caption=f"Controls in italics; images: needed at merge time; worst and s: at K={largest}.",
    )
    table.add_column("method", no_wrap=True)
    table.add_column("images", no_wrap=True)
    for size in sizes:
        table.add_column(f"K={size}", justify="right", no_wrap=True)
    table.add_column("worst", justify="right", no_wrap=True)
    table.add_column("s", justify="right", no_wrap=True)
    order = sorted(by_label.values(), key=lambda own: -_mean(own.get(largest)))
    for own in order:
        one, last = next(iter(own.values())), own.get(largest)
        style = "italic" if one.control else "bold" if one.method in meta["mergers"] else None
        ends = ("", "")
        if last:
            ends = (f"{100 * float(last.accuracies.min()):.1f}", f"{last.seconds:.2f}")
        cells = [_cell(own.get(size)) for size in sizes]
        table.add_row(one.method, one.data, *cells, *ends, style=style)
    console.print(table)
    for entry in meta["differences"]:
        if entry["merger"] in meta["mergers"]:  # the others stand in the meta file
            console.print(
                f"K={entry['members']}: {entry['merger']} minus {entry['against']}: "
                f"{100 * entry['difference']:+.1f} ± {100 * entry['half_width']:.1f} points",
                emoji=False,  # labelled:100: is none
            )
    for name, told in meta["mergers"].items():
        _print_gates(console, name, told)


def _print_gates(console: Console, name: str, told: dict[str, Any]) -> None:
    """What is known of one merger beside its accuracy."""
    if told["foreign"]:
        console.print(f"{name} never saw this task")
    recall = ", ".join(f"{k} {v:.0%}" for k, v in told["forgotten_class_recall"].items())
    if recall:
        console.print(f"{name}: recall of a class that all members were made to forget: {recall}")
    near = ", ".join(f"{k} {v['nearest']:.2f}" for k, v in told["nearest_training"].items() if v)
    if near:
        console.print(f"{name}: smallest relative distance to a network of its zoo: {near}")
    gates = [(k, gate) for k, own in told["gates"].items() for gate in own]
    failed = [f"{k} {gate['name']}" for k, gate in gates if not gate["passed"]]
    outcome = f"FAILED: {', '.join(failed)}" if failed else "all passed"
    said = outcome if gates else "not run: one family cannot be compared with another"
    console.print(f"[bold]gates[/] {name}: {said}", highlight=False)


def _mean(scored: Scored | None) -> float:
    return float(scored.accuracies.mean()) if scored else 0.0


def _cell(scored: Scored | None) -> str:
    if scored is None:
        return ""
    row = scored.row()
    return f"{100 * row['accuracy_mean']:.1f} ± {100 * row['accuracy_std']:.1f}"
