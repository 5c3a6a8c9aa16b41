"""What a reader has to know of a comparison beside its figures."""

import platform
from importlib.metadata import version
from typing import Any

from evaluation import controls
from evaluation.judged import Judged
from evaluation.significance import HOW

TOLD = ("metamerge", "torch", "torch-geometric", "accelerate", "numpy", "scikit-learn", "mlflow")


def task_of(judged: Judged) -> dict[str, Any]:
    """The task of families that do not come from a zoo, as a zoo's manifest tells it."""
    task = judged.split.task
    return {"name": task.name, "digest": task.digest, "classes": task.classes}


def about_images(judged: Judged) -> dict[str, int]:
    """How many images each part of the task has."""
    parts = ("segments", "objective", "validation", "test")
    return {part: len(judged.split.rows(part)) for part in parts}


def protocol() -> dict[str, str]:
    """How rows are made and compared, in words."""
    return {
        "data": "what a method was given at merge time, out of the objective and validation "
        "images; mergers were trained once, before, on the objective images of their own zoos; a "
        "foreign merger never saw this task",
        "controls": f"learning rate from {controls.RATES} chosen on a quarter of the images, or on "
        "the validation images where all are given, then trained on all that are given; controls "
        "with unlabelled images may use labels for that choice and that of the best member, and "
        "for nothing else",
        "test": "test images score and choose nothing",
        "differences": HOW,
    }


def versions() -> dict[str, str]:
    """Versions of what computed it."""
    return {"python": platform.python_version(), **{name: version(name) for name in TOLD}}
