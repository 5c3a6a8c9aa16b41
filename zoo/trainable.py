"""Whether a network can be trained side by side with others: the same as it would be alone."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metamerge.errors import ConfigError
from metamerge.structure import Execution, Program
from metamerge.weights import Weights, stack
from zoo.architectures import program_of

_CLOSE = 1e-3  # relative: float32 sums in another order, through some fifty layers


def check_trainable(network: nn.Module, shape: Sequence[int], outputs: int, name: str) -> Program:
    """Refuse a network that the batched trainer would train otherwise than its module does.

    Args:
        network: Freshly built; its buffers may change.
        shape: Shape of one input, without batch.
        outputs: Number of outputs that the task needs.
        name: Of its architecture, for messages.

    Returns:
        Its traced program.

    Raises:
        ConfigError: If it does not take the inputs, if its outputs have another shape or are not
            finite, or if it is another network in training: random, or with a layer of its own.
        StructureError: If it cannot be traced.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        inputs = torch.rand(8, *shape)
        _check_outputs(network.eval(), inputs, outputs, name)
        program = program_of(network, shape)
        if program.tied:
            raise ConfigError(
                f"Architecture {name!r} shares {sorted(program.tied)} between layers. Members are "
                "trained without shared weights: give every layer its own."
            )
        told, weights = _two_passes(program, stack([network.state_dict()]), inputs)
        network.train()
        once, again = network(inputs), network(inputs)
        network.eval()
    if not torch.equal(once, again):
        raise ConfigError(
            f"Architecture {name!r} is random in training mode. Members are trained side by side "
            "without dropout and the like: set its probability to 0, and use weight decay, noise "
            "or early stopping instead."
        )
    _check_same(once, told, name)
    _check_statistics(network, weights, name)
    return program


def _check_outputs(network: nn.Module, inputs: Tensor, outputs: int, name: str) -> None:
    try:
        found = network(inputs)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise ConfigError(
            f"Architecture {name!r} does not take inputs of shape {tuple(inputs.shape[1:])}: "
            f"{error}"
        ) from error
    expected = (len(inputs), outputs)
    if not isinstance(found, Tensor) or found.shape != expected:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ConfigError(
            f"Architecture {name!r}: inputs {tuple(inputs.shape)} give {got}, expected {expected}."
        )
    if not found.isfinite().all():
        raise ConfigError(f"Architecture {name!r} puts out NaN or infinity. Mend its init.")


def _two_passes(program: Program, start: Weights, inputs: Tensor) -> tuple[Tensor, Weights]:
    """The trainer's first output ``[b, outputs]``, and weights after two passes ``[1, ...]``."""
    weights, outputs = {key: tensor.clone() for key, tensor in start.items()}, []
    for _ in range(2):
        execution = Execution(
            program, weights, [inputs[None]], stacked=True, own_inputs=True, training=True
        )
        outputs.append(execution.run_all()[0])
        weights.update(execution.statistics)
    return outputs[0], weights


def _check_same(module: Tensor, told: Tensor, name: str) -> None:
    scale = module.abs().max().clamp(min=1e-6)
    if not (module - told).abs().max() <= _CLOSE * scale:
        raise ConfigError(
            f"Architecture {name!r} computes something else in training mode than in evaluation "
            "mode. Members are trained as they are evaluated, but for nn.BatchNorm: leave out "
            "layers and branches that look at self.training."
        )


def _check_statistics(network: nn.Module, weights: Weights, name: str) -> None:
    """Running statistics after two passes: those of the module and those of the trainer."""
    for key, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not torch.allclose(
            weights[key][0], tensor, rtol=_CLOSE, atol=1e-5
        ):
            raise ConfigError(
                f"Architecture {name!r}: {key!r} moves in training otherwise than members' would. "
                "Use nn.BatchNorm with a momentum, and no other layer that keeps statistics."
            )
