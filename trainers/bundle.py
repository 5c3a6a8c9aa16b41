"""Put a trained merger into the package: ``python -m trainers.bundle --merger runs/universal``.

It is stored in half precision and becomes what ``merge(checkpoints)`` uses where no merger is
named. A merger whose gates did not all pass is refused.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from metamerge.errors import ConfigError, MetaMergeError
from metamerge.mergers import load_merger, read_card, save_merger
from metamerge.mergers.files import BUNDLED
from zoo.options import parse

LARGEST = 4 * 2**20  # bytes


@dataclass(frozen=True)
class BundleOptions:
    """Put a trained merger into the package."""

    merger: str = "runs/universal"  # folder of the trained merger


def bundle(folder: str, target: Path = BUNDLED) -> Path:
    """Store a merger in half precision.

    Args:
        folder: The merger's folder.
        target: Where the bundled merger lies.

    Returns:
        The target.

    Raises:
        ConfigError: If a gate of its card did not pass, or it is too large.
    """
    merger, card = load_merger(folder), read_card(folder)
    failed = [
        f"{k} {g['name']}" for k, own in card["gates"].items() for g in own if not g["passed"]
    ]
    if failed:
        raise ConfigError(f"merger: {folder} fails gates: {', '.join(failed)}.")
    halved = {key: tensor.half() for key, tensor in merger.state_dict().items()}
    size = sum(tensor.numel() * tensor.element_size() for tensor in halved.values())
    if size > LARGEST:
        raise ConfigError(
            f"merger: {folder} has {size} bytes in half precision, at most {LARGEST}."
        )
    for name, parameter in merger.named_parameters():
        parameter.data = halved[name]
    card["zoos"] = [{**zoo, "options": {**zoo["options"], "out": None}} for zoo in card["zoos"]]
    card["options"] = {**card["options"], "zoo": [], "out": ""}
    return save_merger(merger, target, {**card, "precision": str(torch.float16)})


def main() -> None:
    """Entry point of ``python -m trainers.bundle``."""
    options = parse(BundleOptions, prog="python -m trainers.bundle")
    try:
        print(bundle(options.merger))
    except MetaMergeError as error:
        print(f"bundle: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error


if __name__ == "__main__":
    main()
