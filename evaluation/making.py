"""Making the rows of a comparison: what is missing is made, by as many processes as there are."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from evaluation import by_heart, examination, gates
from evaluation.bench import Bench
from evaluation.competitors import Competitor
from evaluation.contestants import Contestant, code_of
from evaluation.examination import examine
from evaluation.judged import Judged
from evaluation.methods.attempts import attempted
from evaluation.methods.ledger import Ledger, gathered
from evaluation.processes import share
from evaluation.scored import Scored, over_seeds

LEDGER = "rows.jsonl"

Row = Mapping[str, Any]
Competitors = Callable[[Bench], Sequence[Competitor]]


@dataclass(frozen=True)
class Found:
    """What was found on families of all sizes.

    Attributes:
        scored: Rows, over all seeds.
        failed: Rows of merge methods that could not be made: ``members``, ``method``, ``data`` and
            ``error``.
        examined: Name of a merger -> ``k<members>`` -> what ``examine`` found.
    """

    scored: list[Scored]
    failed: list[dict[str, Any]]
    examined: dict[str, dict[str, Row]]


@dataclass(frozen=True)
class _Piece:
    """Something to be made once and kept under its key."""

    about: str
    key: str
    ledger: Ledger
    make: Callable[[], Row]


def make_rows(
    judged: Sequence[Judged],
    competitors: Competitors,
    contestants: Sequence[Contestant],
    seeds: Sequence[int],
    *,
    out: Path,
    limit: int,
    state: PartialState,
    console: Console,
) -> Found:
    """Make every row that is not kept yet, and read all of them.

    Args:
        judged: The families, one entry per number of members.
        competitors: Which rows there are for a bench.
        contestants: Mergers, to be examined.
        seeds: Seeds; rows that do not depend on any are made with the first.
        out: Folder of the ledger.
        limit: Seconds after which an optional row is given up.
        state: The processes that share the rows.
        console: Where to show progress.

    Returns:
        What was found, for all processes.
    """
    parts = [out / f"rows.{rank}.jsonl" for rank in range(state.num_processes)]
    if state.is_main_process:
        gathered(out / LEDGER, sorted({*parts, *out.glob("rows.*.jsonl")}))  # of a killed command
    state.wait_for_everyone()
    place = (out, parts[state.process_index] if state.num_processes > 1 else None)
    found = Found([], [], {contestant.name: {} for contestant in contestants})
    told = (competitors, contestants, tuple(dict.fromkeys(seeds)), place, limit)
    for one in judged:
        rows, gates_of = _pieces(one, *told)
        pieces = [piece for repeats in rows for _, piece in repeats] + list(gates_of.values())
        missing = [p for p in pieces if "error" in p.ledger.rows.get(p.key, {"error": "missing"})]
        own = share(missing, state)
        with _progress(console, len(own)) as advance:
            for piece in own:
                advance(piece.about)
                piece.ledger.add(piece.key, piece.make())
    state.wait_for_everyone()
    if state.is_main_process:
        gathered(out / LEDGER, parts)
    state.wait_for_everyone()
    for one in judged:
        _collect(found, one.members, *_pieces(one, *told))
    return found


def _pieces(
    judged: Judged,
    competitors: Competitors,
    contestants: Sequence[Contestant],
    seeds: Sequence[int],
    place: tuple[Path, Path | None],
    limit: int,
) -> tuple[list[list[tuple[Competitor, _Piece]]], dict[str, _Piece]]:
    """Rows of families of one size, each with one piece per seed, and examinations of mergers."""
    size, by_row = judged.members, {}
    for seed in seeds:
        bench = Bench(judged, seed)
        options = {**judged.identity, "seed": seed}
        ledger = Ledger(place[0] / LEDGER, options, into=place[1])
        for row in competitors(bench):
            if row.random or seed == seeds[0]:
                key = f"K={size}; {row.method}; {row.data}; {row.code}"
                about = f"K={size}: {row.method}, {row.data}"
                piece = _Piece(about, key, ledger, partial(_made, row, limit))
                by_row.setdefault((row.method, row.data), []).append((row, piece))
        if seed == seeds[0] and bench.count > 1:  # gates compare families
            examinations = {c.name: _examination(c, bench, ledger) for c in contestants}
    return list(by_row.values()), examinations if len(judged) > 1 else {}


def _made(row: Competitor, limit: int) -> Row:
    if row.optional:
        return attempted(lambda: row.score().record(), row.data, limit)
    return row.score().record()


def _examination(contestant: Contestant, bench: Bench, ledger: Ledger) -> _Piece:
    code = code_of(gates, by_heart, examination)
    key = f"K={bench.members}; gates; {contestant.code}; {code}"
    about = f"K={bench.members}: gates of {contestant.name}"
    return _Piece(about, key, ledger, partial(examine, bench, contestant))


def _collect(
    found: Found,
    size: int,
    rows: Sequence[Sequence[tuple[Competitor, _Piece]]],
    examinations: Mapping[str, _Piece],
) -> None:
    """Read rows of one size from their ledgers."""
    kept: dict[str, list[Scored]] = {}
    for repeats in rows:
        row = repeats[0][0]
        records = [piece.ledger.rows[piece.key] for _, piece in repeats]
        errors = [record["error"] for record in records if "error" in record]
        if errors:
            told = {"members": size, "method": row.method, "data": row.data}
            found.failed.append({**told, "error": errors[0]})
        elif not any("refused" in record for record in records):
            one = over_seeds([Scored.from_record(record) for record in records])
            same = [own for own in kept.get(row.method, ()) if row.optional and _equal(own, one)]
            if not same:  # images that made no difference make no row of their own
                kept.setdefault(row.method, []).append(one)
                found.scored.append(one)
    for name, piece in examinations.items():
        found.examined[name][f"k{size}"] = piece.ledger.rows[piece.key]


def _equal(one: Scored, other: Scored) -> bool:
    return torch.equal(one.accuracies, other.accuracies)


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    """A bar; the call that is yielded says what is made next."""
    columns = (TextColumn("{task.description:.60}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeElapsedColumn(), console=console, transient=True, disable=console.quiet
    ) as bar:
        task = bar.add_task("compare", total=total, completed=-1)
        yield lambda what: bar.update(task, advance=1, description=what)
