import pytest
import torch
from torch import nn

from metamerge.ensembles import Seen, ensemble, gated_consensus, soft_vote
from metamerge.errors import ConfigError
from metamerge.structure import trace

# Two members on a line: the first knows the left, the second the right.
POINTS = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]])
LABELS = torch.tensor([0, 0, 1, 1])
LOGITS = torch.tensor([[[0.8, 0.2], [0.8, 0.2], [0.8, 0.2], [0.8, 0.2]], [[0.3, 0.7]] * 4]).log()


def gate(**options):
    return gated_consensus(Seen(LOGITS, POINTS), LABELS, **options)


def ask(made, *places):
    asked = torch.tensor([[float(p)] for p in places])
    return made(Seen(LOGITS[:, : len(places)], asked)).exp()


def test_the_member_that_is_right_nearby_is_trusted():
    found = ask(gate(neighbours=2), -1.4, 1.4)
    assert torch.allclose(found, torch.tensor([[0.8, 0.2], [0.3, 0.7]]))


def test_shares_of_neighbours_of_four_numbers():
    # Near 0.4 lie 1, -1 and 2: the first knows one of three, the second two of three.
    found = ask(gate(neighbours=3, sharpness=1.0), 0.4)
    assert found[0].tolist() == pytest.approx([(0.8 + 2 * 0.3) / 3, (0.2 + 2 * 0.7) / 3])
    found = ask(gate(neighbours=3, sharpness=2.0), 0.4)
    assert found[0].tolist() == pytest.approx([(0.8 + 4 * 0.3) / 5, (0.2 + 4 * 0.7) / 5])


def test_all_neighbours_as_near_as_the_last_count():
    one, two = (ask(gate(neighbours=k, sharpness=1.0), 0.0) for k in (1, 2))
    assert torch.equal(one, two)
    assert one[0].tolist() == pytest.approx([0.55, 0.45])


def test_where_nobody_was_right_it_is_the_soft_vote():
    made = gated_consensus(Seen(LOGITS, POINTS), torch.tensor([0, 0, 0, 1]), neighbours=1)
    wrong = made.right.clone()
    wrong[:, 0] = False
    made.right.copy_(wrong)
    assert torch.allclose(ask(made, -2.5), soft_vote(LOGITS[:, :1]))


def test_a_gate_agrees_with_a_loop_in_float64():
    generator = torch.Generator().manual_seed(0)
    points, asked = (torch.randn(n, 3, generator=generator) for n in (50, 20))
    logits = torch.randn(4, 70, 5, generator=generator)
    labels = torch.arange(50) % 5
    made = gated_consensus(Seen(logits[:, :50], points), labels, neighbours=7, sharpness=3.0)
    found = made(Seen(logits[:, 50:], asked)).exp()
    for b, place in enumerate(asked.double()):
        far = (points.double() - place).norm(dim=1)
        near = far.argsort()[:7]
        said = logits[:, 50 + b].double().softmax(-1)
        trust = (logits[:, near].argmax(-1) == labels[near]).double().mean(1) ** 3
        trust = trust if trust.sum() else torch.ones(4).double()
        expected = (trust[:, None] * said).sum(0) / trust.sum()
        assert torch.allclose(found[b].double(), expected, atol=1e-6)


def test_the_number_of_neighbours_is_chosen_with_every_example_held_out():
    report = {}
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(60, 1, generator=generator)
    labels = (points[:, 0] > 0).long()
    sure = torch.tensor([[2.0, -2.0], [-2.0, 2.0]])[:, None].expand(-1, 60, -1)
    made = gated_consensus(Seen(sure, points), labels, report=report)
    losses = {int(k): v for k, v in report["held_out_loss"].items()}
    assert set(losses) == {20, 10, 5, 3, 1}
    assert made.options["neighbours"] == report["neighbours"] == min(losses, key=losses.get)
    assert losses[1] < losses[20]


def test_a_single_example_is_enough():
    made = gated_consensus(Seen(LOGITS[:, :1], POINTS[:1]), LABELS[:1])
    assert ask(made, 9.0)[0].tolist() == pytest.approx([0.8, 0.2])


def test_activations_are_what_the_last_layer_reads():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        members = [nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)) for _ in range(2)]
        inputs = torch.randn(30, 3)
    batches = (inputs, torch.arange(30) % 3)
    made = ensemble(members, kind="gated_consensus", batches=batches, similar="activations")
    with torch.no_grad():
        read = torch.stack([m[1](m[0](inputs)) for m in members])
    spread = (read - read.mean(1, keepdim=True)).square().sum(-1).mean(1).sqrt()
    expected = torch.cat([read[0] / spread[0], read[1] / spread[1]], 1)
    assert torch.allclose(made.consensus.points, expected, atol=1e-6)


def test_a_network_without_a_layer_has_no_activations():
    from metamerge.ensembles.watching import last_layer
    from metamerge.errors import StructureError

    with pytest.raises(StructureError, match="Choose similar='inputs'"):
        last_layer(trace(nn.Sequential(nn.ReLU()), torch.zeros(2, 3)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neighbours": 0}, "neighbours must be a whole number from 1"),
        ({"neighbours": 5}, "number of examples, 4"),
        ({"neighbours": True}, "neighbours must be"),
        ({"neighbours": 1.5}, "neighbours must be"),
        ({"sharpness": 0}, r"sharpness must be a number in \(0, inf\), got 0"),
        ({"sharpness": float("nan")}, "sharpness must be"),
        ({"sharpness": "4"}, "sharpness must be"),
        ({"similar": "outputs"}, "similar must be one of"),
        ({"similar": "activations"}, "none were seen"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        gate(**options)


def test_inputs_that_were_not_seen_are_asked_for():
    with pytest.raises(ConfigError, match="similar='inputs', but none were seen"):
        gated_consensus(Seen(LOGITS), LABELS)
