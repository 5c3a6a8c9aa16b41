"""Networks of a comparison that are kept as models: what every merger makes of one family."""

import re
from collections.abc import Sequence

from evaluation.bench import Bench
from evaluation.contestants import Contestant
from evaluation.judged import Judged
from evaluation.methods.entries import Entry
from evaluation.tracking import Run
from metamerge.weights import unstack


def keep_networks(
    tracked: Run, judged: Sequence[Judged], contestants: Sequence[Contestant], seed: int
) -> None:
    """Log what mergers make of the first family of the largest size, from nothing but its weights.

    Models are called ``fused-<merger>`` and know classes by the task's numbers. Nothing is kept
    where nobody knows how to make a fresh network of the architecture.

    Args:
        tracked: The run of the comparison.
        judged: Its families, one entry per number of members.
        contestants: The mergers.
        seed: Seed of merges.
    """
    one = max(judged, key=lambda own: own.members).alone(0)
    if one.network is None or tracked.id is None:
        return
    bench, example = Bench(one, seed), one.split.images("objective")[0][:2]
    about = {"family": f"{one.name}/0", "members": one.members, "task": one.split.task.name}
    for contestant in contestants:
        (weights,) = unstack(bench.merge(Entry(contestant.kind), merger=contestant.merger))
        tracked.network(
            one.network(),
            weights,
            example,
            name=f"fused-{re.sub(r'[^A-Za-z0-9]+', '-', contestant.name).strip('-')}",
            about={**about, "merger": contestant.folder},
            program=one.layout.program.to_json(),
        )
