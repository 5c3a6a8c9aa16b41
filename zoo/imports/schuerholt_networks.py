"""The three convolutional networks of the zoos of Schuerholt et al., by their published options.

Layer for layer as in ``model_definitions/def_net.py`` of ModelZoos/ModelZooDataset, so that the
positions of layers, and with them the names of tensors, are those of the files.
"""

from collections.abc import Callable, Mapping
from functools import partial

from torch import nn

NONLINEARITIES: dict[str, type[nn.Module]] = {
    "leakyrelu": nn.LeakyReLU,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}
_SMALL_WIDTHS = {"CNN": (8, 6, 4), "CNN2": (6, 9, 6)}
_CLASSES = 10  # model::o_dim is not used by these networks; the SVHN zoos say 4 and have 10


def published_network(
    params: Mapping[str, object],
) -> tuple[Callable[[], nn.Module], tuple[int, int, int]] | str:
    """Rebuild the architecture that a ``params.json`` names.

    Dropout does nothing in evaluation. It is an identity here that keeps the positions of the
    layers behind it: CNN and CNN2 have no such layer at rate 0, CNN3 has it at every rate.

    Args:
        params: Content of the file.

    Returns:
        A factory of networks and the shape of their input, or the reason why there is none.
    """
    kind, nonlinearity = params.get("model::type"), params.get("model::nlin")
    channels, dropout = params.get("model::channels_in"), params.get("model::dropout")
    if kind not in ("CNN", "CNN2", "CNN3"):
        return f"model::type {kind!r} is not one of CNN, CNN2, CNN3"
    if nonlinearity not in tuple(NONLINEARITIES):
        return f"model::nlin {nonlinearity!r} is not one of {', '.join(NONLINEARITIES)}"
    if isinstance(channels, bool) or not isinstance(channels, int) or not 1 <= channels <= 4096:
        return f"model::channels_in {channels!r} is no number of channels"
    if isinstance(dropout, bool) or not isinstance(dropout, int | float):
        return f"model::dropout {dropout!r} is no rate"
    activation = NONLINEARITIES[nonlinearity]
    if kind == "CNN3":
        return partial(_large, channels, activation), (channels, 32, 32)
    widths = _SMALL_WIDTHS[kind]
    return partial(_small, channels, widths, activation, dropout > 0), (channels, 28, 28)


def _small(
    channels: int, widths: tuple[int, int, int], activation: type[nn.Module], dropout: bool
) -> nn.Module:
    """Three convolutions and two linear layers for images of 28 x 28."""
    first, second, third = widths

    def drop() -> list[nn.Module]:
        return [nn.Identity()] if dropout else []

    return _named(
        *(nn.Conv2d(channels, first, 5), nn.MaxPool2d(2), activation(), *drop()),
        *(nn.Conv2d(first, second, 5), nn.MaxPool2d(2), activation(), *drop()),
        *(nn.Conv2d(second, third, 2), activation(), nn.Flatten()),
        *(nn.Linear(third * 3 * 3, 20), activation(), *drop()),
        nn.Linear(20, _CLASSES),
    )


def _large(channels: int, activation: type[nn.Module]) -> nn.Module:
    """Three convolutions and two linear layers for images of 32 x 32."""
    return _named(
        *(nn.Conv2d(channels, 16, 3), nn.MaxPool2d(2), activation(), nn.Identity()),
        *(nn.Conv2d(16, 32, 3), nn.MaxPool2d(2), activation(), nn.Identity()),
        *(nn.Conv2d(32, 15, 3), nn.MaxPool2d(2), activation(), nn.Identity()),
        *(nn.Flatten(), nn.Linear(15 * 2 * 2, 20), activation(), nn.Identity()),
        nn.Linear(20, _CLASSES),
    )


def _named(*layers: nn.Module) -> nn.Module:
    network = nn.Sequential()
    network.add_module("module_list", nn.Sequential(*layers))
    return network
