"""Train a merger without each of its parts, several times, and tell what every part earns.

``python -m trainers.ablations`` trains the whole merger and every case of ``cases.py`` with several
seeds in each setting of ``settings.py``, judges them on families that none has seen, and writes
differences to the whole merger, paired over families and seeds: ``ablations.json``,
``ablations.md`` and ``ablations.png``. Which parts to keep is to be told by validation families;
test families and test images stand beside them. Finished rows are kept: the same command goes on
where it was stopped, and several at once share out ``--settings`` or ``--seeds``.
"""

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor

from evaluation.methods.ledger import Ledger, digest_of
from evaluation.metrics import common_task
from metamerge.errors import ConfigError
from trainers.ablations.cases import CASES, Case, hold
from trainers.ablations.judging import judge, unaligned
from trainers.ablations.settings import SETTINGS, Setting
from trainers.ablations.table import write_table
from trainers.families import Data, Families, load_families, read_data
from trainers.merger import MergerOptions, fit, make_merger
from zoo.build import build_with_progress
from zoo.options import command
from zoo.parts import TaskSplit
from zoo.store import Zoo

INPUTS = 300  # objective images that members are watched on where they are


@dataclass(frozen=True)
class AblationOptions:
    """Leave out every part of a merger in turn, and see what it earns."""

    out: str = "runs/ablations"  # folder of rows, table and picture
    settings: tuple[str, ...] = tuple(SETTINGS)  # digits, fashion-skewed(-cnn), mnist-cnn
    parts: tuple[str, ...] = ()  # parts to leave out; all if not given
    seeds: tuple[int, ...] = (0, 1, 2)  # seeds of inits and batches

    def __post_init__(self) -> None:
        """Refuse names that there are none of.

        Raises:
            ConfigError: Naming the option.
        """
        known = {"settings": tuple(SETTINGS), "parts": tuple(dict.fromkeys(c.part for c in CASES))}
        for name, allowed in known.items():
            for value in getattr(self, name):
                if value not in allowed:
                    raise ConfigError(f"{name}: got {value!r}, expected some of {allowed}.")


class Grounds(NamedTuple):
    """What mergers of a setting learn from and are judged on.

    Attributes:
        data: Training and validation families.
        test: Test families with test images.
        inputs: Objective images that members may be watched on.
        split: The task, which refuses test images while it is guarded.
    """

    data: Data
    test: list[Families]
    inputs: Tensor
    split: TaskSplit


def ablate(options: AblationOptions, console: Console) -> dict[str, Any]:
    """Train and judge what is missing, write table and picture.

    Args:
        options: What to leave out.
        console: Where to print.

    Returns:
        What ``ablations.json`` holds.
    """
    accelerator = Accelerator(cpu=True)
    rows = []
    for name in options.settings:
        setting, ledger = SETTINGS[name], Ledger(Path(options.out) / "rows.jsonl", {})
        keys = {_key(name, setting, case, seed): (case, seed) for case, seed in _wanted(options)}
        missing = {key: told for key, told in keys.items() if key not in ledger}
        if missing:
            zoo = build_with_progress(setting.zoo, console)
            grounds = _grounds(zoo)
            for place, (key, (case, seed)) in enumerate(missing.items(), 1):
                row = _row(setting, case, seed, zoo, grounds, accelerator, Path(options.out))
                ledger.add(key, {"setting": name, "case": [case.part, case.name], **row})
                score = sum(row["validation"]["refined"]) / len(row["validation"]["refined"])
                console.print(
                    f"{name} {place}/{len(missing)} {case.part} {case.name}, seed {seed}: "
                    f"{100 * score:.2f} on validation families, {row['seconds']:.0f} s",
                    highlight=False,
                )
        rows += [ledger.rows[key] for key in keys]
    return write_table(Path(options.out), rows, console)


def _wanted(options: AblationOptions) -> Iterator[tuple[Case, int]]:
    """Cases and seeds, seed after seed: a table of one seed is there first."""
    for seed in options.seeds:
        for case in CASES:
            if not case.part or not options.parts or case.part in options.parts:
                yield case, seed


def _key(name: str, setting: Setting, case: Case, seed: int) -> str:
    """Key of a row: what it is called, and a hash of everything that shapes it."""
    shaping = [setting.zoo.digest, dict(setting.options), repr(case), INPUTS]
    return f"{name}; {case.part}; {case.name}; {seed}; {digest_of({'shaping': shaping})}"


def _grounds(zoo: Zoo) -> Grounds:
    split = common_task(zoo)
    test = list(load_families(zoo, "test", split.images("test")).values())
    with split.training():
        data = read_data([(zoo, split)], torch.device("cpu"))
        return Grounds(data, test, split.images("objective")[0][:INPUTS], split)


def _row(
    setting: Setting,
    case: Case,
    seed: int,
    zoo: Zoo,
    grounds: Grounds,
    accelerator: Accelerator,
    out: Path,
) -> dict[str, Any]:
    """Train a merger and judge it."""
    clock = time.perf_counter()
    place = out / "training" / digest_of({"key": _key(zoo.folder.name, setting, case, seed)})
    given: Mapping[str, Any] = {**setting.options, **case.options, "seed": seed, "out": str(place)}
    options, data, test = MergerOptions(**given), grounds.data, grounds.test
    if not case.aligned:
        data = replace(
            data,
            training=unaligned(data.training, zoo, "train"),
            validation=unaligned(data.validation, zoo, "validation"),
        )
        test = unaligned(test, zoo, "test")
    merger = make_merger(options, data.training)
    hold(merger, case.held)
    with ExitStack() as guards:
        guards.enter_context(grounds.split.training())
        best, _ = fit(options, accelerator, Console(quiet=True), data, merger, guards)
    merger.load_state_dict(best.weights)
    merger.eval()
    trained = time.perf_counter() - clock
    row = {
        "seed": seed,
        "validation": judge(merger, data.validation, grounds.inputs),
        "test": judge(merger, test, grounds.inputs),
        "seconds": trained,
    }
    shutil.rmtree(f"{place}.state", ignore_errors=True)
    return row


def main() -> None:
    """Entry point of ``python -m trainers.ablations``."""
    prog = "python -m trainers.ablations"
    command(AblationOptions, lambda options: ablate(options, Console()), prog=prog)


if __name__ == "__main__":
    main()
