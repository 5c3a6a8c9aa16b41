"""The loss of a step: mean over its batches, in half precision where products alone are halved."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from metamerge.mergers import GNNConfig, GNNMerger, ThresholdObjective, consensus
from metamerge.structure import run
from trainers import drawing
from trainers.drawing import Drawing, draw, in_parts
from trainers.stepping import Step, take_gradients

OBJECTIVE = ThresholdObjective("ensemble", headroom=0.05)
DRAWING = Drawing(
    families=3, groups=1, images=60, noise=0.5, drop=0.0, garbage=0.0, calibrated=0.0, labels=True
)


@pytest.fixture(scope="module")
def batches(make_families):
    """A step of families of two and of four."""
    groups = [make_families(members, f"k{members}") for members in (2, 4)]
    return [draw(0, 0, [group], DRAWING, OBJECTIVE) for group in groups]


@pytest.fixture
def merger(digits_zoo):
    """A merger that has parameters everywhere."""
    shape = tuple(digits_zoo.objective[0].shape[1:])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = GNNMerger(GNNConfig(probes=32, shapes=(shape,), width=8))
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return made


def loss_and_gradients(merger, batches, precision="float32", share=0.7):
    merger.zero_grad()
    loss = Step(merger, OBJECTIVE, share, precision)(batches)
    loss.backward()
    return loss.detach(), {k: p.grad.clone() for k, p in merger.named_parameters()}


def test_a_step_is_the_loss_of_the_fused_network_and_its_share_of_the_consensus(merger, batches):
    batch = batches[0]
    fused, trust = merger(batch.members, batch.layout)
    logits = run(batch.layout.program, fused, [batch.inputs], stacked=True)
    own, said = (
        OBJECTIVE.loss(x, batch.targets, batch.thresholds)[0]
        for x in (logits, consensus(trust, batch.answers))
    )
    found, _ = loss_and_gradients(merger, [batch])
    assert torch.allclose(found, own + 0.7 * said, rtol=1e-6)


def test_a_step_of_two_sizes_is_the_mean_of_both(merger, batches):
    loss, gradients = loss_and_gradients(merger, batches)
    alone = [loss_and_gradients(merger, [batch]) for batch in batches]
    assert torch.allclose(loss, (alone[0][0] + alone[1][0]) / 2, rtol=1e-6)
    for key, gradient in gradients.items():
        expected = (alone[0][1][key] + alone[1][1][key]) / 2
        # sums of some thousand products in another order
        assert torch.allclose(gradient, expected, atol=1e-5 * float(expected.abs().max())), key


def test_parts_of_a_step_add_up_to_it(merger, batches, monkeypatch):
    loss, gradients = loss_and_gradients(merger, batches)
    widest = batches[0].layout.program.widest
    asked = [3 * members * 32 * widest for members in (2, 4)]  # families, members, probes
    for held, expected in ((sum(asked), [3]), (sum(asked) - 1, [2, 1]), (1, [1, 1, 1])):
        monkeypatch.setattr(drawing, "HELD", held)
        parts = in_parts(batches, 32)
        assert [[len(batch) for batch in part] for part in parts] == [[n, n] for n in expected]
        merger.zero_grad()
        step = Step(merger, OBJECTIVE, 0.7, "float32")
        found = take_gradients(step, parts, Accelerator(cpu=True))
        assert torch.allclose(found, loss, rtol=1e-5)
        for key, parameter in merger.named_parameters():
            # sums in another order; a bias below a softmax has no gradient but rounding errors
            most = 1e-4 * float(gradients[key].abs().max()) + 1e-7
            assert torch.allclose(parameter.grad, gradients[key], atol=most), key


def test_watched_inputs_count_in_place_of_probes(batches, monkeypatch):
    batch = replace(batches[0], watched=batches[0].inputs)
    monkeypatch.setattr(drawing, "HELD", 3 * 2 * 60 * batch.layout.program.widest)
    assert len(in_parts([batch], 10**6)) == 1
    assert len(in_parts([batches[0]], 10**6)) == 3


def test_bfloat16_halves_the_products_of_fused_networks_and_nothing_else(merger, batches):
    whole, gradients = loss_and_gradients(merger, batches)
    half, rough = loss_and_gradients(merger, batches, "bfloat16")
    assert half.dtype == torch.float32
    assert half != whole
    assert torch.allclose(half, whole, rtol=0.02)  # logits of 8 bits
    assert all(gradient.dtype == torch.float32 for gradient in rough.values())
    flat = [torch.cat([g.flatten() for g in some.values()]) for some in (gradients, rough)]
    assert torch.cosine_similarity(*flat, dim=0) > 0.99
    # The gate's own loss sees no fused network: the share of it adds as much to either.
    added = [
        loss_and_gradients(merger, batches, precision, share=1.0)[0]
        - loss_and_gradients(merger, batches, precision, share=0.0)[0]
        for precision in ("float32", "bfloat16")
    ]
    assert torch.allclose(*added, atol=1e-6)
