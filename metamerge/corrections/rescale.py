"""Rescale: give every unit of fused weights the spread that its members' units have.

Paper: Jordan, Sedghi, Saukh, Entezari, Neyshabur, "REPAIR: REnormalizing Permuted Activations for
Interpolation Repair", ICLR 2023, arXiv:2211.08403. This is the half of ``repair`` that undoes the
collapse of variance; means stay where averaging has put them.
"""

from torch import Tensor

from metamerge.corrections.repair import match_moments
from metamerge.registry import correction
from metamerge.structure import Layout
from metamerge.weights import Weights


@correction(paper="arXiv:2211.08403")
def rescale(fused: Weights, members: Weights, layout: Layout, inputs: Tensor) -> Weights:
    """Rescale the pre-activations of fused weights to their members' mean spread.

    On the given inputs each hidden unit is scaled about its own mean until its standard deviation
    is the mean of its members' ones. A unit without a bias is scaled about 0, so that its mean is
    scaled as well, unless a batch normalisation reads it, whose running mean takes that up. Output
    layers and units that are constant in the fused network are left as they are.

    Args:
        fused: Fused weights of ``f`` families, ``[f, ...]``.
        members: Their aligned members, ``[f, m, ...]``.
        layout: Layers of the architecture.
        inputs: Calibration inputs, ``[b, ...]``.

    Returns:
        New weights ``[f, ...]``.
    """
    return match_moments(fused, members, layout, inputs, means=False)
