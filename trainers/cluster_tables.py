"""Tables of a grid of cells: every cell, and every rule at the learning rate chosen for it."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

GROUP = ("task", "hidden", "clustering", "rule")
CELL = (*GROUP, "lr")
_STUDENT = 1.98  # 97.5 % of Student's t for a hundred runs; 2.09 for twenty


def summary(row: dict[str, Any]) -> dict[str, Any]:
    """Mean and standard deviation over runs of what a cell holds per run.

    Args:
        row: A finished cell.

    Returns:
        One flat row of the table.
    """
    about = {name: row[name] for name in (*CELL, "members")}
    return {
        **about,
        "validation": _mean(row["best_validation"]),
        **{
            f"{name}_{what}": value
            for name, runs in row["scores"].items()
            for what, value in (("mean", _mean(runs)), ("std", _deviation(runs)))
        },
        "epoch": _mean(row["best_epoch"]),
        "diverged": row["diverged"],
        "agreement": _mean(row["agreement"]),
    }


def chosen(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every rule the learning rate with the smallest mean loss on validation rows.

    Args:
        rows: Finished cells.

    Returns:
        Some of them, in their order.
    """
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        group = tuple(row[name] for name in GROUP)
        if group not in best or _mean(row["best_validation"]) < _mean(
            best[group]["best_validation"]
        ):
            best[group] = row
    return list(best.values())


def paired(
    row: dict[str, Any], other: dict[str, Any], score: str, ratio: float
) -> dict[str, float]:
    """Difference of two cells, run by run: they share splits, inits and the order of rows.

    Runs share rows as well, so that the plain interval speaks of these data only. The wide one
    follows Nadeau and Bengio, "Inference for the Generalization Error", Machine Learning 52, 2003:
    what other data of this kind would give.

    Args:
        row: A finished cell.
        other: The cell that it is compared with.
        score: Name of the score; smaller is better.
        ratio: Test rows over training rows of a run.

    Returns:
        ``difference``, below 0 where ``row`` is better, its 95 % ``interval`` and the ``wide`` one,
        each half a width.
    """
    gaps = [a - b for a, b in zip(row["scores"][score], other["scores"][score], strict=True)]
    deviation = _deviation(gaps)
    return {
        "difference": _mean(gaps),
        "interval": _STUDENT * deviation / math.sqrt(len(gaps)),
        "wide": _STUDENT * deviation * math.sqrt(1 / len(gaps) + ratio),
    }


def compared(rows: Sequence[dict[str, Any]], against: Sequence[str]) -> list[dict[str, Any]]:
    """The chosen cells beside the baselines.

    Args:
        rows: Finished cells.
        against: Rules that others are compared with, each at the rate chosen for it.

    Returns:
        Flat rows: the summary, and ``<score> - <baseline>`` with its intervals.
    """
    best = chosen(rows)
    table = []
    for row in best:
        place = {name: row[name] for name in GROUP if name != "rule"}
        flat = summary(row)
        for baseline in against:
            others = [
                other
                for other in best
                if other["rule"] == baseline and all(other[n] == v for n, v in place.items())
            ]
            if not others or row["rule"] == baseline:
                continue
            for score in row["scores"]:
                found = paired(row, others[0], score, row["test_rows"] / row["training_rows"])
                flat |= {
                    f"{score} - {baseline}{'' if what == 'difference' else f' {what}'}": value
                    for what, value in found.items()
                }
        table.append(flat)
    return table


def chosen_text(table: Sequence[dict[str, Any]], against: Sequence[str]) -> str:
    """Text of a comparison as tables in Markdown, one for every task.

    Args:
        table: Rows of ``compared``.
        against: The baselines.

    Returns:
        The text. Behind a difference stands its interval, and the wide one in brackets.
    """
    lines = []
    for task in dict.fromkeys(row["task"] for row in table):
        own = [row for row in table if row["task"] == task]
        scores = [name.removesuffix("_mean") for name in own[0] if name.endswith("_mean")]
        gaps = [f"{scores[-1]} - {baseline}" for baseline in against]
        heads = ("hidden", "clusters", "rule", "lr", *scores, *gaps, "diverged")
        lines += [f"### {task}", "", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
        for row in own:
            cells = [row["hidden"], f"{row['clustering']} ({row['members']})", row["rule"]]
            cells += [f"{row['lr']:g}"]
            cells += [f"{row[f'{s}_mean']:.4g} ± {row[f'{s}_std']:.2g}" for s in scores]
            cells += [_gap(row, name) for name in gaps]
            lines.append(f"| {' | '.join(map(str, cells))} | {row['diverged']} |")
        lines.append("")
    return "\n".join(lines)


def members_text(rows: Sequence[dict[str, Any]]) -> str:
    """Text of what becomes of one network per cluster, as tables in Markdown.

    Args:
        rows: Finished cells without a rule.

    Returns:
        The text: the last score of every way to use the networks, a column per cell.
    """
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        score = list(next(iter(own[0]["scores"].values())))[-1]
        heads = [
            f"{r['clustering']} ({r['members']}), {r['hidden']}, {r['init']} init" for r in own
        ]
        lines += [f"### {task}: {score} of one network per cluster", ""]
        lines += [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
        for way in own[0]["scores"]:
            runs = [row["scores"][way][score] for row in own]
            cells = [f"{_mean(values):.4g} ± {_deviation(values):.2g}" for values in runs]
            lines.append(f"| {way} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def write_tables(
    folder: Path,
    grid: Sequence[dict[str, Any]],
    members: Sequence[dict[str, Any]],
    against: Sequence[str],
) -> None:
    """Write ``cells.csv``, ``chosen.csv``, ``chosen.md``, ``members.md`` and ``cells.json``.

    Args:
        folder: Where.
        grid: Finished cells with a rule.
        members: Finished cells of one network per cluster.
        against: Rules that others are compared with; see ``compared``.
    """
    table = compared(grid, against)
    for name, flat in (("cells", [summary(row) for row in grid]), ("chosen", table)):
        heads = list(dict.fromkeys(key for row in flat for key in row))
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, heads)
            writer.writeheader()
            writer.writerows(flat)
    (folder / "chosen.md").write_text(chosen_text(table, against))
    (folder / "members.md").write_text(members_text(members))
    (folder / "cells.json").write_text(json.dumps([*grid, *members]))


def _gap(row: dict[str, Any], name: str) -> str:
    if name not in row:
        return ""
    return f"{row[name]:+.3g} ± {row[f'{name} interval']:.2g} ({row[f'{name} wide']:.2g})"


def _mean(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).mean())


def _deviation(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).std()) if len(values) > 1 else 0.0
