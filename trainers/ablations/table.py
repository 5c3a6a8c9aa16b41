"""What every part earns: differences to the whole merger, as a table, as JSON and as a picture."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from trainers.ablations.cases import CASES
from trainers.ablations.judging import USES
from trainers.ablations.settings import SETTINGS
from zoo.style import COLOURS, INK, MARKERS, SMALL, new_figure, tidy

WHOLE = ["", "whole merger"]
USUAL = "usual"  # refined or not, whatever was better on a seed's validation families
COLUMNS = {  # of the tables: title -> part of the zoo and use
    "validation": ("validation", USUAL),
    "test": ("test", USUAL),
    "one pass": ("test", "at once"),
    "a garbage member": ("test", "garbage"),
    "half the members": ("test", "fewer"),
    "calibrated": ("test", "inputs"),
}
TICKS = (-20, -10, -5, -2, -1, -0.5, 0, 0.5, 1, 2)

Row = Mapping[str, Any]


def differences(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every case against the whole merger, paired over families and seeds.

    Args:
        rows: Rows of mergers: ``setting``, ``case``, ``seed``, and accuracies by family for every
            part of the zoo and use.

    Returns:
        One entry per setting, case, part and use, of seeds that both have: mean accuracy of the
        case, mean difference to the whole merger, half the width of its 95 % interval, and whether
        all seeds agree on the sign.
    """
    found = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        by_case: dict[tuple[str, ...], dict[int, Row]] = {}
        for row in rows:
            if row["setting"] == setting:
                by_case.setdefault(tuple(row["case"]), {})[row["seed"]] = row
        whole = by_case.get(tuple(WHOLE), {})
        for case, own in by_case.items():
            seeds = sorted(own.keys() & whole.keys())
            for part, use in COLUMNS.values() if seeds else ():
                mine, theirs = (
                    torch.tensor([_accuracies(of[seed], part, use) for seed in seeds])
                    for of in (own, whole)
                )
                found.append(
                    {
                        "setting": setting,
                        "case": list(case),
                        "part": part,
                        "use": use,
                        "accuracy": float(mine.mean()),
                        "seeds": len(seeds),
                        "families": mine.shape[1],
                        **interval(mine - theirs),
                    }
                )
    return found


def _accuracies(row: Row, part: str, use: str) -> list[float]:
    """Accuracy of every family; the usual use is chosen as ``trainers/merger.py`` chooses it."""
    if use == USUAL:
        known = row["validation"]
        use = max(("at once", "refined"), key=lambda name: sum(known[name]))
    return row[part][use]


def interval(gaps: Tensor) -> dict[str, Any]:
    """Mean of paired differences and how sure it is, other families and other seeds being drawn.

    Args:
        gaps: ``[s, f]``, seeds by families.

    Returns:
        ``difference``, ``half_width`` of its 95 % interval (normal approximation; the variances of
        the means over families and over seeds are added), and whether seeds ``agree`` on the sign.
    """
    variance = 0.0
    for means in (gaps.mean(0), gaps.mean(1)):
        if len(means) > 1:
            variance += float(means.var()) / len(means)
    signs = gaps.mean(1).sign()
    return {
        "difference": float(gaps.mean()),
        "half_width": 1.96 * variance**0.5,
        "agree": bool((signs == signs[0]).all() and signs[0] != 0),
    }


def write_table(out: Path, rows: Sequence[Row], console: Console) -> dict[str, Any]:
    """Print the tables, write ``ablations.json``, ``ablations.md`` and ``ablations.png``.

    Args:
        out: Folder, made if missing.
        rows: Rows of mergers.
        console: Where to print.

    Returns:
        What ``ablations.json`` holds.
    """
    entries = differences(rows)
    content = {
        "settings": {name: SETTINGS[name].title for name in SETTINGS},
        "uses": {USUAL: "whichever of the next two is better on validation families", **USES},
        "differences": entries,
        "seconds": sum(row["seconds"] for row in rows),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("ablations.json", json.dumps(content, indent=1) + "\n"),
        ("ablations.md", markdown(entries)),
    ):
        partial = out / f".{name}.partial"
        partial.write_text(text)
        os.replace(partial, out / name)
    ablations_figure(entries).savefig(out / "ablations.png", dpi=150)
    for setting, lines in _lines(entries).items():
        table = Table(title=SETTINGS[setting].title)
        for title in ("part", "change", *COLUMNS):
            table.add_column(title)
        for line in lines:
            table.add_row(*line)
        console.print(table)
    console.print(f"[bold]ablations[/] {out}/ablations.json, ablations.md, ablations.png")
    return content


def markdown(entries: Sequence[Row]) -> str:
    """The tables in Markdown, one per setting.

    Args:
        entries: What ``differences`` returned.

    Returns:
        Text that ends in a line break.
    """
    parts = []
    for setting, lines in _lines(entries).items():
        own = [e for e in entries if e["setting"] == setting]
        seeds = max(e["seeds"] for e in own)
        count = {e["part"]: e["families"] for e in own}
        parts += [
            f"{SETTINGS[setting].title}; {count['validation']} validation and {count['test']} test "
            f"families, seeds: {seeds}:",
            "",
        ]
        parts += [f"| part | change | {' | '.join(COLUMNS)} |", f"|---|---|{'---|' * len(COLUMNS)}"]
        parts += [f"| {' | '.join(line)} |" for line in lines]
        parts.append("")
    return "\n".join(parts)


def _lines(entries: Sequence[Row]) -> dict[str, list[list[str]]]:
    """Setting -> lines of its table: accuracies of the whole merger, differences of the others."""
    lines: dict[str, list[list[str]]] = {}
    most: dict[str, int] = {}
    for entry in entries:
        most[entry["setting"]] = max(most.get(entry["setting"], 0), entry["seeds"])
    for setting, case, own in _grouped(entries):
        shown = [own[column] for column in COLUMNS.values()]
        if case == WHOLE:
            cells = [f"{100 * entry['accuracy']:.1f}" for entry in shown]
        else:
            cells = [_cell(entry) for entry in shown]
        seeds = shown[0]["seeds"]
        fewer = f" (seeds: {seeds})" if seeds < most[setting] else ""
        lines.setdefault(setting, []).append([case[0], case[1] + fewer, *cells])
    return lines


def _grouped(entries: Sequence[Row]) -> list[tuple[str, list[str], dict[tuple[str, str], Row]]]:
    """Setting, case, and its entries by part and use, in the order of ``CASES``."""
    grouped: dict[tuple[str, ...], dict[tuple[str, str], Row]] = {}
    for entry in entries:
        key = (entry["setting"], *entry["case"])
        grouped.setdefault(key, {})[entry["part"], entry["use"]] = entry
    order = [[case.part, case.name] for case in CASES]
    keys = sorted(grouped, key=lambda key: (list(SETTINGS).index(key[0]), order.index([*key[1:]])))
    return [(key[0], [*key[1:]], grouped[key]) for key in keys]


def _cell(entry: Row) -> str:
    """A difference in points; bold where its interval is on one side of 0 and all seeds agree."""
    text = f"{100 * entry['difference']:+.1f} ± {100 * entry['half_width']:.1f}"
    return f"**{text}**" if beyond_chance(entry) else text


def beyond_chance(entry: Row) -> bool:
    """Whether a difference is one: its interval does not hold 0, and all seeds agree on its sign.

    Args:
        entry: One of ``differences``.

    Returns:
        Whether it is.
    """
    return entry["agree"] and abs(entry["difference"]) > entry["half_width"]


def ablations_figure(entries: Sequence[Row]) -> Figure:
    """A line per case, a dot with its interval per setting: differences on test families.

    Args:
        entries: What ``differences`` returned.

    Returns:
        The figure.
    """
    grouped = [one for one in _grouped(entries) if one[1] != WHOLE]
    cases = [c for c in ([c.part, c.name] for c in CASES) if any(g[1] == c for g in grouped)]
    figure = new_figure(8, 0.27 * len(cases) + 1.7)
    axes = figure.subplots()
    settings = list(dict.fromkeys(one[0] for one in grouped))
    for place, setting in enumerate(settings):
        own = [(case, by[COLUMNS["test"]]) for name, case, by in grouped if name == setting]
        axes.errorbar(
            [100 * entry["difference"] for _, entry in own],
            [cases.index(case) + 0.25 * (place - (len(settings) - 1) / 2) for case, _ in own],
            xerr=[100 * entry["half_width"] for _, entry in own],
            fmt=MARKERS[place],
            markersize=4,
            linewidth=1,
            color=COLOURS[place],
            label=SETTINGS[setting].title,
        )
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_xscale("symlog", linthresh=1)  # most differences are small, a few are large
    axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axes.set_xticks([], minor=True)
    axes.set_yticks(range(len(cases)), [f"{part}: {name}" for part, name in cases])
    axes.set_ylim(len(cases) - 0.3, -0.7)
    tidy(axes, x="difference to the whole merger in points of test accuracy, 95 % interval")
    figure.legend(fontsize=SMALL, frameon=False, loc="outside lower center")
    return figure
