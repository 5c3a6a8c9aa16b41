"""What trainings of subsets of weights came to: numbers by mask, table, files.

Every number is a mean over seeds. Masks of one seed share its init, its images and their order with
the whole training, so differences to it are paired; intervals are 95 % by Student's t.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.special import stdtrit
from torch import Tensor

FULL = "full"
EARLY = 0.1  # part of the steps after which displacements are compared for the first time
STARTS = {"init": "from the init", "converged": "from where the whole training ended"}

Row = Mapping[str, Any]
"""Trainings with one mask: ``start``, ``mask``, ``seeds``, ``steps`` (marks), ``curves`` by seeds
and marks (``train``, ``validation``, ``displacement`` of live weights, ``same``: that of the same
weights in the whole training), ``test`` by seeds, ``live`` and ``weights`` (numbers of these)."""


def joined(rows: Sequence[Row], masks: Sequence[str]) -> list[Row]:
    """Join rows of several seeds.

    Args:
        rows: In any order.
        masks: Names in the order that is wanted.

    Returns:
        One row per start and mask.
    """
    found = []
    for start, mask in ((start, mask) for start in STARTS for mask in masks):
        own = [row for row in rows if (row["start"], row["mask"]) == (start, mask)]
        own.sort(key=lambda row: row["seeds"])
        if own:
            curves = {name: _chained(r["curves"][name] for r in own) for name in own[0]["curves"]}
            by_seed = [k for k, v in own[0].items() if isinstance(v, list) and k != "steps"]
            lists = {key: _chained(row[key] for row in own) for key in by_seed}
            found.append({**own[0], **lists, "curves": curves})
    return found


def interval(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over seeds and half the width of its 95 % interval.

    Args:
        values: ``[seeds, ...]``.

    Returns:
        Two tensors ``[...]``; the width is 0 of a single seed.
    """
    seeds = len(values)
    if seeds < 2:
        return values.mean(0), torch.zeros_like(values[0])
    wide = float(stdtrit(seeds - 1, 0.975)) / seeds**0.5
    return values.mean(0), wide * values.std(0, correction=1)


def curve(row: Row, name: str) -> Tensor:
    """``[seeds, marks]``."""
    return torch.tensor(row["curves"][name], dtype=torch.float64)


def ratios(row: Row, full: Row, pace: float = 1.0) -> Tensor:
    """Displacement of live weights over that of the same weights in the whole training.

    Args:
        row: Of a mask.
        full: Of the whole training.
        pace: Seconds of a step of the mask in those of the whole training; 1 compares step by
            step, others at equal seconds, as far as the whole training went.

    Returns:
        ``[seeds, marks - 1]``, without the start, where both are 0.
    """
    marks, at = np.array(full["steps"], float), pace * np.array(row["steps"], float)
    same = np.stack([np.interp(at, marks, own) for own in row["curves"]["same"]])
    same[:, at > marks[-1] + 1e-9] = np.nan
    return curve(row, "displacement")[:, 1:] / torch.from_numpy(same)[:, 1:].clamp_min(1e-12)


def steps_to(row: Row, goal: float) -> float | None:
    """Steps until the mean loss on validation images is down to a goal, None if it never is."""
    marks, loss = np.array(row["steps"], float), curve(row, "validation").mean(0).numpy()
    below = np.nonzero(loss <= goal)[0]
    if not len(below) or below[0] == 0:
        return float(marks[0]) if len(below) else None
    last = below[0]
    return float(np.interp(goal, [loss[last], loss[last - 1]], [marks[last], marks[last - 1]]))


def summary(rows: Sequence[Row], seconds: Mapping[str, float]) -> list[dict[str, Any]]:
    """What every mask came to.

    Args:
        rows: Joined ones, those of whole trainings among them.
        seconds: Of a step by mask, that of the whole training among them.

    Returns:
        One entry per row; numbers that make no sense for it are missing.
    """
    wholes = {row["start"]: row for row in rows if row["mask"] == FULL}
    return [dict(_entry(row, wholes[row["start"]], seconds)) for row in rows]


def _entry(row: Row, full: Row, seconds: Mapping[str, float]) -> Iterator[tuple[str, Any]]:
    pace = seconds[row["mask"]] / seconds[FULL]
    yield from ((key, row[key]) for key in ("start", "mask"))
    yield "seeds", len(row["seeds"])
    yield "live", row["live"] / row["weights"]
    yield "step_ms", 1000 * seconds[row["mask"]]
    yield "speed", 1 / pace
    validation = curve(row, "validation")
    for name, values in (("validation", validation[:, -1]), ("train", curve(row, "train")[:, -1])):
        yield from _told(name, values)
    test, whole = (torch.tensor(own["test"], dtype=torch.float64) for own in (row, full))
    yield from _told("test", test)
    if row is not full and row["seeds"] == full["seeds"]:
        yield from _told("beyond", test - whole)
    if "test_alone" in row:
        yield from _told("test_alone", torch.tensor(row["test_alone"], dtype=torch.float64))
    steps = full["steps"]
    goal = float(curve(full, "validation")[:, _nearest(steps, 0.5)].mean())
    reached, whole_way = steps_to(row, goal), steps_to(full, goal)
    yield "steps_to", reached
    if reached is not None and whole_way:  # a network that is restarted may be there at once
        yield "seconds_to", reached * pace / whole_way
    if "same" in row["curves"]:
        apart = ratios(row, full)
        yield from _told("moved_early", apart[:, _nearest(row["steps"], EARLY) - 1])
        yield from _told("moved_end", apart[:, -1])
        middle = _nearest(row["steps"], 0.5 / pace)
        yield from _told("moved_seconds", ratios(row, full, pace)[:, middle - 1])
        yield from _told("cosine", curve(row, "cosine")[:, -1])
    if "barrier" in row:
        gone = curve(row, "displacement")[:, -1] / torch.tensor(row["norm"])
        yield from _told("gone", gone)
        for name in ("loss_before", "loss_after", "barrier"):
            yield from _told(name, torch.tensor(row[name], dtype=torch.float64))


def _told(name: str, values: Tensor) -> Iterator[tuple[str, float]]:
    mean, wide = interval(values)
    yield name, float(mean)
    yield f"{name}_width", float(wide)


def _nearest(steps: Sequence[int], part: float) -> int:
    """Mark nearest to a part of all steps, not the start."""
    return 1 + min(range(len(steps) - 1), key=lambda i: abs(steps[i + 1] - part * steps[-1]))


def _chained(lists: Iterable[list[Any]]) -> list[Any]:
    return list(chain.from_iterable(lists))


# ----------------------------------------------------------------------------------------------
# table and files

# start -> heading -> number, its form, factor
COLUMNS: dict[str, dict[str, tuple[str, str, int]]] = {
    "init": {
        "live %": ("live", "{:.0f}", 100),
        "speed": ("speed", "{:.2f}", 1),
        "moved, early": ("moved_early", "{:.2f} ± {:.2f}", 1),
        "moved, end": ("moved_end", "{:.2f} ± {:.2f}", 1),
        "moved, equal s": ("moved_seconds", "{:.2f} ± {:.2f}", 1),
        "steps to": ("steps_to", "{:.0f}", 1),
        "s to": ("seconds_to", "{:.2f}", 1),
        "train loss": ("train", "{:.3f} ± {:.3f}", 1),
        "val. loss": ("validation", "{:.3f} ± {:.3f}", 1),
        "test %": ("test", "{:.1f} ± {:.1f}", 100),
        "beyond full": ("beyond", "{:+.1f} ± {:.1f}", 100),
    },
    "converged": {
        "live %": ("live", "{:.0f}", 100),
        "gone %": ("gone", "{:.0f} ± {:.0f}", 100),
        "moved, early": ("moved_early", "{:.2f} ± {:.2f}", 1),
        "moved, end": ("moved_end", "{:.2f} ± {:.2f}", 1),
        "loss before": ("loss_before", "{:.3f} ± {:.3f}", 1),
        "loss after": ("loss_after", "{:.3f} ± {:.3f}", 1),
        "barrier": ("barrier", "{:.3f} ± {:.3f}", 1),
        "val. loss": ("validation", "{:.3f} ± {:.3f}", 1),
        "test %": ("test", "{:.1f} ± {:.1f}", 100),
        "beyond full": ("beyond", "{:+.1f} ± {:.1f}", 100),
    },
}
CAPTION = (
    "Means over {} seeds ± half the 95 % interval. speed: steps per second, in those of full. "
    "moved: displacement of live weights over that of the same weights in the whole training: "
    "after a tenth of the steps, at the end, at equal seconds when half of them are gone. steps "
    "to, s to: until the validation loss that full has after half of its steps; s in those of "
    "full. gone: displacement over the norm of the live weights. loss, barrier: on training "
    "images, the barrier on the line back. beyond full: test accuracy in points, paired over seeds."
)


def cells(entry: Mapping[str, Any]) -> list[str]:
    """The numbers of an entry as its table shows them; empty where it has none."""
    found = []
    for name, form, factor in COLUMNS[entry["start"]].values():
        value, wide = entry.get(name), entry.get(f"{name}_width", 0.0)
        shown = "never" if name in ("steps_to", "seconds_to") else ""
        if value is not None and value == value:
            shown = form.format(factor * value, factor * wide)
        found.append(shown)
    return found


def print_subsets(console: Console, entries: Sequence[Mapping[str, Any]], *, title: str) -> None:
    """Print a table for every start.

    Args:
        console: Where.
        entries: What ``summary`` gives.
        title: Headline.
    """
    for start in dict.fromkeys(entry["start"] for entry in entries):
        own = [entry for entry in entries if entry["start"] == start]
        table = Table(title=f"{title}, {STARTS[start]}", caption=CAPTION.format(own[0]["seeds"]))
        for name in ("mask", *COLUMNS[start]):
            table.add_column(name, justify="left" if name == "mask" else "right", no_wrap=True)
        for entry in own:
            table.add_row(entry["mask"], *cells(entry))
        console.print(table)


def markdown(entries: Sequence[Mapping[str, Any]]) -> str:
    """The tables as a page of Markdown."""
    parts = []
    for start in dict.fromkeys(entry["start"] for entry in entries):
        own = [entry for entry in entries if entry["start"] == start]
        heads = ["mask", *COLUMNS[start]]
        parts += [f"## {STARTS[start]}", "", f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
        lines = [[f"`{entry['mask']}`", *cells(entry)] for entry in own]
        parts += [f"| {' | '.join(line)} |" for line in lines]
        parts += ["", CAPTION.format(own[0]["seeds"]), ""]
    return "\n".join(parts)


def write_subsets(
    out: Path,
    rows: Sequence[Row],
    entries: Sequence[Mapping[str, Any]],
    told: Mapping[str, Any],
) -> list[Path]:
    """Write ``table.json`` (summary and every curve) and ``table.md``.

    Args:
        out: Folder, made if missing.
        rows: Joined ones.
        entries: Their summary.
        told: Options, task, seconds of a step.

    Returns:
        The files.
    """
    out.mkdir(parents=True, exist_ok=True)
    files = [out / "table.json", out / "table.md"]
    content = {**told, "summary": list(entries), "rows": list(rows)}
    files[0].write_text(json.dumps(content, indent=1) + "\n")
    files[1].write_text(markdown(entries))
    return files
