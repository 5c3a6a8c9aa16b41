import json

import pytest
import torch
from torch import nn

from metamerge import merge
from metamerge.ensembles import Ensemble, ensemble, load_ensemble, majority_vote
from metamerge.errors import ConfigError, IncompatibleWeights, NonFinite, Unreadable
from metamerge.weights import unstack


def nets(count=3, outputs=3):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        make = lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, outputs))  # noqa: E731
        return [make().eval() for _ in range(count)]


INPUTS = torch.linspace(-2, 2, 200).reshape(40, 5)
LABELS = torch.arange(40) % 3
FITTED = [
    *("weighted_consensus", "learned_consensus", "convolutional_consensus"),
    *("gated_consensus", "stacking"),
]


def family(zoo, index):
    return unstack({key: t[index] for key, t in zoo.unseen.items()})


def test_a_merged_network_breaks_ties_and_has_no_vote():
    members, inputs = nets(2), torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    merged = merge(members, method="average", batches=inputs)
    made = ensemble(members, kind="majority_vote", tie_breaker=merged, batches=inputs)
    with torch.no_grad():
        logits = torch.stack([m(inputs) for m in members])
        judge = merged.to_module(members[0])(inputs)
    expected = majority_vote(logits, judge)
    assert torch.equal(made(inputs).argmax(-1), expected)
    assert not torch.equal(majority_vote(logits), expected)  # it did decide something
    assert len(made.members.get_buffer("0.weight")) == 3
    assert made.report["members"][-1] == "state dict"


def test_shares_of_votes_of_four_numbers():
    # Two votes for class 0, one for class 1: three and one that is cut in two, of four.
    net = nn.Sequential(nn.Linear(1, 2, bias=False))
    states = [{"0.weight": torch.tensor([[a], [0.0]])} for a in (3.0, 1.0, -2.0)]
    found = ensemble(states, kind="majority_vote", model=net)(torch.ones(1, 1)).exp().flatten()
    mean = float(torch.tensor([3.0, 1.0, -2.0]).sigmoid().mean())
    assert found.tolist() == pytest.approx([(2.5 + mean / 2) / 4, (1 + (1 - mean) / 2) / 4])


def test_a_vote_is_never_overruled_however_sure_the_tie_breaker_is():
    net = nn.Sequential(nn.Linear(1, 2, bias=False))
    states = [{"0.weight": torch.tensor([[a], [0.0]])} for a in (0.1, 0.1, -9.0)]
    sure = {"0.weight": torch.tensor([[-99.0], [0.0]])}
    made = ensemble(states, kind="majority_vote", model=net, tie_breaker=sure)
    assert made(torch.ones(1, 1)).argmax(-1).tolist() == [0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "softvote"}, "kind: got 'softvote'. Did you mean 'soft_vote'.*Expected one of"),
        ({"kind": "stacking"}, "stacking needs batches=<.inputs, labels. pairs>"),
        ({"kind": "stacked_mean"}, "stacked_mean needs batches=<.inputs, targets. pairs>"),
        ({"recalibrated": True}, "recalibrated=True needs batches"),
        ({"tie_breaker": {}}, "tie_breaker: soft_vote has no ties"),
        ({"kind": "stacking", "batches": INPUTS}, "has no labels"),
        ({"kind": "stacking", "batches": (INPUTS, LABELS + 1)}, "labels go from 1 to 3"),
        ({"batches": INPUTS[:, :4], "example_inputs": INPUTS[:2]}, "inputs have shape"),
        (
            {"kind": "stacked_mean", "batches": (INPUTS, LABELS[:9])},
            r"shape \(9,\), expected \(40,",
        ),
        ({"kind": "stacked_mean", "batches": (INPUTS, torch.zeros(40, 2))}, "expected .40, 3."),
        ({"kind": "stacked_mean", "batches": INPUTS}, "has no targets. Pass pairs"),
        ({"kind": "weighted_mean", "batches": (INPUTS, torch.full((40, 3), torch.nan))}, "finite"),
    ],
)
def test_what_cannot_be_made_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        ensemble(nets(), **arguments)


def test_a_classifier_s_consensus_is_not_fitted_to_networks_with_one_output():
    with pytest.raises(ConfigError, match="is for classifiers"):
        ensemble(nets(outputs=1), kind="stacking", batches=(INPUTS, LABELS * 0))


def test_members_that_overflow_on_the_batches_are_named():
    members = nets()
    with torch.no_grad():
        for layer in (members[1][0], members[1][2]):
            layer.weight.fill_(3e38)
    with pytest.raises(NonFinite, match=r"checkpoints\[1\] puts out NaN or infinity"):
        ensemble(members, kind="stacking", batches=(INPUTS, LABELS))


def test_members_of_another_width_are_refused():
    with pytest.raises(IncompatibleWeights, match="has shape"):
        ensemble([nets()[0], nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))])


def test_what_is_no_ensemble_is_not_read(tmp_path):
    merge(nets(), method="average").save(tmp_path / "merged")
    with pytest.raises(Unreadable, match="this checkpoint is no ensemble"):
        load_ensemble(tmp_path / "merged")


@pytest.mark.parametrize(
    "change",
    [
        {"name": "Sequential", "options": {}},
        {"name": "Stacking", "options": {"of": "logits", "more": 1}},
        {"name": "GatedConsensus", "options": {}},
        {"options": {}},
    ],
)
def test_a_manifest_that_was_tampered_with_is_refused(tmp_path, change):
    ensemble(nets(), kind="stacking", batches=(INPUTS, LABELS)).save(tmp_path / "own")
    path = tmp_path / "own" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["metadata"]["consensus"] = change
    path.write_text(json.dumps(manifest))
    with pytest.raises(Unreadable, match="do not make an ensemble"):
        load_ensemble(tmp_path / "own")


def test_an_ensemble_replaces_an_older_one_only_when_told(tmp_path):
    made = ensemble(nets())
    made.save(tmp_path / "own")
    with pytest.raises(ConfigError, match="not empty"):
        made.save(tmp_path / "own")
    made.save(tmp_path / "own", overwrite=True)


def test_an_ensemble_can_be_run_in_double_precision():
    made = ensemble(nets(), kind="learned_consensus", batches=(INPUTS, LABELS))
    assert made.double()(INPUTS).dtype == torch.float64


@pytest.fixture(scope="module")
def scores(digits_zoo):
    """Mean accuracy over two unseen families on test images, per kind and number of labels."""
    inputs, targets = digits_zoo.split.images("test")
    known = tuple(
        torch.cat(pair) for pair in zip(digits_zoo.objective, digits_zoo.validation, strict=True)
    )
    found = {}

    def score(kind, labels=150, **options):
        key = (kind, labels, *options.items())
        if key not in found:
            batches, total = tuple(t[:labels] for t in known), 0.0
            for index in range(2):
                made = ensemble(
                    family(digits_zoo, index),
                    kind=kind,
                    model=digits_zoo.network(),
                    batches=batches,
                    **options,
                )
                total += float((made(inputs).argmax(-1) == targets).float().mean()) / 2
            found[key] = total
        return found[key]

    return score


@pytest.mark.parametrize("kind", FITTED[1:])
def test_with_150_labels_fitted_consensuses_beat_the_vote_of_skewed_members(scores, kind):
    assert scores(kind) > scores("soft_vote") + 0.02


def test_weights_by_loss_are_not_much_worse_than_the_vote(scores):
    assert scores("weighted_consensus") > scores("soft_vote") - 0.02


def test_an_ensemble_without_a_consensus_is_the_soft_vote():
    made = ensemble(nets())
    again = Ensemble(made.program, dict(made.members.named_buffers()))
    assert torch.equal(again(INPUTS), made(INPUTS))
