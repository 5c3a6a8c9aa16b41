"""What a comparison leaves behind: rows, paired differences, files and the table."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

MERGER = "gnn"
RIVALS = ("best member", "average, aligned", "soft-vote ensemble", "distilled from best member")


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


def differences(scored: Sequence[Scored]) -> list[dict[str, Any]]:
    """The merger against its rivals, paired over families.

    Args:
        scored: Everything that was scored.

    Returns:
        One row per number of members and rival: mean difference in accuracy and the half width of
        its 95 % interval (normal approximation over families).
    """
    found = {(s.method, s.members): s.accuracies for s in scored}
    rows = []
    for size in sorted({s.members for s in scored}):
        for rival in RIVALS:
            gaps = found[MERGER, size] - found[rival, size]
            half = 1.96 * float(gaps.std(correction=1)) / len(gaps) ** 0.5 if len(gaps) > 1 else 0.0
            rows.append(
                {
                    "members": size,
                    "against": rival,
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
    console: Console, rows: list[dict[str, Any]], meta: dict[str, Any], sizes: Sequence[int]
) -> None:
    """Print the table, the paired differences and the gates.

    Args:
        console: Where to print.
        rows: Rows of the leaderboard.
        meta: What ``leaderboard.meta.json`` holds.
        sizes: Numbers of members, one column each.
    """
    by_method: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        by_method.setdefault(row["method"], {})[row["members"]] = row
    largest = max(sizes)
    order = sorted(
        by_method, key=lambda m: -by_method[m].get(largest, {"accuracy_mean": 0})["accuracy_mean"]
    )
    families = rows[0]["families"]
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
    for method in order:
        own = by_method[method]
        one = next(iter(own.values()))
        style = "italic" if one["control"] else "bold" if method == MERGER else None
        last = own.get(largest)
        worst, seconds = (
            (f"{100 * last['accuracy_worst']:.1f}", f"{last['seconds']:.2f}") if last else ("", "")
        )
        cells = [_cell(own.get(size)) for size in sizes]
        table.add_row(method, one["data"], *cells, worst, seconds, style=style)
    console.print(table)
    for entry in meta["differences"]:
        console.print(
            f"K={entry['members']}: {MERGER} minus {entry['against']}: "
            f"{100 * entry['difference']:+.1f} ± {100 * entry['half_width']:.1f} points"
        )
    failed = [
        f"{k} {g['name']}" for k, gates in meta["gates"].items() for g in gates if not g["passed"]
    ]
    recall = ", ".join(f"{k} {v:.0%}" for k, v in meta["forgotten_class_recall"].items())
    console.print(f"recall of a class that all members were made to forget: {recall}")
    console.print(f"[bold]gates[/] {'FAILED: ' + ', '.join(failed) if failed else 'all passed'}")


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{100 * row['accuracy_mean']:.1f} ± {100 * row['accuracy_std']:.1f}"
