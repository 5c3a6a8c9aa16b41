"""Scores of networks, batched over families."""

from torch import Tensor

from metamerge.errors import ConfigError
from metamerge.structure import Program
from metamerge.weights import Weights
from zoo.build import split_of
from zoo.parts import TaskSplit
from zoo.recipe import options_from
from zoo.store import Zoo
from zoo.training import predict

VARIANTS = ("classes_per_family", "permute_pixels", "flip_families")  # all but relabel


def common_task(zoo: Zoo) -> TaskSplit:
    """The classification that all families of a zoo learned, cut into its parts.

    Families may know its classes by numbers of their own (``relabel``): their records hold the map.

    Args:
        zoo: The zoo.

    Returns:
        The split.

    Raises:
        ConfigError: If the zoo is one of regressions, or of families that see other inputs or know
            fewer classes than others.
        ZooError: If the task's data are not those that the zoo was built on, or nobody knows them.
    """
    split, options = split_of(zoo), options_from(zoo.options)
    own = [name for name in VARIANTS if getattr(options, name)]
    if split.task.regression or own:
        what = "numbers, not classes" if split.task.regression else f"variants ({', '.join(own)})"
        raise ConfigError(
            f"{zoo.folder}: its members predict {what}. Mergers are trained and compared here on "
            "the same images and classes for all families, whatever these call the classes: build "
            "a zoo of them. merge() and `python -m zoo.show` take this one."
        )
    return split


def family_logits(program: Program, families: Weights, inputs: Tensor) -> Tensor:
    """Logits of all members of all families.

    Args:
        program: The architecture.
        families: ``[f, m, ...]``.
        inputs: ``[b, ...]``.

    Returns:
        ``[f, m, b, c]``.
    """
    count, members = next(iter(families.values())).shape[:2]
    flat = {key: tensor.flatten(0, 1) for key, tensor in families.items()}
    return predict(program, flat, inputs).unflatten(0, (count, members))


def accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    """Share of inputs whose largest logit is that of their class.

    Args:
        logits: Logits or probabilities ``[..., b, c]``.
        targets: ``[b]``, or ``[f, b]`` for families that number classes by themselves.

    Returns:
        ``[...]``.
    """
    return (logits.argmax(-1) == targets).float().mean(-1)


def references(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """What a merge of each family is measured against.

    Args:
        logits: Logits of all members, ``[f, m, b, c]``.
        targets: ``[b]``.

    Returns:
        ``best_member``, ``mean_member`` and ``ensemble`` (soft vote), each ``[f]``.
    """
    members = accuracy(logits, targets)  # [f, m]
    return {
        "best_member": members.amax(1),
        "mean_member": members.mean(1),
        "ensemble": accuracy(logits.softmax(-1).mean(1), targets),
    }
