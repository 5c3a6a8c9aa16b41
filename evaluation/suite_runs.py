"""Running suites: build, train, compare, and say what was reached."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console
from rich.table import Table

from evaluation.goals import NATIVE, outcomes
from evaluation.methods.ledger import digest_of
from evaluation.processes import environment_of_one
from evaluation.suites import SUITES, Row, Training
from metamerge.errors import ConfigError, MetaMergeError
from metamerge.mergers import read_card
from zoo.build import build_with_progress
from zoo.options import words
from zoo.store import Zoo

COLUMNS = {  # of the table: title -> key of a line
    "row": "row",
    "K": "members",
    "images": "data",
    "merger": "merger",
    "%": "accuracy",
    "ensemble": "ensemble",
    "best control": "best_control",
    "its %": "control",
    "to reach": "target",
    "reached": "reached",
    "gates": "gates",
}


Compare = Callable[[Any, Console, PartialState], Any]
"""Makes one comparison of such options."""


def run_suite(
    options: Any, console: Console, compare: Compare, state: PartialState
) -> list[dict[str, Any]]:
    """Run a suite and print what was reached; write ``suite.json`` and ``suite.md``.

    Args:
        options: Those of ``evaluation.compare``: ``suite`` and ``only`` say what to run, the others
            hold for every comparison, but for what rows say themselves.
        console: Where to print.
        compare: Makes one comparison of such options.
        state: The processes that share zoos and comparisons; mergers are trained by the first.

    Returns:
        The lines of the table, one per figure that was to be reached and merger.

    Raises:
        ConfigError: If there is no such suite or row, or a row needs files that were not given.
        MetaMergeError: If a merger could not be trained.
    """
    rows = chosen_rows(options.suite, options.only)
    out = Path(options.out or f"runs/suite-{options.suite}")
    lines: list[dict[str, Any]] = []
    for row in rows:
        console.rule(f"{row.name}: {row.target}")
        own = replace(options, suite=None, only=(), out=str(out))
        lines += run_row(row, own, console, compare, state)
        if state.is_main_process:
            _write(out, lines, rows)
    console.print(_table(options.suite, lines))
    console.print(f"[bold]suite[/] {out}/suite.json, suite.md")
    return lines


def chosen_rows(suite: str, only: Sequence[str]) -> list[Row]:
    """Rows of a suite by name.

    Args:
        suite: Name of the suite, or of a row of one, which is then the only one.
        only: Names of rows; all if there are none.

    Returns:
        The rows, in the order of the suite.

    Raises:
        ConfigError: If there is no such suite or row.
    """
    if suite not in SUITES:
        single = [row for rows in SUITES.values() for row in rows if row.name == suite]
        if not single:
            rows = dict.fromkeys(row.name for rows in SUITES.values() for row in rows)
            raise ConfigError(
                f"suite: got {suite!r}, expected one of {', '.join(SUITES)}, or one of their rows: "
                f"{', '.join(rows)}."
            )
        return single[:1]
    names = [row.name for row in SUITES[suite]]
    unknown = sorted(set(only) - set(names))
    if unknown:
        raise ConfigError(f"only: {suite} has the rows {', '.join(names)}, got {unknown}.")
    return [row for row in SUITES[suite] if not only or row.name in only]


def run_row(
    row: Row, options: Any, console: Console, compare: Compare, state: PartialState
) -> list[dict[str, Any]]:
    """Make the comparisons of one row.

    Args:
        row: The row.
        options: Those of ``evaluation.compare``; ``out`` is the folder of the suite.
        console: Where to print.
        compare: Makes one comparison.
        state: The processes.

    Returns:
        Its lines of the table.

    Raises:
        ConfigError: If it needs the third-party files, and they were not given.
    """
    out = Path(options.out)
    if row.third_party and not options.third_party:
        raise ConfigError(f"{row.name}: give the two files with --third-party a.dat b.dat.")
    folders = [str(trained(one, out / "mergers", console, options, state)) for one in row.mergers]
    common = replace(options, merger=tuple(folders), third_party=(), **row.compare)
    places, natives = [], []
    for judged in row.judge or (() if row.third_party else row.mergers[0].zoos):
        zoo = build_with_progress(judged, console, state)
        if row.native is not None:
            own = Training((judged,), row.native)
            natives.append(str(trained(own, out / "mergers", console, options, state)))
        place = str(out / f"{row.name}-{zoo.digest[:8]}")
        mergers = (*folders, *natives[-1:])
        places.append(replace(common, merger=mergers, zoo=str(zoo.folder), out=place))
    if row.third_party:
        place = str(out / f"{row.name}-third-party")
        places.append(replace(common, zoo=None, third_party=options.third_party, out=place))
    found = [compare(own, console, state) for own in places]
    together = [[one] for one in found] if natives else [found]
    return [line for group in together for line in _lines(row, group, natives)]


def _lines(row: Row, found: Sequence[Any], natives: Sequence[str]) -> list[dict[str, Any]]:
    """Lines of comparisons that are judged together."""
    known = found[0].meta["mergers"]
    own = [name for name, told in known.items() if natives and told["folder"] in natives]
    mergers = [name for name in known if name not in own]
    scored = [
        replace(one, method=NATIVE) if one.method in own else one
        for comparison in found
        for one in comparison.scored
    ]
    failed = {name: _failed(name, [one.meta for one in found]) for name in mergers}
    title = row.name if not natives else f"{row.name} {_widths(found[0].meta)}"
    return [
        {"row": title, **line, "gates": failed[line["merger"].partition(", ")[0]]}
        for line in outcomes(row.goals, scored, mergers)
    ]


def _widths(meta: Mapping[str, Any]) -> str:
    """Widths of the networks that a comparison judged, such as ``64-64``."""
    return "-".join(map(str, meta["zoo"]["options"]["widths"]))


def trained(
    training: Training, folder: Path, console: Console, options: Any, state: PartialState
) -> Path:
    """A trained merger; the same training is done once, and goes on where it was stopped.

    Args:
        training: Zoos and options.
        folder: Where mergers lie.
        console: Where to print.
        options: Those of ``evaluation.compare``, for tracking.
        state: The processes; the first one trains.

    Returns:
        Its folder.

    Raises:
        MetaMergeError: If the training ends without a merger.
    """
    zoos = [build_with_progress(zoo, console, state) for zoo in training.zoos]
    digests = {"zoos": [zoo.digest for zoo in zoos], "options": dict(training.options)}
    place = folder / digest_of(json.loads(json.dumps(digests)))
    if state.is_main_process and not _finished(place):
        command = _command(training.options, zoos, place, options)
        console.print(f"[bold]training[/] {' '.join(command[1:])}", highlight=False)
        ended = subprocess.run(command, check=False, env=environment_of_one())
        if not _finished(place):
            raise MetaMergeError(f"{place}: the training ended with {ended.returncode}, no merger.")
        if ended.returncode:
            console.print(f"{place}: the merger was saved, but fails gates; see its card")
    state.wait_for_everyone()
    return place


def _finished(place: Path) -> bool:
    return place.is_dir() and bool(read_card(place))


def _command(given: Mapping[str, Any], zoos: Sequence[Zoo], place: Path, options: Any) -> list[str]:
    """The command line of a training."""
    told = {
        "zoo": tuple(str(zoo.folder) for zoo in zoos),
        "out": str(place),
        "tracking": options.tracking,
        "experiment": options.experiment,
        **given,
    }
    return [sys.executable, "-m", "trainers.merger", *words(told)]


def _failed(name: str, metas: Sequence[Mapping[str, Any]]) -> list[str]:
    """Gates that a merger fails in any of the comparisons."""
    return sorted(
        {
            f"{size} {gate['name']}"
            for meta in metas
            for size, gates in meta["mergers"][name]["gates"].items()
            for gate in gates
            if not gate["passed"]
        }
    )


# ----------------------------------------------------------------------------------------------
# the table


def _write(out: Path, lines: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    told = {
        row.name: {"target": row.target, "mergers": [_told(one) for one in row.mergers]}
        for row in rows
    }
    (out / "suite.json").write_text(json.dumps({"rows": told, "lines": lines}, indent=1) + "\n")
    head = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    body = [f"| {' | '.join(_cells(line))} |" for line in lines]
    (out / "suite.md").write_text("\n".join([*head, *body]) + "\n")


def _told(training: Training) -> dict[str, Any]:
    return {"zoos": [asdict(zoo) for zoo in training.zoos], "options": dict(training.options)}


def _table(name: str, lines: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title=f"suite {name}: what was to be reached")
    for title in COLUMNS:
        table.add_column(title)
    for line in lines:
        table.add_row(*_cells(line), style="bold" if line["reached"] else None)
    return table


def _cells(line: Mapping[str, Any]) -> list[str]:
    return [_cell(key, line[key]) for key in COLUMNS.values()]


def _cell(key: str, value: Any) -> str:
    if key == "reached":
        return {True: "yes", False: "no", None: "not judged"}[value]
    if key == "gates":
        return ", ".join(value) or "passed"
    if key == "members":
        return str(value or "all")
    if value is None:
        return ""
    return f"{100 * value:.1f}" if isinstance(value, float) else str(value)
