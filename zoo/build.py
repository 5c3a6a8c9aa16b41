"""Build a zoo: ``python -m zoo.build --task digits --members 2 4 8``.

Families of K networks, each trained on a segment of its own, a shard of many families at a time. A
zoo is rebuilt only when an option that shapes it has changed; a build that was interrupted goes on
with the shards that are missing. ``accelerate launch -m zoo.build`` shares them out over processes.
"""

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial

import torch
from accelerate import PartialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from metamerge.errors import ConfigError, ZooError
from metamerge.structure import Program
from zoo.augmentation import Augmentation
from zoo.files import is_whole
from zoo.options import command
from zoo.parts import TaskSplit, split_task
from zoo.plan import Shard, plan_shards
from zoo.recipe import COUNTS, ZooOptions, factory_for, options_from
from zoo.reference import features_for
from zoo.shards import train_shard
from zoo.store import Zoo, files_of, group_name, load_zoo, read_manifest
from zoo.tasks import load_task
from zoo.trainable import check_trainable
from zoo.writing import Building, check_place, locked

Report = Callable[[str, int, int], None]
"""What is being trained, members that are done, members in all."""


def split_of(zoo: Zoo) -> TaskSplit:
    """The task of a zoo and its parts, as they were when it was built.

    Args:
        zoo: The zoo.

    Returns:
        The split.

    Raises:
        ZooError: If the task's data are not those that the zoo was built on, or nobody knows them.
    """
    if zoo.options is None:
        raise ZooError(
            f"{zoo.folder} was adopted from {zoo.manifest['source']['folder']}: nobody knows which "
            "images its members saw, so nothing can be judged on it. Merge its families, or look "
            "at them with `python -m zoo.show`."
        )
    split = cut_task(options_from(zoo.options))
    told, found = zoo.manifest["task"]["digest"], split.task.digest
    if told != found:
        raise ZooError(
            f"{zoo.folder} was built on other data of task {split.task.name!r}: their digest is "
            f"{told[:12]}, that of the data found now {found[:12]}. Get those data, or build anew."
        )
    return split


def cut_task(options: ZooOptions) -> TaskSplit:
    """Load the task that options name, and cut it into its parts.

    Args:
        options: Of a zoo.

    Returns:
        The split.
    """
    task = load_task(
        options.task, options.data, target=options.target, kind=options.kind, drop=options.drop
    )
    return split_task(task, seed=options.seed, objective=options.objective)


def build(
    options: ZooOptions, *, progress: Report | None = None, state: PartialState | None = None
) -> Zoo:
    """Build a zoo, or open it if it is there already with the same options.

    Shards that are missing or damaged are trained; those that are whole are kept, also when more
    families are asked for than the folder holds.

    Args:
        options: What to build.
        progress: Called as shards are trained.
        state: The processes among which shards are shared out, all of which call this; by default
            this process does everything, on the CPU.

    Returns:
        The zoo.

    Raises:
        ConfigError: If options do not fit the task or each other.
        ZooError: If segments cannot be cut, members diverge, or the folder holds a zoo of other
            options or something else, or cannot be written.
    """
    folder, main = options.folder, state is None or state.is_main_process
    check_place(folder)  # before the lock: a place that is refused is left as it was
    if state is None or state.num_processes == 1:
        there = _finished(options)
        if there is not None:  # on a disk that may be read-only
            return there
    with locked(folder) if main else nullcontext():
        _wait(state)  # nobody looks before the main process has its turn
        there = _finished(options)
        if there is not None:
            _wait(state)
            return there
        older = read_manifest(folder) and load_zoo(folder)
        if older is not None and older.digest != options.digest:
            _check_growth(older, options)
        return _build(options, older, progress, state)


def _finished(options: ZooOptions) -> Zoo | None:
    """The zoo, if it is there with all of its shards; what its build left behind is deleted."""
    folder = options.folder
    older = read_manifest(folder) and load_zoo(folder)
    if older is None or older.digest != options.digest:
        return None
    if not all(is_whole(folder, entry) for entry in files_of(older.groups)):
        return None
    Building(folder, options.digest).discard()
    return older


def _wait(state: PartialState | None) -> None:
    if state is not None:
        state.wait_for_everyone()


def _check_growth(older: Zoo, options: ZooOptions) -> None:
    """Refuse to replace a zoo, unless the new one is that one and more."""
    told, asked = older.options or {}, options.shaping
    differ = [name for name in asked if name not in told or told[name] != asked[name]]
    fewer = [n for n in COUNTS[1:] if asked[n] < told.get(n, 0)]
    gone = not set(told.get("members", ())) <= set(asked["members"])
    if set(differ) - set(COUNTS) or fewer or gone:
        raise ZooError(
            f"{older.folder} holds a zoo with other options ({', '.join(differ)}). Choose another "
            "--out, or delete it."
        )


def _build(
    options: ZooOptions, older: Zoo | None, progress: Report | None, state: PartialState | None
) -> Zoo:
    main = state is None or state.is_main_process
    split = cut_task(options)
    program = _program(options, split)
    plan = plan_shards(options, split, program)
    building = Building(options.folder, options.digest)
    if main:
        building.open()
        if older is not None:
            building.take(older)
    _wait(state)
    done = building.shards()
    missing = [shard for shard in plan if shard.key not in done]
    _wait(state)  # nobody adds shards before everybody has seen which are missing
    first, step = (0, 1) if state is None else (state.process_index, state.num_processes)
    own = missing[first::step]
    given = features_for(options, split) if own else {}
    device = "cpu" if state is None else state.device
    trained, total = 0, sum(shard.size for shard in own)
    for shard in own:
        name = f"{shard.part} families of {shard.members}"
        report = progress and partial(_report, progress, name, trained, total)
        place = (shard.part, shard.members)
        tensors = train_shard(options, split, program, place, shard.families, given, device, report)
        building.add(shard.key, tensors, members=shard.members)
        trained += shard.size
    _wait(state)
    if main:
        _finish(options, split, program, plan, building)
    _wait(state)
    return load_zoo(options.folder)


def _report(progress: Report, name: str, before: int, total: int, trained: int) -> None:
    progress(name, before + trained, total)


def _program(options: ZooOptions, split: TaskSplit) -> Program:
    """The architecture, once everything is known to fit the task."""
    task, shape = split.task, tuple(split.task.inputs.shape[1:])
    variants = {"relabel": options.relabel, "classes_per_family": options.classes_per_family}
    for name, value in variants.items():
        if value and task.regression:
            raise ConfigError(f"{name}: {task.name!r} has no classes, its targets are numbers.")
    if task.classes and options.classes_per_family > task.classes:
        raise ConfigError(
            f"classes_per_family: got {options.classes_per_family}, {task.name!r} has "
            f"{task.classes} classes."
        )
    mirrored = Augmentation.parse(options.augment)
    if len(shape) == 1 and (mirrored.flip or mirrored.shift or options.flip_families):
        raise ConfigError(
            f"augment, flip_families: {task.name!r} is a table, whose columns have no neighbours. "
            "Tables take noise."
        )
    network = factory_for(options, task)
    outputs = options.classes_per_family or task.outputs
    return check_trainable(network(), shape, outputs, options.architecture)


def _finish(
    options: ZooOptions, split: TaskSplit, program: Program, plan: list[Shard], building: Building
) -> None:
    groups: dict[str, list[str]] = {}
    for shard in plan:
        groups.setdefault(group_name(shard.part, shard.members), []).append(shard.key)
    task = split.task
    told = {
        "name": task.name,
        "digest": task.digest,
        "classes": task.classes,
        "outputs": task.outputs,
        "labels": list(task.labels),
        "notes": list(task.notes),
        "scaling": {name: values.tolist() for name, values in split.scaling.items()},
    }
    manifest = {
        "digest": options.digest,
        "options": json.loads(json.dumps(asdict(options))),
        "task": told,
        "program": program.to_json(),
        "source": None,
    }
    building.finish(groups, manifest)


def build_with_progress(
    options: ZooOptions, console: Console | None = None, state: PartialState | None = None
) -> Zoo:
    """``build`` with a progress bar and a closing line in the terminal.

    Args:
        options: What to build.
        console: Where to print.
        state: The processes among which shards are shared out.

    Returns:
        The zoo.
    """
    console = console or Console()
    started = time.perf_counter()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=console.quiet) as bar:
        task = bar.add_task("zoo", total=None)
        zoo = build(
            options,
            progress=lambda what, done, total: bar.update(
                task, description=f"zoo: {what}", completed=done, total=total
            ),
            state=state,
        )
    networks = sum(group["families"] * group["members"] for group in zoo.groups.values())
    seconds = time.perf_counter() - started
    for note in (zoo.manifest["task"] or {}).get("notes", ()):
        console.print(f"[bold]note[/] {note}", highlight=False)
    console.print(f"[bold]zoo[/] {zoo.folder}: {networks} networks ready in {seconds:.1f} s")
    return zoo


def _on_command(options: ZooOptions) -> None:
    state = PartialState(cpu=not torch.cuda.is_available())
    build_with_progress(options, Console(quiet=not state.is_main_process), state)


def main() -> None:
    """Entry point of ``python -m zoo.build``."""
    command(ZooOptions, _on_command, prog="python -m zoo.build")


if __name__ == "__main__":
    main()
