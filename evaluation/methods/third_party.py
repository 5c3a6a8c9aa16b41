"""Two networks that somebody else trained, as a setting of the table of all methods."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from evaluation.methods.settings import Draw, Setting, drawn_budget, official_rows
from metamerge.checkpoints import read_checkpoints
from metamerge.errors import ConfigError
from metamerge.structure import Layout, discover_program
from metamerge.weights import Weights, stack
from zoo.architectures import program_of
from zoo.tasks import load_task

THIRD_PARTY = "third-party"
TITLE = "MNIST, two third-party CNNs, skewed classes"
DRAWS = 3  # of calibration images, as there is one family only


class ThirdPartyCNN(nn.Module):
    """The MNIST network of pygmtools' example of model fusion; a state dict without biases.

    Source: the pygmtools repository, ``examples/data/example_model_fusion_1.dat`` and ``_2.dat``
    (Mulan PSL v2). Padding repeats the border; pooling pads by one, so maps are 15 x 15 and 7 x 7.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 5, bias=False)
        self.conv2 = nn.Conv2d(32, 64, 5, bias=False)
        self.fc1 = nn.Linear(7 * 7 * 64, 32, bias=False)
        self.fc2 = nn.Linear(32, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images in [0, 1], ``[b, 1, 28, 28]``, to logits ``[b, 10]``."""
        for convolution in (self.conv1, self.conv2):
            x = F.relu(convolution(F.pad(x, (1, 1, 1, 1), mode="replicate")))
            x = F.max_pool2d(x, 2, padding=1)
        return self.fc2(self.fc1(x.flatten(1)))


def read_pair(files: Sequence[str]) -> Weights:
    """Read the two networks.

    Args:
        files: Their files.

    Returns:
        One family, ``[1, m, ...]``.

    Raises:
        ConfigError: If the files hold other networks.
    """
    members = [found for file in files for found in read_checkpoints(file)]
    expected = {key: t.shape for key, t in ThirdPartyCNN().state_dict().items()}
    for member in members:
        got = {key: t.shape for key, t in member.weights.items()}
        if got != expected:
            raise ConfigError(
                f"third_party: {member.name} holds {got}, expected {expected}: the example "
                "networks of pygmtools, examples/data/example_model_fusion_1.dat and _2.dat."
            )
    return {k: t[None] for k, t in stack([member.weights for member in members]).items()}


def third_party_setting(
    files: Sequence[str], *, draws: int, data: str | None, seed: int = 0
) -> Setting:
    """Two networks that others trained, with several draws of calibration images.

    Args:
        files: Their files.
        draws: Draws of calibration images, from the training images of MNIST; 0 for the usual ones.
        data: Folder with the IDX files of MNIST.
        seed: Seed of the first draw.

    Returns:
        The setting.

    Raises:
        ConfigError: If the files hold other networks.
    """
    families = read_pair(files)
    task = load_task("mnist", data)
    program = program_of(ThirdPartyCNN(), tuple(task.inputs.shape[1:]))
    seeds = range(seed, seed + (draws or DRAWS))
    images, (free, test) = (task.inputs, task.targets), official_rows(task)
    budgets = [drawn_budget(images, free, s) for s in seeds]
    return Setting(
        name=THIRD_PARTY,
        title=TITLE,
        task="mnist",
        layout=Layout(program, discover_program(program)),
        network=ThirdPartyCNN,
        starts={
            "own": [Draw(families, None, b, None, s) for b, s in zip(budgets, seeds, strict=True)]
        },
        test=(task.inputs[test], task.targets[test]),
        images=images,
        recipe={},
        identity={"members": _sums(families), "seeds": list(seeds), "task": task.digest},
        one_family=True,
    )


def _sums(weights: Weights) -> list[float]:
    return [float(tensor.double().sum()) for tensor in weights.values()]
