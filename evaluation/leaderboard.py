"""What a comparison prints and writes: the table, ``leaderboard.json`` and its meta file."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from evaluation.scored import Scored
from evaluation.significance import BEST, Difference, against_reference, find_reference


@dataclass(frozen=True)
class Line:
    """A row and what it has beyond the reference row of its number of members."""

    scored: Scored
    difference: Difference

    def record(self) -> dict[str, Any]:
        """The row of ``leaderboard.json``."""
        return {**self.scored.row(), **self.difference.record()}


def ranked(scored: Sequence[Scored], reference: str) -> list[Line]:
    """Rows with their differences, best first.

    Args:
        scored: Everything that was scored.
        reference: Name of the row that others of its number of members are held against. Where
            that row could not be made it is the best merge; each difference says against what.

    Returns:
        One line per row.
    """
    lines: list[Line] = []
    for size in dict.fromkeys(one.members for one in scored):
        own = [one for one in scored if one.members == size]
        made = {name for one in own for name in (one.method, one.label)}
        chosen = find_reference(own, reference if reference in made else BEST)
        lines += map(Line, own, against_reference(own, chosen))
    return sorted(lines, key=lambda line: -float(line.scored.accuracies.mean()))


def write_leaderboard(
    out: Path, rows: Sequence[Mapping[str, Any]], meta: Mapping[str, Any]
) -> None:
    """Write ``leaderboard.json`` and ``leaderboard.meta.json``, each whole or not at all.

    Args:
        out: Folder, made if missing.
        rows: Rows of the leaderboard, such as those of ``Line.record``.
        meta: Task, split, seeds, merger, gates.
    """
    for name, content in (("leaderboard.json", rows), ("leaderboard.meta.json", meta)):
        write_whole(out / name, json.dumps(content, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Args:
        path: The file; its folder is made if missing.
        text: What it is to hold.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def by_label(lines: Sequence[Line]) -> list[dict[int, Line]]:
    """Rows of a table: number of members -> line, for every method and images; best first.

    Args:
        lines: All lines.

    Returns:
        One entry per row; they stand in the order of their accuracy at the largest number of
        members.
    """
    largest = max(line.scored.members for line in lines)
    rows: dict[str, dict[int, Line]] = {}
    for line in lines:
        rows.setdefault(line.scored.label, {})[line.scored.members] = line

    def standing(row: Mapping[int, Line]) -> float:
        return float(row[largest].scored.accuracies.mean()) if largest in row else 0.0

    return sorted(rows.values(), key=standing, reverse=True)


def print_leaderboard(console: Console, lines: Sequence[Line], meta: Mapping[str, Any]) -> None:
    """Print the table, what failed, and what is known of the mergers.

    Args:
        console: Where to print.
        lines: Everything that was scored, with its differences.
        meta: What ``leaderboard.meta.json`` holds.
    """
    sizes = sorted({line.scored.members for line in lines})
    largest, seeds = sizes[-1], max(len(line.scored.by_seed) for line in lines)
    families = len(lines[0].scored.accuracies)
    against = next(li.difference.against for li in lines if li.scored.members == largest)
    shown = f"test accuracy in %, mean ± std over {families} families"
    repeated = f"; seeds: std over {seeds} seeds" if seeds else ""
    table = Table(
        title=f"{meta['task']['name']}: {shown if families > 1 else 'test accuracy in %'}",
        caption=f"Controls in italics. images: needed at merge time. At K={largest}: worst family, "
        f"s: seconds per family, points beyond '{against}' with their 95 % interval (* p < "
        f"0.05, Holm){repeated}.",
    )
    table.add_column("method", overflow="fold", min_width=24)
    table.add_column("images", no_wrap=True)
    for size in sizes:
        table.add_column(f"K={size}", justify="right", no_wrap=True)
    titles = ["worst"] * (families > 1) + ["s"] + ["seeds"] * (seeds > 0) + [f"beyond {against}"]
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for row in by_label(lines):
        one = next(iter(row.values())).scored
        style = "italic" if one.control else "bold" if one.method in meta["mergers"] else None
        cells = [accuracy_text(row.get(size)) for size in sizes]
        ends = _ends(row[largest]) if largest in row else {}
        ends = [ends.get(title.partition(" ")[0], "") for title in titles]
        table.add_row(Text(one.method), one.data, *cells, *ends, style=style)
    console.print(table)
    for told in meta["failed"]:
        where = f"{told['method']} (K={told['members']}, {told['data']})"
        console.print(f"[red]{escape(where)}[/]: {escape(told['error'])}", highlight=False)
    for note in meta["notes"]:
        console.print(f"[bold]note[/] {escape(note)}", highlight=False)
    for name, told in meta["mergers"].items():
        for line in about_merger(name, told):
            console.print(line, highlight=False, markup=False)


def about_merger(name: str, told: Mapping[str, Any]) -> list[str]:
    """What is known of one merger beside its accuracy, a sentence a line.

    Args:
        name: Its name.
        told: Its entry in ``leaderboard.meta.json``.

    Returns:
        The lines; the last says which gates failed.
    """
    lines = [f"{name} never saw this task"] if told["foreign"] else []
    recall = ", ".join(f"{k} {v:.0%}" for k, v in told["forgotten_class_recall"].items())
    if recall:
        lines.append(f"{name}: recall of a class that all members were made to forget: {recall}")
    near = ", ".join(f"{k} {v['nearest']:.2f}" for k, v in told["nearest_training"].items() if v)
    if near:
        lines.append(f"{name}: smallest relative distance to a network of its zoo: {near}")
    gates = [(k, gate) for k, own in told["gates"].items() for gate in own]
    failed = [f"{k} {gate['name']}" for k, gate in gates if not gate["passed"]]
    outcome = f"FAILED: {', '.join(failed)}" if failed else "all passed"
    said = outcome if gates else "not run: one family cannot be compared with another"
    return [*lines, f"gates {name}: {said}"]


def accuracy_text(line: Line | None) -> str:
    """Accuracy in per cent, with its spread over families where there are several; or nothing."""
    if line is None:
        return ""
    row = line.scored.row()
    mean, spread = 100 * row["accuracy_mean"], 100 * row["accuracy_std"]
    return f"{mean:.1f} ± {spread:.1f}" if row["families"] > 1 else f"{mean:.1f}"


def _ends(line: Line) -> dict[str, str]:
    """The last columns of the table, by the first word of their titles."""
    row = line.scored.row()
    return {
        "worst": f"{100 * row['accuracy_worst']:.1f}",
        "s": f"{row['seconds']:.2f}",
        "seeds": f"{100 * row['accuracy_seed_std']:.1f}" if row["seeds"] > 1 else "",
        "beyond": beyond(line.difference),
    }


def beyond(difference: Difference) -> str:
    """A difference in points, with its interval and its star.

    Args:
        difference: To the reference.

    Returns:
        Such as ``-6.1 [-7.4, -4.7] *``; nothing for the reference itself.
    """
    if difference.low is None or difference.high is None:
        return f"{100 * difference.mean:+.1f}"
    if difference.p is None:
        return ""
    low, high = 100 * difference.low, 100 * difference.high
    star = " *" if difference.significant else "  "
    return f"{100 * difference.mean:+.1f} [{low:+.1f}, {high:+.1f}]{star}"
