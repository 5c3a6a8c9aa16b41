"""The other side of ``mergekit_parity``: run by a Python that has mergekit, without this package.

``python mergekit_side.py FOLDER`` reads ``cases.json`` and the families there, merges every tensor
of every case, and writes ``<case>.safetensors`` and ``seconds.json``.
"""

import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

REPEATS = 3


def merge_all(case: dict, members: list[dict], base: dict | None) -> dict[str, torch.Tensor]:
    """Merge all tensors of one case, each with the seed set anew."""
    from mergekit.merge_methods import get
    from mergekit.merge_methods.base import TensorGroup

    method, merged = get(case["theirs"]), {}
    for key in members[0]:
        tensors = [member[key] for member in members]
        if base is not None:
            tensors.append(base[key])
        index = {"last": len(tensors) - 1, "first": 0, None: None}[case["base"]]
        group = TensorGroup.from_tensors(tensors, base_index=index)
        torch.manual_seed(case["seed"])
        merged[key] = method([group], parameters=case["parameters"])[0]
    return merged


def main() -> None:
    """Entry point of ``python mergekit_side.py FOLDER``."""
    folder = Path(sys.argv[1])
    seconds = {}
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        family = folder / case["family"]
        members = [load_file(family / f"{i}.safetensors") for i in range(case["members"])]
        base = load_file(family / "base.safetensors") if case["base"] == "last" else None
        times = []
        for _ in range(REPEATS):
            clock = time.perf_counter()
            merged = merge_all(case, members, base)
            times.append(time.perf_counter() - clock)
        seconds[name] = min(times)
        save_file({k: t.contiguous() for k, t in merged.items()}, folder / f"{name}.safetensors")
    (folder / "seconds.json").write_text(json.dumps(seconds))


if __name__ == "__main__":
    main()
