"""Compare mergers with everything else: ``python -m evaluation.compare``.

Test families and test images appear here and nowhere else. Every way of getting one network from a
family's members is scored beside its controls, at several budgets of images; the table goes to the
terminal, to ``leaderboard.json`` and, row by row, to MLflow. Rows are kept as they are finished, so
the same command goes on where it was stopped. ``--suite`` runs several comparisons in a row and
says what was to be reached.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from evaluation import by_heart, controls, examination, gates
from evaluation.bench import Bench
from evaluation.competitors import (
    Competitor,
    control_rows,
    drawn_images,
    merger_rows,
    plain_rows,
    voting_rows,
)
from evaluation.contestants import Contestant, code_of, read_contestants
from evaluation.examination import examine
from evaluation.judged import Judged, open_zoo, third_party_pair, zoo_families
from evaluation.methods.ledger import Ledger
from evaluation.metrics import common_task
from evaluation.pictures import leaderboard_figure
from evaluation.report import Scored, differences, print_leaderboard, write_leaderboard
from evaluation.suite_runs import run_suite
from evaluation.tracking import track
from metamerge.errors import ConfigError
from zoo.options import command


@dataclass(frozen=True)
class CompareOptions:
    """Compare trained mergers with averages, ensembles, distillation and plain training."""

    merger: tuple[str, ...] = ("runs/merger",)  # folders of trained mergers
    zoo: str | None = None  # folder of the zoo to judge on; the merger's own if not given
    third_party: tuple[str, ...] = ()  # judge on pygmtools' example_model_fusion_1.dat and _2.dat
    suite: str | None = None  # run a suite of comparisons: mergers or quick
    only: tuple[str, ...] = ()  # rows of the suite to run; all if not given
    out: str | None = None  # folder of tables and pictures; runs/compare, or runs/suite-<name>
    members: tuple[int, ...] = ()  # numbers of members to compare at; all of the zoo if not given
    families: int = 0  # test families to compare on; 0: all of the zoo
    unlabelled: tuple[int, ...] = (500,)  # unlabelled images at merge time; 0: none
    labelled: tuple[int, ...] = (200,)  # labelled images at merge time, stratified; 0: none
    full: bool = True  # compare with all objective images at merge time as well
    controls: bool = True  # train and score the controls as well
    seed: int = 0  # seed of everything random in the methods
    tracking: bool = True  # log every row to MLflow
    experiment: str = "metamerge"  # name of the MLflow experiment

    def __post_init__(self) -> None:
        """Refuse budgets that cannot be cut into two parts.

        Raises:
            ConfigError: Naming the option.
        """
        for name in ("unlabelled", "labelled"):
            if any(count < 0 or count == 1 for count in getattr(self, name)):
                raise ConfigError(
                    f"{name}: expected 0 or at least 2 images, got {getattr(self, name)}."
                )


class Comparison(NamedTuple):
    """What a comparison found.

    Attributes:
        scored: All rows, best first.
        meta: What ``leaderboard.meta.json`` holds.
    """

    scored: list[Scored]
    meta: dict[str, Any]


def compare(options: CompareOptions, console: Console) -> Comparison:
    """Score everything, print the table, write the files, log the rows.

    Args:
        options: What to compare.
        console: Where to print.

    Returns:
        All rows and what is known of them.

    Raises:
        ConfigError: If mergers and zoo do not belong together.
    """
    contestants = read_contestants(options.merger)
    judged, about = _judged(options, contestants, console)
    out, task = Path(options.out or "runs/compare"), about["task"]
    told = {**asdict(options), "judged": [one.identity for one in judged]}
    with track(
        f"compare {task['name']}",
        options=told,
        experiment=options.experiment,
        enabled=options.tracking,
    ) as tracked:
        scored: list[Scored] = []
        known = {c.name: _known(c, task["digest"]) for c in contestants}
        for one in judged:
            ledger = _ledger(options, out, one)
            scored += _scored(
                options, Bench(one, options.seed), contestants, ledger, console, known
            )
        scored.sort(key=lambda s: -float(s.accuracies.mean()))
        names = [contestant.name for contestant in contestants]
        meta = {**about, "mergers": known, **_protocol(options)}
        meta["differences"] = differences(scored, names)
        files = _write(out, scored, meta)
        for row in (s.row() for s in scored):
            named = {k: row[k] for k in ("method", "members", "data", "control")}
            numbers = {k: row[k] for k in row if k not in named}
            title = f"{row['method']} K={row['members']}, {row['data']}"
            tracked.child(title, options=named, metrics=numbers)
        tracked.metrics(_summary(scored, names))
        for file in files:
            tracked.artifact(file)
    print_leaderboard(console, scored, meta, [one.members for one in judged])
    console.print(f"[bold]compare[/] {', '.join(map(str, files))}")
    return Comparison(scored, meta)


# ----------------------------------------------------------------------------------------------
# who is judged


def _judged(
    options: CompareOptions, contestants: Sequence[Contestant], console: Console
) -> tuple[list[Judged], dict[str, Any]]:
    """Families of every size, and what the meta file says of them."""
    if options.third_party:
        pair = third_party_pair(options.third_party, seed=options.seed)
        task = pair.split.task
        told = {"name": task.name, "digest": task.digest, "classes": task.classes}
        about = {"task": told, "zoo": None, "images": _images(pair)}
        return [pair], {**about, "seeds": _seeds(options, contestants, None)}
    zoo = open_zoo(options.zoo, contestants, console)
    sizes = tuple(dict.fromkeys(options.members)) or zoo.sizes
    unknown = sorted(set(sizes) - set(zoo.sizes))
    if unknown:
        raise ConfigError(
            f"members: the zoo {zoo.folder} has families of {zoo.sizes}, got {unknown}."
        )
    split = common_task(zoo)
    found = [zoo_families(zoo, split, size, most=options.families) for size in sizes]
    return found, {
        "task": zoo.manifest["task"],
        "zoo": {"folder": str(zoo.folder), "digest": zoo.digest, "options": zoo.options},
        "images": _images(found[0]),
        "seeds": _seeds(options, contestants, zoo.options["seed"]),
    }


def _images(judged: Judged) -> dict[str, int]:
    parts = ("segments", "objective", "validation", "test")
    return {part: len(judged.split.rows(part)) for part in parts}


def _seeds(
    options: CompareOptions, contestants: Sequence[Contestant], zoo: int | None
) -> dict[str, Any]:
    own = {c.name: c.card["options"]["seed"] for c in contestants}
    return {"zoo": zoo, "merger": own, "compare": options.seed}


# ----------------------------------------------------------------------------------------------
# rows


def _scored(
    options: CompareOptions,
    bench: Bench,
    contestants: Sequence[Contestant],
    ledger: Ledger,
    console: Console,
    known: dict[str, dict[str, Any]],
) -> list[Scored]:
    """Rows of one number of members, and gates of the mergers into ``known``."""
    rows = list(_rows(options, bench, contestants))
    scored: list[Scored] = []
    judging = contestants if bench.count > 1 else ()  # gates compare families
    with _progress(console, len(rows) + len(judging)) as advance:
        for row in rows:
            advance(f"K={bench.members}: {row.method}, {row.data}")
            key = f"K={bench.members}; {row.method}; {row.data}; {row.code}"
            if key not in ledger:
                ledger.add(key, row.score().record())
            scored.append(Scored.from_record(ledger.rows[key]))
        for contestant in judging:
            advance(f"K={bench.members}: gates of {contestant.name}")
            code = code_of(gates, by_heart, examination)
            key = f"K={bench.members}; gates; {contestant.code}; {code}"
            if key not in ledger:
                ledger.add(key, examine(bench, contestant))
            for name, value in ledger.rows[key].items():
                known[contestant.name][name][f"k{bench.members}"] = value
    return scored


def _rows(
    options: CompareOptions, bench: Bench, contestants: Sequence[Contestant]
) -> Iterator[Competitor]:
    images = [
        drawn_images(bench.budget, kind, counts, full=options.full, seed=options.seed)
        for kind, counts in (("unlabelled", options.unlabelled), ("labelled", options.labelled))
    ]
    for contestant in contestants:
        yield from merger_rows(bench, contestant, *images, tuned=options.controls)
    yield from plain_rows(bench, *images)
    yield from voting_rows(bench)
    if options.controls:
        yield from control_rows(bench, *images)


def _known(contestant: Contestant, task: str) -> dict[str, Any]:
    return {
        "folder": contestant.folder,
        "kind": contestant.kind,
        "foreign": not contestant.knows_task(task),
        "card": contestant.card,
        "gates": {},
        "forgotten_class_recall": {},
        "nearest_training": {},
    }


def _ledger(options: CompareOptions, out: Path, judged: Judged) -> Ledger:
    return Ledger(out / "rows.jsonl", {**judged.identity, "seed": options.seed})


# ----------------------------------------------------------------------------------------------
# what is left of it


def _protocol(options: CompareOptions) -> dict[str, Any]:
    return {
        "options": asdict(options),
        "protocol": {
            "data": "what a method was given at merge time, out of the objective and validation "
            "images; mergers were trained once, before, on the objective images of their own "
            "zoos; a foreign merger never saw this task",
            "controls": f"learning rate from {controls.RATES} chosen on a quarter of the images, "
            "or on the validation images where all are given, then trained on all that are given; "
            "controls with unlabelled images may use labels for that choice and that of the best "
            "member, and for nothing else",
        },
    }


def _write(out: Path, scored: Sequence[Scored], meta: dict[str, Any]) -> list[Path]:
    rows = [one.row() for one in scored]
    write_leaderboard(out, rows, meta)
    labelled = [{**one.row(), "method": one.label} for one in scored]
    title = f"{meta['task']['name']}: accuracy on test images"
    leaderboard_figure(labelled, title=title).savefig(out / "leaderboard.png", dpi=150)
    names = ("leaderboard.json", "leaderboard.meta.json", "leaderboard.png")
    return [out / name for name in names]


def _summary(scored: Sequence[Scored], names: Sequence[str]) -> dict[str, float]:
    """The mergers' own figures, for the parent run."""
    return {
        f"{s.method}_accuracy_k{s.members}": s.row()["accuracy_mean"]
        for s in scored
        if s.method in names
    }


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    """A bar; the call that is yielded says what is made next."""
    columns = (TextColumn("{task.description:.60}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeElapsedColumn(), console=console, transient=True, disable=console.quiet
    ) as bar:
        task = bar.add_task("compare", total=total, completed=-1)
        yield lambda what: bar.update(task, advance=1, description=what)


def terminal() -> Console:
    """A console wide enough for the table where the output is a file or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 120))


def _on_command(options: CompareOptions) -> None:
    if options.suite:
        run_suite(options, terminal(), compare)
    else:
        compare(options, terminal())


def main() -> None:
    """Entry point of ``python -m evaluation.compare``."""
    command(CompareOptions, _on_command, prog="python -m evaluation.compare")


if __name__ == "__main__":
    main()
