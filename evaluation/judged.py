"""Who is judged: families that no merger was trained on, and the images that are theirs to use."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from accelerate import PartialState
from rich.console import Console
from torch import Tensor, nn

from evaluation.budgets import Budget
from evaluation.contestants import Contestant
from evaluation.methods.third_party import ThirdPartyCNN, read_pair
from metamerge.errors import ConfigError
from metamerge.structure import Layout, discover_program
from metamerge.weights import Weights
from zoo.architectures import frozen, program_of
from zoo.build import build_with_progress
from zoo.parts import TaskSplit, split_task
from zoo.recipe import factory_for, options_from
from zoo.store import Zoo, load_zoo
from zoo.tasks import load_task
from zoo.variants import Variants

HELD_BACK = ("seed", "objective")  # options that decide which images of a task are for what
STATISTICS = ("running_mean", "running_var")  # what training leaves alone
PAIR_OBJECTIVE = 6666  # objective images of the two third-party networks


@dataclass(frozen=True, eq=False)
class Judged:
    """Families of one number of members.

    Attributes:
        name: What their members are called, before ``/<family>/<member>``.
        layout: Their architecture.
        families: Members as they were trained, ``[f, m, ...]``.
        classes: Class of the task -> class of each family, ``[f, c]``; None where all families know
            them by the task's numbers.
        split: The task, and which of its images are for what.
        network: Makes a freshly initialised one; None where nobody knows how.
        segments: Rows of the task that each family has learned from; None where nobody knows.
        recipe: ``epochs``, ``batch_size`` and ``lr`` of members, where segments are known.
        training: Training families of the same zoo and their ``classes``; None where there are
            none.
        identity: What tells them apart from others, for ledgers; JSON can hold it.
        bases: What the members of each family were fine-tuned from, ``[f, ...]``; None if nothing.
        note: What a reader has to know of them, if anything.
    """

    name: str
    layout: Layout
    families: Weights
    classes: Tensor | None
    split: TaskSplit
    network: Callable[[], nn.Module] | None
    segments: list[Tensor] | None
    recipe: Mapping[str, Any]
    training: tuple[Weights, Tensor | None] | None
    identity: Mapping[str, Any]
    bases: Weights | None = None
    note: str = ""

    def alone(self, family: int) -> "Judged":
        """One of the families."""
        own = slice(family, family + 1)
        return replace(
            self,
            families={key: tensor[own] for key, tensor in self.families.items()},
            classes=None if self.classes is None else self.classes[own],
            segments=None if self.segments is None else self.segments[own],
            identity={**self.identity, "families": 1, "family": family},
        )

    @property
    def members(self) -> int:
        """Members per family."""
        return next(iter(self.families.values())).shape[1]

    def __len__(self) -> int:
        """Number of families."""
        return len(next(iter(self.families.values())))

    @property
    def parameters(self) -> int:
        """Parameters of one network."""
        return sum(t[0, 0].numel() for t in self.families.values() if t.is_floating_point())

    @property
    def budget(self) -> Budget:
        """All images that merges and controls may use: objective and validation images."""
        if self.network is None:
            still = [key for key in self.families if key.endswith(STATISTICS)]
        else:
            still = frozen(self.network())
        images = (self.split.images(part) for part in ("objective", "validation"))
        return Budget(*images, tuple(still))


def open_zoo(
    folder: str | None,
    contestants: Sequence[Contestant],
    console: Console,
    state: PartialState | None = None,
) -> Zoo:
    """The zoo to judge on, in which objective and test images are what they are for every merger.

    Args:
        folder: Where it lies; by default the zoo that the mergers were trained on, which is built
            if it is not there.
        contestants: The mergers. They may come from other tasks.
        console: Where to print.
        state: The processes that build it, if it has to be built.

    Returns:
        The zoo.

    Raises:
        ConfigError: If there is not one zoo, or its test images may be known to a merger.
    """
    told = {zoo["digest"]: zoo["options"] for c in contestants for zoo in c.card["zoos"]}
    if folder is None and len(told) != 1:
        raise ConfigError(
            f"zoo: the mergers were trained on {len(told)} zoos. Name the one whose test families "
            "they are to be judged on: --zoo <folder>."
        )
    if folder:
        zoo = load_zoo(folder)
    else:
        zoo = build_with_progress(options_from(*told.values()), console, state)
    for contestant in contestants:
        _check_images(zoo, contestant)
    return zoo


def _check_images(zoo: Zoo, contestant: Contestant) -> None:
    """Refuse zoos of a merger's task that were cut into other parts than those it learned from."""
    for told in contestant.card["zoos"]:
        same = told["task"]["digest"] == zoo.manifest["task"]["digest"]
        differ = [n for n in HELD_BACK if zoo.options[n] != told["options"][n]]
        if same and differ:
            raise ConfigError(
                f"zoo: {zoo.folder} differs from a zoo of {contestant.folder} in "
                f"{', '.join(differ)}, so its test images may be among those that the merger was "
                "trained on. Build one with the same."
            )


def check_cut(split: TaskSplit, seed: int, contestants: Sequence[Contestant]) -> None:
    """Refuse test images that were drawn otherwise than those that mergers of the task were spared.

    Args:
        split: The task, and which of its images are for what.
        seed: Seed of the cut.
        contestants: The mergers.

    Raises:
        ConfigError: If a merger may have been trained on some of the test images.
    """
    for contestant in contestants if split.task.test_rows is None else ():
        for told in contestant.card["zoos"]:
            if told["task"]["digest"] == split.task.digest and told["options"]["seed"] != seed:
                raise ConfigError(
                    f"seeds: {contestant.folder} was trained on images of {split.task.name}, and "
                    f"those it was spared were drawn with seed {told['options']['seed']}. Name "
                    "that seed first, so that they are the test images here."
                )


def zoo_families(zoo: Zoo, split: TaskSplit, members: int, *, most: int = 0) -> Judged:
    """Test families of a zoo.

    Args:
        zoo: The zoo.
        split: Its task, cut into its parts.
        members: Members per family.
        most: Families at most; 0 for all.

    Returns:
        The families.
    """
    options = options_from(zoo.options)
    families = {k: t[: most or len(t)] for k, t in zoo.families("test", members).items()}
    count = len(next(iter(families.values())))
    classes = classes_of(zoo, "test", members)
    training = None
    if options.train_families:
        training = (zoo.families("train", members), classes_of(zoo, "train", members))
    rows = zoo.rows("test", members)[:count]
    return Judged(
        name=f"{zoo.folder}#test-k{members}",
        layout=zoo.layout,
        families=families,
        classes=None if classes is None else classes[:count],
        split=split,
        network=factory_for(options, split.task),
        segments=[own[own >= 0].unique().long() for own in rows],
        recipe={
            "epochs": options.epochs[-1],
            "batch_size": options.batch_size,
            "lr": (options.lr[0] * options.lr[-1]) ** 0.5,  # the middle, where members drew theirs
        },
        training=training,
        identity={"zoo": zoo.digest, "families": count},
        bases=_bases(zoo, members, count),
    )


def _bases(zoo: Zoo, members: int, count: int) -> Weights | None:
    """What families of a shared init looked like when their members parted, where that was kept."""
    if zoo.options["init"] != "shared" or not zoo.options["snapshots"]:
        return None
    return {key: t[:count, 0, 0] for key, t in zoo.snapshots("test", members).items()}


def classes_of(zoo: Zoo, part: str, members: int) -> Tensor | None:
    """Class of the task -> class of each family of a zoo, ``[f, c]``; None where they are equal.

    Args:
        zoo: The zoo.
        part: ``train``, ``validation`` or ``test``.
        members: Members per family.

    Returns:
        The map, for all families of that part and size.
    """
    return Variants.from_records(zoo.records(part, members)).classes


def third_party_pair(files: Sequence[str], *, seed: int = 0) -> Judged:
    """The two networks that others trained, as one family.

    Args:
        files: Their files.
        seed: Seed of the cut of MNIST: which of its training images are objective images.

    Returns:
        One family of two members. Which images they learned from nobody knows.

    Raises:
        ConfigError: If the files hold other networks.
    """
    families = read_pair(files)
    split = split_task(load_task("mnist", None), seed=seed, objective=PAIR_OBJECTIVE)
    program = program_of(ThirdPartyCNN(), tuple(split.task.inputs.shape[1:]))
    sums = [float(tensor.double().sum()) for tensor in families.values()]
    return Judged(
        name="third-party",
        layout=Layout(program, discover_program(program)),
        families=families,
        classes=None,
        split=split,
        network=ThirdPartyCNN,
        segments=None,
        recipe={},
        training=None,
        identity={"members": sums, "task": split.task.digest, "seed": seed},
        note="nobody knows which images the two networks learned from; test images are MNIST's own",
    )
