"""Compare mergers with everything else: ``python -m evaluation.compare``.

Test families and test images appear here and nowhere else. Every way of getting one network from a
family's members is scored beside its controls, at several budgets of images; the table goes to the
terminal, to ``leaderboard.json``, to ``report.html`` and, row by row, to MLflow. Rows are kept as
they are finished, so the same command goes on where it was stopped; ``accelerate launch -m`` shares
them out over processes. ``--checkpoints`` compares on networks of your own, ``--suite`` runs
several comparisons in a row and says what was to be reached.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from matplotlib.figure import Figure
from rich.console import Console

from evaluation.bench import Bench
from evaluation.competitors import (
    Competitor,
    control_rows,
    drawn_images,
    merger_rows,
    plain_rows,
    voting_rows,
)
from evaluation.contestants import Contestant, champion, read_contestants
from evaluation.judged import Judged
from evaluation.keeping import keep_networks
from evaluation.leaderboard import (
    Line,
    print_leaderboard,
    ranked,
    write_leaderboard,
    write_whole,
)
from evaluation.making import Found, make_rows
from evaluation.markdown import report_markdown
from evaluation.opening import open_families
from evaluation.processes import launched_processes
from evaluation.protocol import protocol, versions
from evaluation.report import report_page
from evaluation.scored import Scored
from evaluation.showing import caption, figures_of
from evaluation.significance import BEST
from evaluation.suite_runs import run_suite
from evaluation.tracking import track
from metamerge.errors import ConfigError
from metamerge.mergers.files import BUNDLED
from zoo.options import changed, command, words

MERGER = "runs/merger"
PIXELS = 130  # per inch


@dataclass(frozen=True)
class CompareOptions:
    """Compare trained mergers with averages, ensembles, distillation and plain training."""

    merger: tuple[str, ...] = ()  # folders of trained mergers; runs/merger, or the package's own
    methods: tuple[str, ...] = ()  # merge methods, such as ties or none+average+refit, or all
    zoo: str | None = None  # folder of the zoo to judge on; the merger's own if not given
    checkpoints: tuple[str, ...] = ()  # judge on files, or on folders that hold a family each
    base: str | None = None  # what the checkpoints were fine-tuned from
    model: str | None = None  # of the checkpoints: package.module:factory, mlp, cnn, convnet, ...
    widths: tuple[int, ...] | None = None  # units or channels per hidden layer of the model
    task: str | None = None  # of the checkpoints: a data set by name, or a .csv, .parquet or .npz
    data: str | None = None  # folder with the task's files, where it needs some
    target: str | None = None  # column to predict, of your own file
    drop: tuple[str, ...] = ()  # columns of your own file to leave out
    objective: int = 0  # images of the task for merges and controls; 0: half of what is not test
    third_party: tuple[str, ...] = ()  # judge on pygmtools' example_model_fusion_1.dat and _2.dat
    suite: str | None = None  # run a suite of comparisons, or one row of it, by name
    only: tuple[str, ...] = ()  # rows of the suite to run; all if not given
    out: str | None = None  # folder of tables and pictures; runs/compare, or runs/suite-<name>
    members: tuple[int, ...] = ()  # numbers of members to compare at; all of the zoo if not given
    families: int = 0  # test families to compare on; 0: all of the zoo
    unlabelled: tuple[int, ...] = (500,)  # unlabelled images at merge time; 0: none
    labelled: tuple[int, ...] = (200,)  # labelled images at merge time, stratified; 0: none
    full: bool = True  # compare with all objective images at merge time as well
    adapt: bool = True  # adapt mergers to labelled images as well, the longest work of a comparison
    controls: bool = True  # train controls as well; those without training are always there
    seeds: tuple[int, ...] = (0,)  # seeds; whatever is random is repeated with each
    reference: str = ""  # row that others are held against, or best; the first merger if not given
    limit: int = 1800  # seconds after which a row of --methods is given up
    pictures: bool = True  # draw a family as well: its loss between members, layers, confidence
    registered: str = ""  # name in MLflow's registry where the best merger becomes the champion
    tracking: bool = True  # log every row to MLflow
    experiment: str = "metamerge"  # name of the MLflow experiment

    def __post_init__(self) -> None:
        """Refuse budgets that cannot be cut into two parts, and options that exclude each other.

        Raises:
            ConfigError: Naming the option.
        """
        for name in ("unlabelled", "labelled"):
            if any(count < 0 or count == 1 for count in getattr(self, name)):
                raise ConfigError(
                    f"{name}: expected 0 or at least 2 images, got {getattr(self, name)}."
                )
        if not self.seeds:
            raise ConfigError("seeds: expected at least one.")
        places = {name: getattr(self, name) for name in ("zoo", "checkpoints", "third_party")}
        several = [name for name, value in places.items() if value]
        if len(several) > 1:
            raise ConfigError(f"{', '.join(several)}: say one place to judge on, not several.")
        if bool(self.checkpoints) != (self.task is not None):
            raise ConfigError("checkpoints, task: one needs the other, whose images judge it.")


class Comparison(NamedTuple):
    """What a comparison found.

    Attributes:
        scored: All rows, best first.
        meta: What ``leaderboard.meta.json`` holds.
    """

    scored: list[Scored]
    meta: dict[str, Any]


def compare(
    options: CompareOptions, console: Console, state: PartialState | None = None
) -> Comparison:
    """Score everything, print the table, write the files, log the rows.

    Args:
        options: What to compare.
        console: Where to print.
        state: The processes that share the rows, all of which call this.

    Returns:
        All rows and what is known of them.

    Raises:
        ConfigError: If mergers and zoo do not belong together.
    """
    state = state or PartialState()
    contestants = read_contestants(options.merger or (_usual_merger(options),))
    judged, about, data = open_families(options, contestants, console, state)
    reference = _reference(options, judged, contestants)
    best = champion(contestants) if options.registered else None
    out = Path(options.out or "runs/compare")
    told = {**asdict(options), "judged": [one.identity for one in judged]}
    main = state.is_main_process
    with track(
        f"compare {about['task']['name']}",
        options=told,
        experiment=options.experiment,
        inputs=data,
        enabled=options.tracking and main,
    ) as tracked:
        found = make_rows(
            judged,
            lambda bench: _competitors(options, bench, contestants),
            contestants,
            options.seeds,
            out=out,
            limit=options.limit,
            state=state,
            console=console,
        )
        lines = ranked(found.scored, reference)
        meta = {**about, **_told(options, found, contestants, about["task"], reference)}
        if main:
            rows = [line.record() for line in lines]
            write_leaderboard(out, rows, meta)  # before it is drawn
            print_leaderboard(console, lines, meta)
            drawn = {"seed": options.seeds[0], "title": meta["task"]["name"]}
            figures = figures_of(rows, judged, contestants, family=options.pictures, **drawn)
            files = _write(out, lines, meta, figures)
            _track(tracked, lines, contestants, files)
            keep_networks(tracked, judged, contestants, options.seeds[0])
            if best and _sound(meta["mergers"][best.name]):
                tracked.merger(best.folder, registered=options.registered, alias="champion")
            elif best:
                console.print(f"{best.name} breaks a gate and is not registered")
            left = f"{out}: {', '.join(file.name for file in files)}"
            console.print(f"[bold]compare[/] {left}", soft_wrap=True)
    return Comparison([line.scored for line in lines], meta)


# ----------------------------------------------------------------------------------------------
# who is judged, and against whom


def _usual_merger(options: CompareOptions) -> str:
    return str(BUNDLED) if options.checkpoints else MERGER


def _reference(
    options: CompareOptions, judged: Sequence[Judged], contestants: Sequence[Contestant]
) -> str:
    """The row that others are held against, known before anything is made."""
    name = options.reference or contestants[0].name
    for one in judged:
        rows = _competitors(options, Bench(one, options.seeds[0]), contestants)
        known = dict.fromkeys(row.method for row in rows)
        labels = {f"{row.method}, {row.data}" for row in rows}
        if name not in {BEST, *known, *labels}:
            raise ConfigError(
                f"reference: no row {name!r} at K={one.members}. There are: {BEST}, "
                f"{', '.join(known)}."
            )
    return name


def _competitors(
    options: CompareOptions, bench: Bench, contestants: Sequence[Contestant]
) -> list[Competitor]:
    """All rows of one number of members."""
    counts = {"unlabelled": options.unlabelled, "labelled": options.labelled}
    images = [drawn_images(bench, kind, own, full=options.full) for kind, own in counts.items()]
    rows: list[Competitor] = []
    for contestant in contestants:
        rows += merger_rows(
            bench, contestant, *images, adapted=options.adapt, tuned=options.controls
        )
    learned = [contestant.kind for contestant in contestants]
    rows += plain_rows(bench, options.methods, *images, learned=learned)
    rows += voting_rows(bench)
    rows += control_rows(bench, *images, trained=options.controls)
    return rows


# ----------------------------------------------------------------------------------------------
# what is left of it


def _told(
    options: CompareOptions,
    found: Found,
    contestants: Sequence[Contestant],
    task: dict[str, Any],
    reference: str,
) -> dict[str, Any]:
    known = {
        contestant.name: {
            "folder": contestant.folder,
            "kind": contestant.kind,
            "foreign": not contestant.knows_task(task["digest"]),
            "card": contestant.card,
            **{
                name: {size: own[name] for size, own in found.examined[contestant.name].items()}
                for name in ("gates", "forgotten_class_recall", "nearest_training")
            },
        }
        for contestant in contestants
    }
    return {
        "mergers": known,
        "reference": reference,
        "failed": found.failed,
        "options": asdict(options),
        "command": shlex.join(["python", "-m", "evaluation.compare", *words(changed(options))]),
        "protocol": protocol(),
        "versions": versions(),
    }


def _write(
    out: Path, lines: Sequence[Line], meta: dict[str, Any], figures: Mapping[str, Figure]
) -> list[Path]:
    """Pages and pictures, beside the leaderboard."""
    captions = {name: caption(name) for name in figures}
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png", dpi=PIXELS)
    write_whole(out / "report.html", report_page(lines, meta, figures, captions))
    files = {f"{name}.png": text for name, text in captions.items()}
    write_whole(out / "report.md", report_markdown(lines, meta, files))
    names = ("leaderboard.json", "leaderboard.meta.json", "report.html", "report.md", *files)
    return [out / name for name in names]


def _track(
    tracked: Any, lines: Sequence[Line], contestants: Sequence[Contestant], files: Sequence[Path]
) -> None:
    """A child run for every row, the mergers' own figures, and the files."""
    for row in (line.scored.row() for line in lines):
        named = {k: row[k] for k in ("method", "members", "data", "control")}
        numbers = {k: row[k] for k in row if k not in named}
        title = f"{row['method']} K={row['members']}, {row['data']}"
        tracked.child(title, options=named, metrics=numbers, seconds=row["seconds"])
    names = {contestant.name for contestant in contestants}
    own = [line.scored for line in lines if line.scored.method in names]
    tracked.metrics({f"{s.method}_accuracy_k{s.members}": s.row()["accuracy_mean"] for s in own})
    for file in files:
        tracked.artifact(file)


def _sound(told: Mapping[str, Any]) -> bool:
    """Whether a merger holds all its gates, here and where it was trained."""
    found = [*told["gates"].values(), *told["card"]["gates"].values()]
    return all(gate["passed"] for gates in found for gate in gates)


def terminal() -> Console:
    """A console wide enough for the table where the output is a file or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 140))


def _on_command(options: CompareOptions) -> None:
    state = launched_processes()
    console = terminal() if state.is_main_process else Console(quiet=True)
    if options.suite:
        run_suite(options, console, compare, state)
    else:
        compare(options, console, state)


def main() -> None:
    """Entry point of ``python -m evaluation.compare``."""
    command(CompareOptions, _on_command, prog="python -m evaluation.compare")


if __name__ == "__main__":
    main()
