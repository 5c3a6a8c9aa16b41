"""Networks that the zoo trains: factories that take a task's input shape and number of outputs.

A factory of one's own is named ``package.module:factory``. It is called with shape and outputs and,
where its signature has them, ``widths`` and ``norm``.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from math import prod

import torch.nn.functional as F
from torch import Tensor, nn

from metamerge.errors import ConfigError
from metamerge.structure import Program, trace

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer": partial(nn.GroupNorm, 1),  # over channels and places: layer norm of a map
    "batch": nn.BatchNorm2d,
}


def mlp(shape: Sequence[int], outputs: int, *, widths: Sequence[int] = (32,)) -> nn.Sequential:
    """Multi-layer perceptron with ReLU: flatten, hidden layers of the given widths, outputs.

    Args:
        shape: Shape of one input: an image, a signal or the features of a table.
        outputs: Number of logits, or of numbers to predict.
        widths: Units per hidden layer.

    Returns:
        The network with PyTorch's default init.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    fan_in = prod(shape)
    for width in widths:
        layers += [nn.Linear(fan_in, width), nn.ReLU()]
        fan_in = width
    return nn.Sequential(*layers, nn.Linear(fan_in, outputs))


def cnn(
    shape: Sequence[int], outputs: int, *, widths: Sequence[int] = (16, 32, 32)
) -> nn.Sequential:
    """Convolutions 3x3 with ReLU and, but for the last, max-pooling; then global mean and logits.

    Args:
        shape: Shape of one input, ``(channels, height, width)``.
        outputs: Number of logits.
        widths: Channels per convolution.

    Returns:
        The network with PyTorch's default init.
    """
    layers: list[nn.Module] = []
    channels = shape[0]
    for depth, width in enumerate(widths):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if depth < len(widths) - 1 else []
        channels = width
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, outputs)
    )


def convnet(
    shape: Sequence[int], outputs: int, *, widths: Sequence[int] = (16, 32, 32)
) -> nn.Sequential:
    """Convolutions 3x3 with ReLU and max-pooling, then logits of all places of the last maps.

    It knows where things are, which ``cnn`` forgets in its global mean, and learns many times
    faster.

    Args:
        shape: Shape of one input, ``(channels, height, width)``.
        outputs: Number of logits.
        widths: Channels per convolution; each halves height and width.

    Returns:
        The network with PyTorch's default init.
    """
    layers: list[nn.Module] = []
    channels, height, width = shape
    for made in widths:
        layers += [nn.Conv2d(channels, made, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        channels, height, width = made, height // 2, width // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * width, outputs))


def convolution(
    channels: int, width: int, norm: Callable[[int], nn.Module], *, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """A 3x3 convolution without bias, and what normalises it."""
    conv = nn.Conv2d(channels, width, 3, stride=stride, padding=1, groups=groups, bias=False)
    return nn.Sequential(conv, norm(width))


class Residual(nn.Module):
    """Two convolutions and a shortcut; a 1x1 convolution projects it where the width changes.

    Paper: He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", CVPR 2016,
    arXiv:1512.03385, figure 2, with the shortcut of option B.

    Args:
        channels: Channels of the input.
        width: Channels of the output.
        norm: Makes the normalisation of a number of channels.
        stride: Of the first convolution.
        groups: Of the second convolution.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        norm: Callable[[int], nn.Module],
        *,
        stride: int = 1,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.first = convolution(channels, width, norm, stride=stride)
        self.second = convolution(width, width, norm, groups=groups)
        self.shortcut: nn.Module = nn.Identity()
        if channels != width or stride > 1:
            project = nn.Conv2d(channels, width, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(project, norm(width))

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[b, channels, h, w]`` -> ``[b, width, h / stride, w / stride]``."""
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


def resnet20(
    shape: Sequence[int],
    outputs: int,
    *,
    widths: Sequence[int] = (16, 32, 64),
    norm: str = "layer",
) -> nn.Sequential:
    """ResNet-20 for small images: a convolution, then three residual blocks per width.

    Paper: He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", CVPR 2016,
    arXiv:1512.03385, section 4.2; shortcuts are projected (option B) where widths change.

    Args:
        shape: Shape of one input, ``(channels, height, width)``.
        outputs: Number of logits.
        widths: Channels per stage; every stage but the first halves height and width.
        norm: ``layer`` (over channels and places) or ``batch``.

    Returns:
        The network with PyTorch's default init.

    Raises:
        ConfigError: If the norm is unknown.
    """
    return _resnet(shape, outputs, widths, _norm("resnet20", norm), blocks=3)


def resnet8(
    shape: Sequence[int],
    outputs: int,
    *,
    widths: Sequence[int] = (8, 16, 32),
    norm: str = "layer",
) -> nn.Sequential:
    """A slim ResNet for processors: one residual block per width, and a first stride of 2.

    The family of ``resnet20`` at its shallowest, on a quarter of the places and with half of the
    channels: one pass takes some fiftieth of its multiplications.

    Args:
        shape: Shape of one input, ``(channels, height, width)``.
        outputs: Number of logits.
        widths: Channels per stage; the first convolution halves height and width, and so does
            every stage but the first.
        norm: ``layer`` (over channels and places) or ``batch``.

    Returns:
        The network with PyTorch's default init.

    Raises:
        ConfigError: If the norm is unknown.
    """
    return _resnet(shape, outputs, widths, _norm("resnet8", norm), blocks=1, stride=2)


def _norm(architecture: str, norm: str) -> Callable[[int], nn.Module]:
    if norm not in NORMS:
        raise ConfigError(f"{architecture}: no norm {norm!r}; there are {sorted(NORMS)}.")
    return NORMS[norm]


def _resnet(
    shape: Sequence[int],
    outputs: int,
    widths: Sequence[int],
    norm: Callable[[int], nn.Module],
    *,
    blocks: int,
    stride: int = 1,
) -> nn.Sequential:
    """A convolution of a stride, ``blocks`` residual blocks per width, global mean, logits."""
    layers: list[nn.Module] = [convolution(shape[0], widths[0], norm, stride=stride), nn.ReLU()]
    channels = widths[0]
    for stage, width in enumerate(widths):
        layers.append(Residual(channels, width, norm, stride=2 if stage else 1))
        layers += [Residual(width, width, norm) for _ in range(blocks - 1)]
        channels = width
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, outputs)
    )


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "convnet": convnet,
    "resnet8": resnet8,
    "resnet20": resnet20,
}


def factory_of(name: str) -> Callable[..., nn.Module]:
    """Find the factory of a network.

    Args:
        name: Key of ``ARCHITECTURES``, or ``package.module:factory``.

    Returns:
        The factory.

    Raises:
        ConfigError: If there is none of this name.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ConfigError(
            f"Architecture {name!r} is unknown; there are {sorted(ARCHITECTURES)}, and any "
            "factory of your own as package.module:factory."
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"Architecture {name!r} cannot be imported ({error}). Run from the folder that holds "
            f"{module.partition('.')[0]!r}, or put that folder on PYTHONPATH."
        ) from error
    if not callable(found):
        raise ConfigError(f"Architecture {name!r} is {type(found).__name__}, not a factory.")
    return found


def build(
    name: str,
    shape: Sequence[int],
    outputs: int,
    *,
    widths: Sequence[int] | None = None,
    norm: str | None = None,
) -> nn.Module:
    """One freshly initialised network.

    Args:
        name: Key of ``ARCHITECTURES``, or ``package.module:factory``.
        shape: Shape of one input, without batch.
        outputs: Number of logits, or of numbers to predict.
        widths: Units or channels per hidden layer; None for the architecture's own.
        norm: Name of its normalisation; None for the architecture's own.

    Returns:
        The network.

    Raises:
        ConfigError: If the name is unknown, or the factory does not take what is given.
    """
    factory = factory_of(name)
    known = inspect.signature(factory).parameters
    given = {"widths": None if widths is None else tuple(widths), "norm": norm}
    given = {option: value for option, value in given.items() if value is not None}
    for option, value in given.items():
        if option not in known:
            raise ConfigError(f"Architecture {name!r} has no {option}; got {option}={value!r}.")
    network = factory(shape, outputs, **given)
    if not isinstance(network, nn.Module):
        raise ConfigError(
            f"Architecture {name!r} made a {type(network).__name__}, expected a torch.nn.Module."
        )
    return network


def frozen(network: nn.Module) -> list[str]:
    """Keys of a state dict that training leaves alone: buffers, and what needs no gradient."""
    parameters = network.named_parameters(remove_duplicate=False)
    still = [name for name, parameter in parameters if not parameter.requires_grad]
    return [*still, *(name for name, _ in network.named_buffers())]


def program_of(model: nn.Module, shape: Sequence[int]) -> Program:
    """The traced program of a network, in evaluation mode, on inputs of the given shape."""
    example = next(model.parameters()).new_zeros(2, *shape)
    return trace(model.eval(), example)
