"""What families of networks are scored on."""

from metamerge.errors import ConfigError
from zoo.build import split_of
from zoo.parts import TaskSplit
from zoo.recipe import options_from
from zoo.store import Zoo

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
