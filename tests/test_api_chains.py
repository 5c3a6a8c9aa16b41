"""merge() with chains of alignments and corrections, and with batch normalisation."""

import json

import pytest
import torch
from torch import nn

from metamerge import merge
from metamerge.errors import ConfigError, IncompatibleWeights, NonFinite, StructureError


def network(seed, width=8):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))


def normed(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def inputs(count=200):
    return 1.0 + 2.0 * torch.randn(count, 6, generator=torch.Generator().manual_seed(5))


NETS = [network(seed) for seed in range(3)]


def test_alignments_are_applied_one_after_the_other_and_each_is_told():
    chain = ["weight_matching", "weight_matching"]
    merged = merge(NETS, method="average", align=chain)
    once = merge(NETS, method="average", align="weight_matching")
    first, second = merged.report["alignment"]
    assert first["matching_cost"] < first["matching_cost_before"]
    assert second["matching_cost_before"] == first["matching_cost"]
    assert merged.report["matching_cost_before"] == first["matching_cost_before"]
    assert merged.report["matching_cost"] == pytest.approx(once.report["matching_cost"], rel=1e-6)
    assert merged.report["align"] == chain
    # what is aligned stays as it is, but for the frame: another member may be the medoid now
    outputs = [m.to_module(NETS[0])(inputs()) for m in (merged, once)]
    torch.testing.assert_close(*outputs)
    json.dumps(merged.report)


def test_no_alignment_in_a_list_is_none():
    merged = merge(NETS, method="average", align=[])
    plain = merge(NETS, method="average", align=None)
    assert all(torch.equal(merged.weights[k], t) for k, t in plain.weights.items())


def test_options_of_the_alignment_reach_it():
    free = merge(NETS, method="average").report["matching_cost"]
    pairs = merge(NETS, method="average", align_options={"to": "reference"})
    assert free < pairs.report["matching_cost"]


def test_an_option_that_no_alignment_has_is_refused():
    with pytest.raises(ConfigError, match=r"'weight_matching' has no option 'sweep'.*sweeps"):
        merge(NETS, method="average", align_options={"sweep": 3})
    with pytest.raises(ConfigError, match="align=None has no option 'sweeps'"):
        merge(NETS, method="average", align=None, align_options={"sweeps": 3})


def test_corrections_are_applied_one_after_the_other():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        nets = [nn.Sequential(network(s), nn.ReLU(), nn.Linear(3, 3)) for s in range(3)]
    chain = merge(nets, method="average", correct=["repair", "refit"], batches=inputs())
    other = merge(nets, method="average", correct=["refit", "repair"], batches=inputs())
    assert list(chain.report["corrections"]) == ["repair", "refit"]
    assert not torch.allclose(chain.weights["0.2.weight"], other.weights["0.2.weight"], atol=1e-4)
    assert chain.report["correct"] == ["repair", "refit"]


def test_members_are_not_aligned_away_from_their_base():
    with pytest.raises(ConfigError, match=r"align='weight_matching': ties reads .* align=None"):
        merge(NETS, method="ties", align="weight_matching", base=network(9))


def test_running_statistics_are_those_of_the_fused_network_wherever_there_are_inputs():
    nets = [normed(seed) for seed in range(3)]
    merged = merge(nets, method="average", batches=inputs())
    hidden = inputs() @ merged.weights["0.weight"].T + merged.weights["0.bias"]
    torch.testing.assert_close(merged.weights["1.running_mean"], hidden.mean(0))
    torch.testing.assert_close(merged.weights["1.running_var"], hidden.var(0))
    assert merged.report["corrections"]["batch_norm"] == {"inputs": 200}


def test_without_inputs_running_statistics_are_averaged():
    nets = [normed(seed).train() for seed in range(2)]
    for net in nets:
        net(inputs())
        net.eval()
    merged = merge(nets, method="average", align=None)
    expected = (nets[0][1].running_var + nets[1][1].running_var) / 2
    torch.testing.assert_close(merged.weights["1.running_var"], expected)
    assert "corrections" not in merged.report


def test_variances_below_zero_are_refused_or_measured_anew():
    nets = [normed(seed) for seed in range(2)]
    nets[1][1].running_var[2] = -0.5
    with pytest.raises(NonFinite, match=r"checkpoints\[1\].*'1.running_var' holds 1 .*batches="):
        merge(nets, method="average", align=None)
    merged = merge(nets, method="average", align=None, batches=inputs())
    assert float(merged.weights["1.running_var"].min()) > 0


def test_members_of_other_widths_are_refused_unless_the_alignment_takes_them():
    pair = [network(0), network(1, width=5)]
    with pytest.raises(IncompatibleWeights, match="optimal_transport"):
        merge(pair, method="average")
    merged = merge(pair, method="average", align="optimal_transport", model=pair[0])
    assert {k: t.shape for k, t in merged.weights.items()} == {
        k: t.shape for k, t in pair[0].state_dict().items()
    }


def test_of_members_of_other_widths_one_has_to_fit_the_model():
    pair = [network(0, width=4), network(1, width=5)]
    with pytest.raises(StructureError, match=r"'0.weight' has shape \(4, 6\).*\(8, 6\)"):
        merge(pair, method="average", align="optimal_transport", model=network(2))


def test_members_are_aligned_for_corrections_where_the_method_does_without():
    alone = merge(NETS, method="zipit", batches=inputs())
    corrected = merge(NETS, method="zipit", batches=inputs(), correct="repair")
    assert alone.report["align"] is None
    assert corrected.report["align"] == "weight_matching"
    named = merge(NETS, method="zipit", batches=inputs(), correct="repair", align=None)
    assert named.report["align"] is None
