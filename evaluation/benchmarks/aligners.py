"""What the alignment benchmark runs: our alignments, and other people's on the same members.

Every aligner takes a ``Case`` and returns members in common units and the seconds of the aligning
alone, of the processor: without imports, tracing, or copies from one form of weights to another.
"""

import copy
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from metamerge.registry import get_alignment
from metamerge.structure import Layer, Layout, Permutation
from metamerge.weights import Weights, stack

SINKHORN = ("sinkhorn-rebasin==0.0.2", "torchviz==0.0.3", "graphviz")
WORKER = Path(__file__).with_name("sinkhorn_rebasin_worker.py")


@dataclass(frozen=True)
class Case:
    """Members to be aligned.

    Attributes:
        name: What they are called in the table.
        network: A module of their architecture.
        layout: Its layout.
        members: One state dict each.
        inputs: Images that they were trained on, for what looks at activations.
    """

    name: str
    network: nn.Module
    layout: Layout
    members: list[Weights]
    inputs: Tensor

    def modules(self) -> list[nn.Module]:
        """The members as modules, in memory of their own."""
        built = []
        for weights in self.members:
            module = copy.deepcopy(self.network).eval()
            module.load_state_dict(weights)
            built.append(module)
        return built


Aligned = tuple[list[Weights], float]
Aligner = Callable[[Case], Aligned]


def own(name: str) -> Aligner:
    """One of ``list_alignments()``, with its defaults."""

    def align(case: Case) -> Aligned:
        record, spec = get_alignment(name), case.layout.spec
        at_hand = {
            "layout": case.layout,
            "batches": case.inputs,
            "generator": torch.Generator().manual_seed(0),
        }
        asked = {key: at_hand[key] for key in record.resources & at_hand.keys()}
        family = {key: tensor[None] for key, tensor in stack(case.members).items()}
        clock = time.process_time()
        if not record.permutes:
            found = record.function(case.members, spec, **asked)
            return found, time.process_time() - clock
        perm = record.function(family, spec, **asked)
        seconds = time.process_time() - clock
        return _permuted(
            case, [{g: i[0, k] for g, i in perm.items()} for k in _each(case)]
        ), seconds

    return align


def rebasin(case: Case) -> Aligned:
    """``rebasin`` 0.0.47: coordinate descent for a pair, ``MergeMany`` for more.

    ``MergeMany`` traces its models in every step; that is part of its seconds.

    Args:
        case: The members.

    Returns:
        Aligned members and seconds.
    """
    from rebasin import MergeMany, PermutationCoordinateDescent

    modules, images = case.modules(), case.inputs[:1]
    if len(modules) > 2:
        descent = MergeMany(modules, copy.deepcopy(case.network).eval(), images)
        work = descent.run
    else:
        descent = PermutationCoordinateDescent(*modules, images)
        work = descent.rebasin
    torch.manual_seed(0)
    clock = time.process_time()
    work()
    seconds = time.process_time() - clock
    return [{k: t.detach() for k, t in m.state_dict().items()} for m in modules], seconds


def pot_fusion(case: Case) -> Aligned:
    """Layer-wise optimal transport of every member's units to those of the first, with POT.

    From the inputs on: columns follow the units before, then the exact plan between two uniform
    clouds of units (rows with their biases) is a permutation. For chains of layers only.

    Args:
        case: The members.

    Returns:
        Aligned members and seconds.
    """
    import ot

    layout = case.layout
    layers = [layer for layer in layout.layers if layer.target in layout.spec.groups]
    clock, found = time.process_time(), [layout.spec.identity()]
    for weights in case.members[1:]:
        perm: Permutation = {}
        for layer in layers:
            wanted, units = (
                _rows(layout.spec.permute(w, p), layer)
                for w, p in ((case.members[0], {}), (weights, perm))
            )
            even = np.full(len(units), 1 / len(units))
            plan = ot.emd(even, even, torch.cdist(wanted, units).square().double().numpy())
            perm[layer.target] = torch.from_numpy(plan.argmax(1))
        found.append(perm)
    return _permuted(case, found), time.process_time() - clock


def sinkhorn_rebasin(python: Path) -> Aligner:
    """``sinkhorn-rebasin`` 0.0.2 for a pair, run by an interpreter that has it."""

    def align(case: Case) -> Aligned:
        with tempfile.TemporaryDirectory() as folder:
            files = [str(Path(folder, name)) for name in ("pair.pt", "aligned.pt")]
            modules, shape = case.modules(), (1, *case.inputs.shape[1:])
            torch.save({"modules": modules, "input_shape": shape}, files[0])
            command = [str(python), "-P", str(WORKER), *files]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr.strip().splitlines()[-1])
            found = torch.load(files[1], weights_only=True)
        return [case.members[0], found["weights"]], found["seconds"]

    return align


def sinkhorn_environment(folder: Path) -> Path:
    """Make, once, an environment with ``sinkhorn-rebasin`` that takes all else from this one.

    Args:
        folder: Where it lies, or is to lie.

    Returns:
        Its interpreter.

    Raises:
        RuntimeError: If the package cannot be fetched.
    """
    python, ready = folder / "bin" / "python", folder / "ready"
    if ready.exists():
        return python
    venv.create(folder, with_pip=True, clear=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", *SINKHORN]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(install)}: {done.stderr.strip()[-200:]}")
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "zz_from_outside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    ready.write_text(sys.version)
    return python


def _each(case: Case) -> range:
    return range(len(case.members))


def _permuted(case: Case, perms: Sequence[Permutation]) -> list[Weights]:
    pairs = zip(case.members, perms, strict=True)
    return [case.layout.spec.permute(weights, perm) for weights, perm in pairs]


def _rows(weights: Weights, layer: Layer) -> Tensor:
    """Units of a layer with their biases, ``[n, r]``."""
    keys = [key for key in (layer.weight, layer.bias) if key]
    return torch.cat([weights[key][:, None].flatten(1) for key in keys], 1)
