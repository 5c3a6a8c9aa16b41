"""Networks that the zoo trains: factories that take a task's input shape and number of classes."""

from collections.abc import Callable, Sequence

from torch import nn

from metamerge.errors import ConfigError
from metamerge.structure import Program, trace


def mlp(shape: Sequence[int], classes: int, *, widths: Sequence[int] = (32,)) -> nn.Sequential:
    """Multi-layer perceptron with ReLU: flatten, hidden layers of the given widths, logits.

    Args:
        shape: Shape of one input, ``(channels, height, width)``.
        classes: Number of logits.
        widths: Units per hidden layer.

    Returns:
        The network with PyTorch's default init.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    fan_in = shape[0] * shape[1] * shape[2]
    for width in widths:
        layers += [nn.Linear(fan_in, width), nn.ReLU()]
        fan_in = width
    return nn.Sequential(*layers, nn.Linear(fan_in, classes))


def cnn(
    shape: Sequence[int], classes: int, *, widths: Sequence[int] = (16, 32, 32)
) -> nn.Sequential:
    """Convolutions 3x3 with ReLU and, but for the last, max-pooling; then global mean and logits.

    Args:
        shape: Shape of one input, ``(channels, height, width)``.
        classes: Number of logits.
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
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)
    )


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {"mlp": mlp, "cnn": cnn}


def build(name: str, shape: Sequence[int], classes: int, *, widths: Sequence[int]) -> nn.Module:
    """One freshly initialised network.

    Args:
        name: Key of ``ARCHITECTURES``.
        shape: Shape of one input, ``(channels, height, width)``.
        classes: Number of logits.
        widths: Units or channels per hidden layer.

    Returns:
        The network.

    Raises:
        ConfigError: If the name is unknown.
    """
    if name not in ARCHITECTURES:
        raise ConfigError(f"Architecture {name!r} is unknown; there are {sorted(ARCHITECTURES)}.")
    return ARCHITECTURES[name](shape, classes, widths=tuple(widths))


def program_of(model: nn.Module, shape: Sequence[int]) -> Program:
    """The traced program of a network on inputs of the given shape."""
    example = next(model.parameters()).new_zeros(2, *shape)
    return trace(model, example)
