import pytest
import torch

from metamerge.errors import ConfigError
from metamerge.mergers import (
    GNNConfig,
    GNNMerger,
    bundled_merger,
    load_merger,
    read_card,
    save_merger,
)
from metamerge.mergers.files import BUNDLED
from trainers.bundle import bundle

CARD = {"zoos": [{"options": {"out": "zoos/mine"}}], "options": {"zoo": ["a"], "out": "b"}}


def saved(folder, passed=True, **config):
    merger = GNNMerger(GNNConfig(**{"shapes": ((4,),), "probes": 8, "width": 8, **config}))
    gates = {"k2": [{"name": "member_order", "value": 0.5, "passed": passed}]}
    save_merger(merger, folder, {**CARD, "gates": gates})
    return merger


def test_a_bundled_merger_is_the_trained_one_in_half_precision(tmp_path):
    merger = saved(tmp_path / "merger")
    found = load_merger(bundle(tmp_path / "merger", tmp_path / "target"))
    for key, tensor in merger.state_dict().items():
        assert torch.equal(found.state_dict()[key], tensor.half().float()), key
    card = read_card(tmp_path / "target")
    assert card["precision"] == "torch.float16"
    assert card["gates"]["k2"][0]["passed"]
    assert "mine" not in str(card)


def test_a_merger_that_failed_a_gate_is_not_bundled(tmp_path):
    saved(tmp_path / "merger", passed=False)
    with pytest.raises(ConfigError, match="fails gates: k2 member_order"):
        bundle(tmp_path / "merger", tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_a_merger_that_is_too_large_is_not_bundled(tmp_path):
    saved(tmp_path / "merger", shapes=((4096,),), probes=600)
    with pytest.raises(ConfigError, match="at most 4194304"):
        bundle(tmp_path / "merger", tmp_path / "target")


def test_the_merger_of_the_package_is_small_and_passed_its_gates():
    assert sum(path.stat().st_size for path in BUNDLED.iterdir()) < 4 * 2**20
    assert bundled_merger().config.shapes == ((1, 28, 28), (1, 8, 8))
    gates = [gate for own in read_card(BUNDLED)["gates"].values() for gate in own]
    assert len(gates) >= 8 * 16
    assert all(gate["passed"] and gate["value"] <= gate["limit"] for gate in gates)
