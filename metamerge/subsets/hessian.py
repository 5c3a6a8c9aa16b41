"""The Hessian of a loss by its products with vectors: how kernels interact, and its diagonal.

Paper: Pearlmutter, "Fast Exact Multiplication by the Hessian", Neural Computation 6(1), 1994. A
product costs about as much as two gradients; the Hessian itself is never formed.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from metamerge.subsets.kernels import Kernels, by_kernel
from metamerge.weights import Weights

Product = Callable[[Weights], Weights]
"""Vector, laid out like the weights -> Hessian times that vector."""


def hessian_product(loss: Callable[[Weights], Tensor], weights: Weights) -> Product:
    """Prepare products with the Hessian of a loss at given weights.

    Args:
        loss: Weights of one network -> a number, twice differentiable.
        weights: Where the Hessian is taken: the tensors that it is taken by, and no others.

    Returns:
        The product; the gradient is computed once and used for all of them.
    """
    _, product = torch.func.vjp(torch.func.grad(loss), weights)  # the Hessian is symmetric
    return lambda vector: product(vector)[0]


def summed_interactions(product: Product, weights: Weights, kernels: Sequence[Kernels]) -> Tensor:
    """Sum the Hessian over every pair of kernels: ``1_i^T H 1_j`` with indicator vectors.

    Args:
        product: With the Hessian.
        weights: Where it is taken.
        kernels: Of the network.

    Returns:
        ``[kernels, kernels]``, signed: how the gradient of shifting kernel ``i`` as a whole changes
        as ``j`` is shifted.
    """
    return _columns(kernels, weights, lambda ones: by_kernel(product(ones), kernels))


def squared_interactions(
    product: Product,
    weights: Weights,
    kernels: Sequence[Kernels],
    *,
    probes: int = 2,
    generator: torch.Generator,
) -> Tensor:
    """Estimate the squared Frobenius norm of the Hessian's block of every pair of kernels.

    With random signs ``z`` on kernel ``j``, the mean of ``|(H z)_i|^2`` is ``|H_ij|_F^2``.

    Args:
        product: With the Hessian.
        weights: Where it is taken.
        kernels: Of the network.
        probes: Vectors of random signs per kernel.
        generator: Source of randomness.

    Returns:
        ``[kernels, kernels]``, not negative.
    """

    def column(ones: Weights) -> Tensor:
        found = []
        for _ in range(probes):
            drawn = product({key: own * _signs(own, generator) for key, own in ones.items()})
            squares = {key: tensor.square() for key, tensor in drawn.items()}
            found.append(by_kernel(squares, kernels))
        return torch.stack(found).mean(0)

    return _columns(kernels, weights, column)


def hessian_diagonal(
    product: Product, weights: Weights, *, probes: int = 16, generator: torch.Generator
) -> Weights:
    """Estimate the diagonal of the Hessian: the mean of ``z * H z`` over random signs ``z``.

    Paper: Bekas, Kokiopoulou and Saad, "An Estimator for the Diagonal of a Matrix", Applied
    Numerical Mathematics 57, 2007, after Hutchinson's estimator of the trace.

    Args:
        product: With the Hessian.
        weights: Where it is taken.
        probes: Vectors of random signs.
        generator: Source of randomness.

    Returns:
        Laid out like the weights.
    """
    total = {key: torch.zeros_like(tensor) for key, tensor in weights.items()}
    for _ in range(probes):
        signs = {key: _signs(tensor, generator) for key, tensor in weights.items()}
        for key, found in product(signs).items():
            total[key] += signs[key] * found / probes
    return total


def saliencies(diagonal: Weights, weights: Weights) -> Weights:
    """Saliency of every weight, ``h_kk w_k^2 / 2``: what its removal costs at a minimum.

    Paper: LeCun, Denker and Solla, "Optimal Brain Damage", NIPS 1989 (1990), equation 5.

    Args:
        diagonal: Of the Hessian.
        weights: Where it was taken.

    Returns:
        Laid out like the weights; negative where the loss curves down.
    """
    return {key: own * weights[key].square() / 2 for key, own in diagonal.items()}


def _columns(
    kernels: Sequence[Kernels], weights: Weights, column: Callable[[Weights], Tensor]
) -> Tensor:
    """One column per kernel, from a vector of ones on it; made symmetric."""
    found = []
    for own in kernels:
        for kernel in range(own.count):
            ones = {key: torch.zeros_like(tensor) for key, tensor in weights.items()}
            for key in own.keys:
                ones[key][kernel] = 1
            found.append(column(ones))
    matrix = torch.stack(found, 1)
    return (matrix + matrix.mT) / 2


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random signs, the same on every device."""
    drawn = torch.randint(2, like.shape, generator=generator)
    return (2 * drawn - 1).to(like)
