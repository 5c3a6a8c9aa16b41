"""What every kind of ensemble must do, whatever it is fitted to."""

import copy

import pytest
import torch
from torch import nn

from metamerge.checkpoints import Checkpoint
from metamerge.ensembles import ensemble, get_ensemble, list_ensembles, load_ensemble
from metamerge.structure import trace

# Sums over members in another order differ by float32's 1e-7, relative; logarithms of probabilities
# here are of the order of 10.
REORDERED = 1e-5


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def cnn():
    head = (nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), *head)


SHAPES = {mlp: (6,), cnn: (1, 5, 5)}


class Case:
    """One kind on one architecture; what is made without options is made once."""

    def __init__(self, kind, network):
        self.kind, self.network, self.known = kind, network, {}
        shape, self.numbers = SHAPES[network], get_ensemble(kind).numbers
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.modules = [network().eval() for _ in range(4)]
            inputs, self.inputs = torch.randn(36, *shape), torch.randn(20, *shape)
            with torch.no_grad():
                mean = torch.stack([module(inputs) for module in self.modules]).mean(0)
            targets = mean + 0.1 * torch.randn(36, 3) if self.numbers else torch.arange(36) % 3
            self.batches = (inputs, targets)
        program = trace(self.modules[0], inputs[:2]).to_json()
        self.members = [Checkpoint(f"m{i}", s, program) for i, s in enumerate(states(self.modules))]

    def make(self, members=None, **options):
        given = {"kind": self.kind, "batches": self.batches, **options}
        if members is not None or options:
            return ensemble(self.members if members is None else members, **given)
        if not self.known:
            self.known["made"] = ensemble(self.members, **given)
        return copy.deepcopy(self.known["made"])


@pytest.fixture(scope="module", params=list_ensembles())
def kind(request):
    return request.param


@pytest.fixture(scope="module", params=[mlp, cnn], ids=["mlp", "cnn"])
def case(request, kind):
    return Case(kind, request.param)


def states(members):
    return [{k: t.clone() for k, t in m.state_dict().items()} for m in members]


def said_by(member, case):
    with torch.no_grad():
        out = member(case.inputs)
    return out if case.numbers else out.log_softmax(-1)


def test_outputs_are_numbers_or_logarithms_of_probabilities(case):
    found = case.make()(case.inputs)
    assert found.shape == (20, 3)
    assert found.isfinite().all()
    if not case.numbers:
        assert torch.allclose(found.exp().sum(-1), torch.ones(20), atol=1e-5)


def test_one_member_says_what_it_says(case):
    found, own = case.make(case.members[:1])(case.inputs), said_by(case.modules[0], case)
    if case.kind == "majority_vote":  # its probabilities are shares of votes
        assert torch.equal(found.argmax(-1), own.argmax(-1))
    else:
        assert torch.allclose(found, own, atol=1e-5)


def test_identical_members_say_what_one_of_them_says(case):
    found, own = case.make(case.members[:1] * 3)(case.inputs), said_by(case.modules[0], case)
    assert torch.equal(found.argmax(-1), own.argmax(-1))
    if case.kind != "majority_vote":
        assert torch.allclose(found, own, atol=1e-5)


def test_the_order_of_the_members_does_not_matter(case):
    found = case.make(case.members[::-1])(case.inputs)
    assert torch.allclose(found, case.make()(case.inputs), rtol=REORDERED, atol=REORDERED)


def test_a_saved_ensemble_says_the_same_to_the_bit(case, tmp_path):
    made = case.make()
    read = load_ensemble(made.save(tmp_path / "saved"))
    assert torch.equal(read(case.inputs), made(case.inputs))
    assert read.report == made.report
    assert read.state_dict().keys() == made.state_dict().keys()


def test_checkpoints_and_batches_are_left_as_they_are(case):
    before = [{k: t.clone() for k, t in m.weights.items()} for m in case.members]
    batches = [t.clone() for t in case.batches]
    made = case.make(recalibrated=True)
    for tensor in made.state_dict().values():
        tensor.zero_()
    for member, state in zip(case.members, before, strict=True):
        assert all(torch.equal(member.weights[key], state[key]) for key in state)
    assert all(torch.equal(t, b) for t, b in zip(case.batches, batches, strict=True))


def test_nothing_of_it_can_be_trained_and_no_gradient_comes_out(case):
    made = case.make()
    assert list(made.parameters()) == []
    assert not made(case.inputs).requires_grad
    assert not any(t.requires_grad for t in made.buffers())


def test_gradients_reach_the_inputs(case):
    inputs = case.inputs.clone().requires_grad_()
    made = case.make()
    (made(inputs) * torch.arange(3.0)).sum().backward()
    assert inputs.grad.isfinite().all()
    assert case.kind == "majority_vote" or float(inputs.grad.abs().sum()) > 0


def test_the_same_seed_gives_the_same_ensemble(case):
    one, two = case.make(), case.make(seed=0)
    for key, tensor in one.state_dict().items():
        assert torch.equal(two.state_dict()[key], tensor)


def test_training_mode_changes_nothing(case):
    made = case.make()
    assert not made.training
    expected, state = made(case.inputs), {k: t.clone() for k, t in made.state_dict().items()}
    assert torch.equal(made.train()(case.inputs), expected)
    assert all(torch.equal(made.state_dict()[k], t) for k, t in state.items())


def test_a_single_input_is_answered_as_among_others(case):
    made = case.make()
    alone = torch.cat([made(x[None]) for x in case.inputs])
    assert torch.allclose(alone, made(case.inputs), rtol=REORDERED, atol=REORDERED)


def test_double_precision_inputs_are_taken(case):
    made = case.make()
    found = made(case.inputs.double())
    assert found.dtype == torch.float32
    assert torch.equal(found, made(case.inputs))


def test_batches_may_come_one_by_one(case):
    inputs, targets = case.batches
    several = list(zip(inputs.split(15), targets.split(15), strict=True))
    assert torch.equal(case.make(batches=several)(case.inputs), case.make()(case.inputs))


def test_members_can_be_recalibrated(case):
    made = case.make(recalibrated=True)
    assert made.report["recalibrated"] is True
    model, (inputs, _) = copy.deepcopy(case.modules[1]), case.batches
    with torch.no_grad():
        norm = next(m for m in model if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d))
        norm.momentum = 1.0
        model.train()(inputs)
    key = next(k for k in model.state_dict() if k.endswith("running_var"))
    found = made.members.get_buffer(key)[1]
    assert torch.allclose(found, model.state_dict()[key], rtol=1e-4)


def test_an_unknown_option_is_refused(case):
    with pytest.raises(ValueError, match=f"{case.kind} has no option 'sharpnes'"):
        case.make(sharpnes=1)


def test_members_with_nan_are_refused(case):
    broken = states(case.modules)
    broken[2]["0.bias"][0] = torch.nan
    with pytest.raises(Exception, match=r"checkpoints\[2\].*'0.bias' holds 1 values"):
        case.make(broken, model=case.modules[0])
