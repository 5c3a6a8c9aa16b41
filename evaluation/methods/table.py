"""All methods on real settings: ``python -m evaluation.methods``.

Every registered merge method, alignment and correction, and every control, with no data, with
unlabelled and with labelled images. Rows are kept as they are finished, so the same command goes
on where it was stopped. A row is made again when the file of its method, alignment or correction
has changed; after changes elsewhere name it in ``--redo``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from evaluation.compare import terminal
from evaluation.methods.attempts import attempted
from evaluation.methods.control_rows import control_calls
from evaluation.methods.ledger import Ledger
from evaluation.methods.rows import Call, merge_calls
from evaluation.methods.settings import ZOOS, Setting, zoo_setting
from evaluation.methods.tables import print_tables, write_tables
from evaluation.methods.third_party import THIRD_PARTY, third_party_setting
from metamerge.errors import ConfigError
from metamerge.mergers import read_card
from zoo.options import command

NAMES = (*ZOOS, THIRD_PARTY)


@dataclass(frozen=True)
class MethodsOptions:
    """Compare all merge methods, alignments, corrections and controls on four settings."""

    settings: tuple[str, ...] = NAMES  # digits, fashion-mlp, fashion-cnn and third-party
    third_party: tuple[str, ...] = ()  # pygmtools' example_model_fusion_1.dat and _2.dat
    out: str = "runs/methods"  # folder of tables and pictures; zoos lie in it as well
    families: int = 0  # families per setting, or draws of images of the fourth; 0: 10, 3, 3, 3
    merger: tuple[str, ...] = ()  # folders of trained mergers, each for the task it was trained on
    mnist: str | None = None  # folder with the IDX files of MNIST
    fashion_mnist: str | None = None  # folder with the IDX files of Fashion-MNIST
    limit: int = 600  # seconds after which a row is given up
    redo: tuple[str, ...] = ()  # make rows again whose name has one of these in it
    controls: bool = True  # whether to train and score the controls as well
    quick: bool = False  # fewer, smaller families and fewer test images


def methods(options: MethodsOptions, console: Console) -> list[dict[str, Any]]:
    """Score everything, print the tables, write the files.

    Args:
        options: What to compare.
        console: Where to print.

    Returns:
        All rows, setting by setting, best first.

    Raises:
        ConfigError: If a setting is unknown, or a merger or a network cannot be read.
    """
    out = Path(options.out)
    makers = settings_of(
        options.settings,
        folder=out / "zoos",
        families=options.families,
        third_party=options.third_party,
        folders=(options.mnist, options.fashion_mnist),
        quick=options.quick,
        console=console,
    )
    mergers = {
        zoo["options"]["task"]: folder
        for folder in options.merger
        for zoo in read_card(folder)["zoos"]
    }
    rows: list[dict[str, Any]] = []
    titles: dict[str, str] = {}
    for make in makers:
        setting = make()
        titles[setting.name] = setting.title
        merger = mergers.get(setting.task)
        calls = list(merge_calls(setting, merger))
        calls += control_calls(setting) if options.controls else ()
        rows += setting_rows(setting, calls, out, options.limit, console, redo=options.redo)
        write_tables(out, "methods", rows, titles)
    print_tables(console, rows, titles)
    console.print(f"[bold]methods[/] {out}/methods.json, methods.csv, methods.md, methods-*.png")
    return rows


def settings_of(
    names: Sequence[str],
    *,
    folder: Path,
    families: int,
    third_party: Sequence[str],
    folders: Sequence[str | None] = (None, None),
    quick: bool,
    console: Console,
) -> list[Callable[[], Setting]]:
    """Settings by name, each made when it is called for.

    Args:
        names: Out of ``NAMES``.
        folder: Where zoos lie.
        families: Families per setting; 0 for the usual numbers.
        third_party: Files of the two third-party networks; that setting is left out without them.
        folders: Where MNIST and Fashion-MNIST lie.
        quick: Whether to take less of everything.
        console: Where to print.

    Returns:
        One call per setting.

    Raises:
        ConfigError: If a setting is unknown.
    """
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        raise ConfigError(f"settings: got {', '.join(unknown)}; there are {', '.join(NAMES)}.")
    mnist, fashion = folders
    calls: list[Callable[[], Setting]] = []
    for name in names:
        if name in ZOOS:
            told = {"folder": folder, "families": families, "quick": quick, "console": console}
            data = None if name == "digits" else fashion
            calls.append(partial(zoo_setting, name, data=data, **told))
        elif third_party:
            draws = 1 if quick else families
            calls.append(partial(third_party_setting, third_party, draws=draws, data=mnist))
        else:
            console.print(f"{name}: left out, give its two files with --third-party a.dat b.dat")
    return calls


def setting_rows(
    setting: Setting,
    calls: list[Call],
    out: Path,
    limit: int,
    console: Console,
    *,
    redo: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Rows of one setting; those that the ledger holds are not made again, but for failures.

    Args:
        setting: The setting.
        calls: What makes its rows.
        out: Folder of the ledger.
        limit: Seconds after which a row is given up.
        console: Where to show progress.
        redo: Parts of names whose rows are made again all the same.

    Returns:
        Rows, best first; those without a figure last.
    """
    ledger = Ledger(out / "rows.jsonl", {"setting": setting.name, **setting.identity})
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task(setting.name, total=len(calls))
        for call in calls:
            bar.update(task, description=f"{setting.name}: {call.about['method']:.60}")
            again = any(part in call.about["method"] for part in redo)
            if again or "error" in ledger.rows.get(call.key, {"error": "not tried yet"}):
                found = attempted(call.score, call.about["data"], limit)
                ledger.add(call.key, {**call.about, **found})
            bar.advance(task)
    rows = [{"setting": setting.name, **ledger.rows[call.key]} for call in calls]
    return sorted(_without_repeats(rows), key=lambda row: -row.get("accuracy_mean", -1.0))


def _without_repeats(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out rows whose images or labels made no difference, and those that lack labels."""

    def figures(row: dict[str, Any]) -> tuple[Any, ...]:
        names = ("start", "method", "accuracy_mean", "accuracy_std", "accuracy_worst", "error")
        return tuple(row.get(name) for name in names)

    kept: list[dict[str, Any]] = []
    known: set[tuple[Any, ...]] = set()
    for row in rows:  # of every method the one with the least data comes first
        if "refused" not in row and figures(row) not in known:
            kept.append(row)
            known.add(figures(row))
    return kept


def main() -> None:
    """Entry point of ``python -m evaluation.methods``."""
    prog = "python -m evaluation.methods"
    command(MethodsOptions, lambda options: methods(options, terminal()), prog=prog)
