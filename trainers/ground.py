"""What trainings in pieces stand on: the task and its parts, the architecture, segments."""

import json
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

import torch
from torch import Tensor

from evaluation.metrics import accuracy
from metamerge.errors import ConfigError
from metamerge.structure import Layout, discover_program
from metamerge.weights import Weights
from trainers.learners import Learners
from zoo.architectures import frozen
from zoo.augmentation import Augmentation
from zoo.build import cut_task
from zoo.families import draw_families
from zoo.recipe import ZooOptions, factory_for
from zoo.reference import features_for
from zoo.trainable import check_trainable
from zoo.training import init_networks, predict

UNION = 2**61  # inits of networks that are trained on the union lie beyond those of members


@dataclass(frozen=True)
class Course:
    """One training in rounds.

    Attributes:
        members: How many segments there are.
        seed: Of segments, inits and orders of images.
        lr: Learning rate of the members.
        passes: Passes of every round over the union of the segments; with these it is one network
            that is trained, on all of them.
    """

    members: int
    seed: int
    lr: float
    passes: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """Of its folder and of its row in the ledger."""
        told = f"k{self.members}-seed{self.seed}-lr{self.lr:g}"
        mark = sha256(json.dumps(self.passes).encode()).hexdigest()[:8]
        return f"union-{told}-{mark}" if self.passes else told


class Ground:
    """The task, the architecture, and what is drawn from them.

    Args:
        options: What a zoo of such segments and networks would be built by.
        device: Where networks are trained and judged.

    Raises:
        ConfigError: If there are no classes, or the architecture cannot be trained in a batch.
    """

    def __init__(self, options: ZooOptions, device: torch.device) -> None:
        self.options, self.device, self.split = options, device, cut_task(options)
        task = self.split.task
        if task.regression:
            raise ConfigError(f"task: {task.name!r} has no classes; it is judged by accuracy.")
        self.factory = factory_for(options, task)
        shape = tuple(task.inputs.shape[1:])
        self.program = check_trainable(self.factory(), shape, task.outputs, options.architecture)
        self.inputs, self.targets = task.inputs.to(device), task.targets.to(device)

    @cached_property
    def layout(self) -> Layout:
        """Weight graph of the architecture."""
        return Layout(self.program, discover_program(self.program))

    def segments(self, course: Course) -> tuple[Learners, Weights]:
        """Segments of a training, and where its members start.

        Args:
            course: The training.

        Returns:
            Who learns what, and their inits ``[m, ...]``.
        """
        options = self.options
        given = features_for(options, self.split)
        place = ("train", course.members)
        drawn = draw_families(options, self.split, place, [course.seed], given)
        learners = Learners(
            program=self.program,
            inputs=self.inputs,
            targets=self.targets,
            rows=drawn.segments,
            seeds=drawn.order_seeds,
            augmentation=Augmentation.parse(options.augment),
            settings={
                "batch_size": options.batch_size,
                "weight_decay": options.weight_decay[0],
                "frozen": frozen(self.factory()),
            },
        )
        if not course.passes:
            return learners, init_networks(self.factory, drawn.init_seeds)
        seed = UNION + course.seed
        return learners.together(seed), init_networks(self.factory, [seed])

    def calibration(self, images: int, *, labels: bool) -> Tensor | tuple[Tensor, Tensor] | None:
        """Objective images that merges may use.

        Args:
            images: How many; 0 for none.
            labels: Whether with their labels.

        Returns:
            What ``merge()`` takes as ``batches``.
        """
        inputs, targets = self.split.images("objective")
        generator = torch.Generator().manual_seed(self.options.seed)
        rows = torch.randperm(len(inputs), generator=generator)[:images]
        if not len(rows):
            return None
        return (inputs[rows], targets[rows]) if labels else inputs[rows]

    def accuracy(self, weights: Weights, part: str) -> Tensor:
        """Accuracy of networks ``[n, ...]`` on the images of a part of the task, ``[n]``."""
        inputs, targets = (tensor.to(self.device) for tensor in self.split.images(part))
        there = {key: tensor.to(self.device) for key, tensor in weights.items()}
        return accuracy(predict(self.program, there, inputs), targets).cpu()
