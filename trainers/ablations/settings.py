"""The settings that ablations are measured in."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evaluation.suite_zoos import FASHION, MNIST_MIXED, SKEWED
from zoo.recipe import ZooOptions


@dataclass(frozen=True)
class Setting:
    """Families and how long mergers learn from them.

    Attributes:
        title: What it is.
        zoo: Its zoo.
        options: Options of ``trainers/merger.py`` that differ from the defaults.
    """

    title: str
    zoo: ZooOptions
    options: Mapping[str, Any]


_SHORT = {"target": 1.0, "tracking": False, "save_every": 10_000}
SETTINGS = {
    "digits": Setting(
        "digits, MLP 64-32-10, Dirichlet 0.4, K=4 and 8",
        ZooOptions(members=(4, 8)),
        {**_SHORT, "families": 8, "steps": 100, "eval_every": 50},
    ),
    "fashion-skewed": Setting(
        "Fashion-MNIST, MLP 784-64-10, Dirichlet 0.3, 1,500 images per segment, class names "
        "permuted per family, K=4",
        ZooOptions(**FASHION, **SKEWED, widths=(64,), members=(4,), train_families=96),
        {**_SHORT, "prior": 7, "families": 6, "images": 256, "steps": 90, "eval_every": 45},
    ),
    "fashion-skewed-cnn": Setting(
        "Fashion-MNIST, CNN 8-16, Dirichlet 0.3, 1,500 images per segment, class names permuted "
        "per family, K=4",
        ZooOptions(
            **FASHION,
            **SKEWED,
            architecture="convnet",
            widths=(8, 16),
            members=(4,),
            train_families=32,
            validation_families=16,
            test_families=16,
        ),
        {**_SHORT, "families": 4, "images": 192, "steps": 90, "eval_every": 45},
    ),
    "mnist-cnn": Setting(
        "MNIST, CNN 8-16, Dirichlet 0.3 to 3, 1,500 images per segment, class names permuted per "
        "family, K=2 and 4",
        MNIST_MIXED[-1],
        {**_SHORT, "families": 8, "images": 192, "steps": 120, "eval_every": 60},
    ),
}
