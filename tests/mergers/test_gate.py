"""The competence gate: what it reads of members, and what it makes of their answers."""

from math import exp, log

import pytest
import torch

from metamerge.mergers import consensus
from metamerge.mergers.gate import TOLD, CompetenceGate, shares

WIDTH = 12
LEVEL, SLOPE, DECIDED, GAMMA, SCALE = range(TOLD)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gate_case(dtype=torch.float32):
    """States, rows, biases, logits and disagreement of two families of three members."""
    shapes = ((2, 3, 5, WIDTH), (2, 3, 5, 6), (2, 3, 5), (2, 3, 20, 5))
    generator = seeded(7)
    drawn = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    return [*drawn, torch.tensor([0.3, 0.8], dtype=dtype)]


def make_gate(noise):
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        gate = CompetenceGate(WIDTH)
        for parameter in gate.parameters():
            parameter.add_(noise * torch.randn(parameter.shape))
    return gate.requires_grad_(False)


def drawn_trust(logits, seed=1):
    """Trust in which every number has its say."""
    return torch.randn(*logits.shape[:2], 5, TOLD, generator=seeded(seed), dtype=logits.dtype)


# ---------------------------------------------------------------------------- what is read


def test_a_fresh_gate_trusts_all_members_alike():
    trust = make_gate(0.0)(*gate_case())
    assert torch.equal(trust, torch.zeros(2, 3, 5, TOLD))


def test_members_that_do_not_differ_are_not_weighed():
    *case, _ = gate_case()
    trust = make_gate(0.5)(*case, torch.tensor([0.0, 0.8]))
    assert torch.equal(trust[0], torch.zeros(3, 5, TOLD))
    assert trust[1].abs().amin() > 0


def test_trust_grows_with_the_disagreement():
    *case, _ = gate_case()
    small, large = (make_gate(0.5)(*case, torch.full((2,), s)) for s in (0.2, 0.4))
    assert torch.allclose(large, 2 * small, atol=1e-6)


def test_trust_follows_members_and_classes():
    states, rows, bias, logits, spread = gate_case()
    gate, order, names = make_gate(0.5), [2, 0, 1], [3, 0, 4, 1, 2]
    trust = gate(states, rows, bias, logits, spread)
    turned = gate(states[:, order], rows[:, order], bias[:, order], logits[:, order], spread)
    assert torch.allclose(turned, trust[:, order], atol=1e-5)
    renamed = gate(
        states[:, :, names], rows[:, :, names], bias[..., names], logits[..., names], spread
    )
    assert torch.allclose(renamed, trust[:, :, names], atol=1e-5)
    assert not torch.allclose(renamed, trust, atol=1e-2)


def test_no_bias_is_a_bias_of_zeros():
    states, rows, bias, logits, spread = gate_case()
    gate = make_gate(0.5)
    found = gate(states, rows, None, logits, spread)
    assert torch.equal(found, gate(states, rows, torch.zeros_like(bias), logits, spread))


def test_families_do_not_look_at_each_other():
    case, gate = gate_case(), make_gate(0.5)
    second = gate(*(tensor[1:] for tensor in case))
    assert torch.allclose(second, gate(*case)[1:], atol=1e-6)


def test_the_gate_listens_to_the_member_whose_token_scores_highest():
    states, rows, bias, logits, _ = gate_case()
    gate = make_gate(0.0)
    with torch.no_grad():  # one hidden unit that is 1 for the second member alone, as its level
        gate.embed[0].weight.zero_()
        gate.embed[0].bias.zero_()
        gate.embed[0].weight[0, -WIDTH] = 1.0
        for layer in (gate.mixer[0], gate.mixer[2]):
            layer.weight.zero_()
            layer.bias.zero_()
            layer.weight[0, 0] = 1.0
        gate.head.weight[LEVEL, 0] = 1.0
    states = torch.zeros_like(states)
    states[:, 1, :, 0] = 1000.0
    found = consensus(gate(states, rows, bias, logits, torch.ones(2)), logits)
    own = logits[:, 1] - logits[:, 1].mean(-1, keepdim=True)
    assert torch.allclose(found - found.mean(-1, keepdim=True), own, atol=1e-4)


# ---------------------------------------------------------------------------- the consensus


def by_hand(*told):
    """The consensus of two members on one input with two classes: 4 0 and -2 0."""
    trust = torch.zeros(1, 2, 2, TOLD)
    for member, row, number, value in told:
        trust[0, member, row, number] = value
    logits = torch.tensor([[[[4.0, 0.0]], [[-2.0, 0.0]]]])  # centred 2 -2 and -1 1, means 2 and -1
    return consensus(trust, logits)[0, 0].tolist()


def test_a_consensus_by_hand():
    assert by_hand() == pytest.approx([1.0, 0.0])  # the mean: 0.5 -0.5, and 0.5
    # First class: three quarters of the first member, 0.75 * 2 - 0.25; the other one as before.
    assert by_hand((0, 0, LEVEL, log(3))) == pytest.approx([1.25 + 0.5, 0.0])
    # The second member's first logit is 1 higher, before the mean is taken.
    assert by_hand((1, 0, GAMMA, 1.0)) == pytest.approx([1.5, 0.0])
    # Twice the first member's second logit: (-4 + 1) / 2.
    assert by_hand((0, 1, SCALE, log(2))) == pytest.approx([1.0, -1.0])


def test_slope_and_decision_by_hand():
    # Log-probabilities of the first class: 4 - log(1 + e^4), and -2 - log(1 + e^-2).
    likely = [4 - log(1 + exp(4)), -2 - log(1 + exp(-2))]
    share = 1 / (1 + exp(likely[1] - likely[0]))
    slope = [(member, 0, SLOPE, 1.0) for member in (0, 1)]
    assert by_hand(*slope) == pytest.approx([3 * share - 1 + 0.5, 0.0])
    # Those of the likelier class: 4 - log(1 + e^4), and -log(1 + e^-2).
    share = 1 / (1 + exp(-log(1 + exp(-2)) - likely[0]))
    decided = [(member, 1, DECIDED, 1.0) for member in (0, 1)]
    assert by_hand(*decided) == pytest.approx([1.0, 1 - 3 * share + 0.5])


def test_the_consensus_equals_a_loop_over_members_classes_and_inputs():
    logits = 20 * gate_case(torch.float64)[3]  # some are below the bounds of -12 and -4
    logits[0, 0, 0] = torch.tensor([0.0, 5.0, -20.0, 1.0, 2.0])
    trust = drawn_trust(logits)
    found = consensus(trust, logits)
    for f, b, c in torch.cartesian_prod(*(torch.arange(n) for n in found.shape)).tolist():
        scores, said, means = [], [], []
        for k in range(3):
            own, (level, slope, decided, gamma, scale) = logits[f, k, b], trust[f, k, c]
            probabilities = own.softmax(-1)
            likely = max(float(probabilities[c].log()), -12.0)
            sure = max(float(probabilities.max().log()), -4.0)
            scores.append(float(level + slope * likely + decided * sure))
            said.append(float((own[c] - own.mean()) * scale.exp() + gamma))
            means.append(float(own.mean()))
        parts = torch.tensor(scores, dtype=torch.float64).softmax(0)
        expected = float((parts * torch.tensor(said)).sum()) + sum(means) / 3
        assert float(found[f, b, c]) == pytest.approx(expected, abs=1e-5)


def test_without_trust_the_consensus_is_the_mean_of_the_logits():
    logits = gate_case()[3]
    found = consensus(torch.zeros(2, 3, 5, TOLD), logits)
    assert torch.allclose(found, logits.mean(1), atol=1e-6)


def test_what_a_member_adds_to_all_its_logits_changes_no_probability():
    logits = gate_case()[3]
    trust = drawn_trust(logits)
    louder = logits + torch.tensor([0.0, 3.0, -5.0])[:, None, None]
    found, expected = consensus(trust, louder).softmax(-1), consensus(trust, logits).softmax(-1)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, logits.mean(1).softmax(-1), atol=0.1)


def test_members_that_say_the_same_are_repeated_whomever_one_trusts():
    logits = gate_case()[3][:, :1].expand(-1, 3, -1, -1)
    trust = drawn_trust(logits)
    trust[..., [GAMMA, SCALE]] = 0
    assert torch.allclose(consensus(trust, logits), logits[:, 0], atol=1e-5)


def test_the_consensus_follows_the_classes_and_not_the_members():
    logits = gate_case()[3]
    trust, order, names = drawn_trust(logits), [2, 0, 1], [3, 0, 4, 1, 2]
    expected = consensus(trust, logits)
    assert torch.allclose(consensus(trust[:, order], logits[:, order]), expected, atol=1e-5)
    renamed = consensus(trust[:, :, names], logits[..., names])
    assert torch.allclose(renamed, expected[..., names], atol=1e-5)


def test_every_input_is_judged_by_itself():
    logits = gate_case()[3]
    trust = drawn_trust(logits)
    single = consensus(trust, logits[:, :, 4:5])
    assert torch.allclose(single, consensus(trust, logits)[:, 4:5], atol=1e-6)


@pytest.mark.parametrize("size", [0.0, 1e4])
def test_extreme_logits_give_finite_gradients(size):
    logits = (size * gate_case()[3]).requires_grad_()
    trust = drawn_trust(logits).requires_grad_()
    consensus(trust, logits).square().mean().backward()
    for tensor in (logits, trust):
        assert tensor.grad.isfinite().all()


def test_shares_sum_to_1_and_follow_the_level():
    logits = torch.randn(2, 3, 7, 5, generator=seeded(3), dtype=torch.float64)
    trust = torch.zeros(2, 3, 5, TOLD, dtype=torch.float64)
    assert torch.allclose(shares(trust, logits), torch.full_like(logits, 1 / 3))
    trust[0, 1, 2, LEVEL] = log(4.0)  # four times the say of each of two others: 4/6
    found = shares(trust, logits)
    assert torch.allclose(found.sum(1), torch.ones(2, 7, 5, dtype=torch.float64))
    assert torch.allclose(found[0, 1, :, 2], torch.full((7,), 2 / 3, dtype=torch.float64))
