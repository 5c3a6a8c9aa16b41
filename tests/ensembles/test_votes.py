import pytest
import torch
from torch import nn
from torch.func import functional_call

from metamerge.ensembles import Ensemble, majority_vote, soft_vote
from metamerge.errors import ConfigError, IncompatibleWeights
from metamerge.structure import trace
from metamerge.weights import stack


def logits_of(probabilities):
    return torch.tensor(probabilities).log()


def test_soft_vote_of_four_numbers():
    found = soft_vote(logits_of([[[0.9, 0.1]], [[0.4, 0.6]]]))
    assert found.flatten().tolist() == pytest.approx([0.65, 0.35])


def test_soft_vote_does_not_care_for_a_member_s_scale_of_logits():
    logits = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(
        soft_vote(logits + 100 * torch.rand(3, 4, 1)), soft_vote(logits), atol=1e-5
    )


def test_majority_beats_confidence():
    logits = logits_of([[[0.99, 0.01]], [[0.4, 0.6]], [[0.45, 0.55]]])
    assert majority_vote(logits).tolist() == [1]
    assert soft_vote(logits).argmax(-1).tolist() == [0]


def test_ties_go_to_the_larger_sum_of_probabilities():
    # One vote each for 0 and 1; class 2 has the largest sum but no vote.
    logits = logits_of([[[0.5, 0.02, 0.48]], [[0.02, 0.51, 0.47]]])
    assert majority_vote(logits).tolist() == [1]


def test_ties_go_to_the_tie_breaker_s_choice():
    logits = logits_of([[[0.5, 0.02, 0.48]], [[0.02, 0.51, 0.47]]])
    assert majority_vote(logits, torch.tensor([[3.0, 2.0, 1.0]])).tolist() == [0]
    assert majority_vote(logits, torch.tensor([[2.0, 3.0, 9.0]])).tolist() == [1]


def test_the_tie_breaker_is_not_asked_where_there_is_no_tie():
    logits = logits_of([[[0.9, 0.1]], [[0.9, 0.1]], [[0.1, 0.9]]])
    assert majority_vote(logits, torch.tensor([[0.0, 9.0]])).tolist() == [0]


def test_a_tie_breaker_that_rules_classes_out_still_chooses_among_the_leading():
    logits = logits_of([[[0.1, 0.6, 0.3]], [[0.1, 0.3, 0.6]]])
    tie_breaker = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    assert majority_vote(logits, tie_breaker).tolist() == [1]


def test_majority_vote_agrees_with_a_loop():
    logits = torch.randn(4, 200, 3, generator=torch.Generator().manual_seed(1)).double()
    expected = []
    for row in logits.unbind(1):
        votes = [0] * 3
        for member in row:
            votes[int(member.argmax())] += 1
        sums = row.softmax(-1).sum(0)
        expected.append(max(range(3), key=lambda c: (votes[c], float(sums[c]))))
    assert majority_vote(logits).tolist() == expected


def test_shapes_that_make_no_sense_are_refused():
    for vote in (soft_vote, majority_vote):
        for logits in (torch.zeros(4, 3), torch.zeros(0, 4, 3)):
            with pytest.raises(ConfigError, match="expected \\(members, inputs, classes\\)"):
                vote(logits)
    with pytest.raises(ConfigError, match=r"tie_breaker has shape \(2, 4, 3\), expected \(4, 3\)"):
        majority_vote(torch.zeros(2, 4, 3), torch.zeros(2, 4, 3))


def network():
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval()


@pytest.fixture(scope="module")
def members():
    generator = torch.Generator().manual_seed(2)
    made = []
    for _ in range(3):
        state = network().state_dict()
        for key, tensor in state.items():
            if tensor.is_floating_point():
                state[key] = torch.rand(tensor.shape, generator=generator) + 0.1
        made.append(state)
    return made


@pytest.fixture(scope="module")
def program():
    return trace(network(), torch.zeros(2, 5))


INPUTS = torch.linspace(-2, 2, 40).reshape(8, 5)


def test_an_ensemble_of_four_numbers():
    program = trace(nn.Sequential(nn.Linear(1, 2, bias=False)), torch.zeros(2, 1))
    rows = logits_of([[[0.9], [0.1]], [[0.4], [0.6]]])  # at input 1, logits are the weights
    found = Ensemble(program, {"0.weight": rows})(torch.ones(1, 1))
    assert found.exp().flatten().tolist() == pytest.approx([0.65, 0.35])


def test_an_ensemble_agrees_with_a_loop_in_float64(program, members):
    model, total = network().double(), 0
    for member in members:
        exact = {k: t.double() if t.is_floating_point() else t for k, t in member.items()}
        total = total + functional_call(model, exact, INPUTS.double()).softmax(-1)
    found = Ensemble(program, stack(members))(INPUTS)
    assert torch.allclose(found.exp().double(), total / 3, atol=1e-6)
    assert torch.allclose(found.exp(), soft_vote_of(program, members), atol=1e-6)


def soft_vote_of(program, members):
    model = network()
    return soft_vote(torch.stack([functional_call(model, m, INPUTS) for m in members]))


def test_the_state_dict_holds_the_members_under_their_names(program, members):
    state = Ensemble(program, stack(members)).state_dict()
    assert list(state) == [f"members.{key}" for key in members[0]]
    for key in members[0]:
        assert torch.equal(state[f"members.{key}"], stack(members)[key])


def test_an_ensemble_is_restored_from_its_state_dict(program, members):
    first = Ensemble(program, stack(members))
    other = Ensemble(program, stack(members[::-1]))
    other.load_state_dict(first.state_dict())
    assert torch.equal(other(INPUTS), first(INPUTS))
    assert torch.equal(other.members.get_buffer("0.bias"), stack(members)["0.bias"])


def test_an_ensemble_holds_copies(program, members):
    stacked = stack(members)
    ensemble = Ensemble(program, stacked)
    before = ensemble(INPUTS)
    for tensor in stacked.values():
        tensor.zero_()
    assert torch.equal(ensemble(INPUTS), before)
    assert list(ensemble.parameters()) == []


def test_half_precision_members_vote_in_float32(program, members):
    halves = [{k: t.half() if t.is_floating_point() else t for k, t in m.items()} for m in members]
    found = Ensemble(program, stack(halves))(INPUTS.half())
    assert found.dtype == torch.float32
    assert torch.allclose(found, Ensemble(program, stack(members))(INPUTS), atol=2e-2)


def test_members_that_are_not_stacked_are_refused(program, members):
    with pytest.raises(IncompatibleWeights, match="one common number of members"):
        Ensemble(program, members[0])
