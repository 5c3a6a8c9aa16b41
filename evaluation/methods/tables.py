"""What the table of all methods leaves behind: the terminal's tables, files and pictures."""

import csv
import json
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from evaluation.leaderboard import write_whole
from evaluation.pictures import leaderboard_figure

STARTS = {"own": "inits of their own", "common": "fine-tuned from a common base"}
COLUMNS = (
    *("setting", "start", "method", "members", "data", "accuracy_mean", "accuracy_std"),
    *("accuracy_worst", "families", "seconds", "parameters", "control", "error"),
)

Row = Mapping[str, Any]


def print_tables(console: Console, rows: Sequence[Row], titles: Mapping[str, str]) -> None:
    """Print a table per start: a line per method and data, a column per setting.

    Args:
        console: Where to print.
        rows: All rows.
        titles: Setting -> what it is.
    """
    for start, told in STARTS.items():
        own = [row for row in rows if row["start"] == start]
        if not own:
            continue
        settings = [name for name in titles if any(row["setting"] == name for row in own)]
        table = Table(
            title=f"Members with {told}" if start == "own" else f"Members {told}",
            caption="test accuracy in %, mean ± std over families; controls in italics; "
            "s: seconds per merge, summed over settings",
        )
        table.add_column("method")
        table.add_column("images", no_wrap=True)
        for name in settings:
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("s", justify="right", no_wrap=True)
        for (method, data), found in _lines(own):
            cells = [_cell(found.get(name)) for name in settings]
            seconds = sum(row.get("seconds", 0.0) for row in found.values())
            style = "italic" if next(iter(found.values()))["control"] else None
            table.add_row(method, data, *cells, f"{seconds:.1f}", style=style)
        console.print(table)
    for name, title in titles.items():
        members = next((r["members"] for r in rows if r["setting"] == name and "members" in r), 0)
        console.print(f"{name}: {title}, K={members}", highlight=False)
    for row in rows:
        if "error" in row:
            place = f"{row['setting']}, {row['start']}, {row['data']}"
            console.print(f"[red]{row['method']}[/] ({place}): {row['error']}", highlight=False)


def _lines(rows: Sequence[Row]) -> list[tuple[tuple[str, str], dict[str, Row]]]:
    """Method and data -> setting -> row, best first."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["method"], row["data"]), {})[row["setting"]] = row
    return sorted(found.items(), key=lambda item: -_standing(item[1], rows))


def _standing(found: Mapping[str, Row], rows: Sequence[Row]) -> float:
    """Mean over settings of the accuracy, relative to the best of each setting."""
    best: dict[str, float] = {}
    for row in rows:
        reached = row.get("accuracy_mean", 0.0)
        best[row["setting"]] = max(best.get(row["setting"], 1e-9), reached)
    shares = [row.get("accuracy_mean", 0.0) / best[name] for name, row in found.items()]
    return sum(shares) / len(shares)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if "accuracy_mean" not in row:
        return "error"
    mean, spread = 100 * row["accuracy_mean"], 100 * row["accuracy_std"]
    return f"{mean:.2f}" if row["families"] == 1 else f"{mean:.1f} ± {spread:.1f}"


def write_tables(out: Path, name: str, rows: Sequence[Row], titles: Mapping[str, str]) -> None:
    """Write ``<name>.json``, ``.csv`` and ``.md``, and a picture per setting and start.

    Args:
        out: Folder, made if missing.
        name: What files are called.
        rows: All rows.
        titles: Setting -> what it is.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / f"{name}.json", json.dumps(list(rows), indent=1) + "\n")
    lines = StringIO()
    writer = csv.DictWriter(lines, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(out / f"{name}.csv", lines.getvalue())
    write_whole(out / f"{name}.md", markdown(rows, titles))
    for setting, start in dict.fromkeys((row["setting"], row["start"]) for row in rows):
        own = [r for r in rows if (r["setting"], r["start"]) == (setting, start)]
        title = f"{titles[setting]}\n{STARTS[start]}"
        figure = leaderboard_figure([r for r in own if "accuracy_mean" in r], title=title)
        figure.savefig(out / f"{name}-{setting}-{start}.png", dpi=130)


def markdown(rows: Sequence[Row], titles: Mapping[str, str]) -> str:
    """The tables of ``print_tables`` in Markdown.

    Args:
        rows: All rows.
        titles: Setting -> what it is.

    Returns:
        Text that ends in a line break.
    """
    parts = []
    for start, told in STARTS.items():
        own = [row for row in rows if row["start"] == start]
        settings = [name for name in titles if any(row["setting"] == name for row in own)]
        if not own:
            continue
        parts += [f"## Members: {told}", ""]
        parts += [f"| method | images | {' | '.join(settings)} |"]
        parts += ["|---|---|" + "---|" * len(settings)]
        for (method, data), found in _lines(own):
            shown = f"*{method}*" if next(iter(found.values()))["control"] else method
            cells = " | ".join(_cell(found.get(name)) for name in settings)
            parts.append(f"| {shown} | {data} | {cells} |")
        parts.append("")
    parts += ["Test accuracy in %, mean ± standard deviation over families; *controls* in italics."]
    parts += [f"- {name}: {title}" for name, title in titles.items()]
    return "\n".join(parts) + "\n"
