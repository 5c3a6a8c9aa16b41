"""Runs ``sinkhorn-rebasin`` in an environment of its own: its package is named ``rebasin`` too.

``python sinkhorn_rebasin_worker.py <pair.pt> <aligned.pt>`` reads two modules and the shape of
their inputs, and writes the state dict of the second in the units of the first, and seconds. The
settings are those of the package's own example for MLPs: permutations start at the identity,
AdamW at 0.1 on the squared distance of weights, 50 steps, the best of all hardened permutations.
"""

import sys
import time

import torch

STEPS, RATE = 50, 0.1


def main(source: str, target: str) -> None:
    """Align one pair.

    Args:
        source: File with ``modules`` and ``input_shape``.
        target: File to write.
    """
    from rebasin import RebasinNet
    from rebasin.loss import DistL2Loss

    torch.set_num_threads(1)
    given = torch.load(source, weights_only=False)  # written by the benchmark a moment ago
    first, second = given["modules"]
    network = RebasinNet(second, input_shape=given["input_shape"])
    network.identity_init()
    clock, distance = time.process_time(), DistL2Loss(first)
    optimizer = torch.optim.AdamW(network.p.parameters(), lr=RATE)
    best = (float("inf"), None)
    for _ in range(STEPS):
        network.train()
        loss = distance(network())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        network.eval()
        with torch.no_grad():
            found = network()
            reached = float(distance(found))
        if reached < best[0]:
            weights = {key: tensor.detach().clone() for key, tensor in found.state_dict().items()}
            best = (reached, weights)
    torch.save({"weights": best[1], "seconds": time.process_time() - clock}, target)


if __name__ == "__main__":
    main(*sys.argv[1:3])
