"""One model per cluster: trained apart, merged, and compared with what else can be made of them."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from metamerge import merge
from metamerge.checkpoints import save_checkpoint
from metamerge.structure import Program, run
from metamerge.weights import Weights, stack, unstack
from trainers.cluster_runs import Prepared
from trainers.cluster_scores import row_scores, run_scores, test_outputs
from zoo.training import cross_entropy, init_networks, squared_error, train_networks

MERGES: dict[str, dict[str, Any]] = {
    "average": {"align": None},
    "average, aligned": {"align": "weight_matching"},
    "average, aligned + repair": {"align": "weight_matching", "correct": "repair"},
    "average, aligned + refit": {"align": "weight_matching", "correct": "refit"},
}
"""Merge -> arguments of ``merge()``. Corrections see training inputs, without targets."""


def members_row(
    factory: Callable[[], nn.Module],
    program: Program,
    prepared: Prepared,
    *,
    count: int,
    shared: bool,
    epochs: int,
    lr: float,
    batch_size: int,
) -> dict[str, Any]:
    """Train one network per cluster for some runs, and score what becomes of them on test rows.

    Args:
        factory: Makes a fresh network.
        program: Its program.
        prepared: The runs.
        count: Runs that are taken, the first ones.
        shared: Whether the members of a run start from one init.
        epochs: Passes of a network over its rows.
        lr: AdamW's rate at the start; it falls to zero.
        batch_size: Rows of a step.

    Returns:
        Number of members; and per way to use them, the scores of every run.
    """
    k, seeds = prepared.members, prepared.runs.seeds[:count]
    inits = [seed if shared else 1_000_003 * (m + 1) + seed for seed in seeds for m in range(k)]
    rows = [own for clusters in prepared.runs.clusters[:count] for own in clusters]
    options = {"epochs": epochs, "lr": lr, "batch_size": batch_size}
    members = _trained(factory, program, prepared, inits, rows, k, **options)  # [count * k, ...]
    everything = [torch.cat(list(own)) for own in prepared.runs.clusters[:count]]
    whole = _trained(factory, program, prepared, list(seeds), everything, 1, **options)

    first = _first(prepared, count)
    apart = {key: t.unflatten(0, (count, k)) for key, t in members.items()}
    each = torch.stack(
        [test_outputs(program, {n: t[:, m] for n, t in apart.items()}, first) for m in range(k)], 1
    )  # [count, k, t, c]
    found = {"one network on all rows": test_outputs(program, whole, first)}
    votes = each if prepared.scale is not None else each.softmax(-1)
    found["ensemble of the members"] = votes.mean(1)
    place = first.routed[:, None, :, None].expand(-1, 1, -1, each.shape[-1])
    found["member of the nearest cluster"] = each.gather(1, place).squeeze(1)
    best = _best_member(program, apart, first)
    found["best member"] = each[torch.arange(count), best]
    merged = [
        _merged(
            program, {key: t[r] for key, t in apart.items()}, prepared.runs.inputs[r, own], seed
        )
        for r, (own, seed) in enumerate(zip(everything, seeds, strict=True))
    ]
    for name in MERGES:
        found[name] = test_outputs(program, stack([fused[name] for fused in merged]), first)
    scores = {name: run_scores(row_scores(outputs, first)) for name, outputs in found.items()}
    alone = [run_scores(row_scores(each[:, m], first)) for m in range(k)]
    scores["mean of the members"] = {
        name: torch.tensor([own[name] for own in alone]).mean(0).tolist() for name in alone[0]
    }
    return {"members": k, "scores": scores}


def _merged(program: Program, members: Weights, inputs: Tensor, seed: int) -> dict[str, Weights]:
    """What ``merge()`` makes of the members ``[k, ...]`` of a run."""
    told = program.to_json()  # checkpoints that carry it need not be traced at every merge
    with TemporaryDirectory() as folder:
        paths = [
            save_checkpoint(own, Path(folder) / str(place), program=told)
            for place, own in enumerate(unstack(members))
        ]
        return {
            name: merge(
                paths,
                method="average",
                seed=seed,
                batches=inputs if "correct" in arguments else None,
                **arguments,
            ).weights
            for name, arguments in MERGES.items()
        }


def _first(prepared: Prepared, count: int) -> Prepared:
    """The first runs alone."""
    runs = prepared.runs
    scale = None if prepared.scale is None else prepared.scale[:count]
    less = type(runs)(
        runs.inputs[:count],
        runs.targets[:count],
        runs.clusters[:count],
        runs.validation[:count],
        runs.seeds[:count],
    )
    owners = (prepared.test[:count], prepared.nearest[:count], prepared.routed[:count])
    return Prepared(prepared.task, less, *owners, scale, prepared.quality)


def _trained(
    factory: Callable[[], nn.Module],
    program: Program,
    prepared: Prepared,
    inits: list[int],
    rows: list[Tensor],
    each: int,
    **options: Any,
) -> Weights:
    """Networks, ``each`` of them per run, all trained at once on one long table of all runs."""
    length = prepared.runs.inputs.shape[1]
    count = len(rows) // each
    return train_networks(
        program,
        init_networks(factory, inits),
        prepared.runs.inputs[:count].flatten(0, 1),
        prepared.runs.targets[:count].flatten(0, 1),
        [own + (place // each) * length for place, own in enumerate(rows)],
        seed=inits,
        loss=cross_entropy if prepared.scale is None else squared_error,
        **options,
    ).weights


def _best_member(program: Program, apart: Weights, prepared: Prepared) -> Tensor:
    """Member with the smallest loss on validation rows, ``[r]``."""
    own = torch.arange(len(prepared.test)).unsqueeze(1)
    inputs = prepared.runs.inputs[own, prepared.runs.validation]
    targets = prepared.runs.targets[own, prepared.runs.validation]
    loss = cross_entropy if prepared.scale is None else squared_error
    losses = []
    with torch.no_grad():
        for m in range(prepared.members):
            member = {key: t[:, m] for key, t in apart.items()}
            outputs = run(program, member, [inputs], stacked=True, own_inputs=True)
            losses.append(loss(outputs, targets))
    return torch.stack(losses).argmin(0)
