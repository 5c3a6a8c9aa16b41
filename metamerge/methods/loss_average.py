"""Loss average: members count by how low their loss on calibration data is.

No paper: the coefficients are a softmax over the negative losses, so unlike ranks they tell a
member that is a little worse from one that is useless.
"""

from collections.abc import Sequence

from torch import Tensor

from metamerge.calibration import Batches, collect, losses
from metamerge.methods._combination import combine
from metamerge.options import check_number
from metamerge.registry import merge_method
from metamerge.structure import Layout
from metamerge.weights import Weights


@merge_method()
def loss_average(
    weights: Sequence[Weights],
    *,
    layout: Layout,
    batches: Batches,
    temperature: float = 1.0,
    report: dict | None = None,
) -> Weights:
    """Average all members with coefficients ``softmax(-loss / temperature)``.

    Args:
        weights: One state dict per member, of one architecture.
        layout: That architecture.
        batches: Calibration inputs with labels.
        temperature: Above 0; small for the best member only, large for the plain average.
        report: Takes ``losses`` and ``coefficients``, one number per member each.

    Returns:
        New state dict with the members' names, shapes and dtypes.

    Raises:
        ConfigError: If the temperature is not above 0, or the batches have no labels or do not fit
            the network.
    """
    check_number("loss_average", "temperature", temperature, "(0, inf)")
    inputs, labels = collect(batches, labelled=True)
    found = losses([{k: t.detach() for k, t in w.items()} for w in weights], layout, inputs, labels)
    shares = _shares(found, float(temperature)).tolist()
    if report is not None:
        report.update(losses=found.tolist(), coefficients=shares)
    return combine(weights, shares)


def _shares(loss: Tensor, temperature: float) -> Tensor:
    """Coefficient of every member, ``[m]`` -> ``[m]``."""
    ahead = loss - loss.min()  # a tiny temperature must not make infinity minus infinity
    return (-ahead / temperature).softmax(0)
