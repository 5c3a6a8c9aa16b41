"""The parts of the alignment benchmark that need neither MNIST nor another package."""

import sys

import pytest
import torch

from evaluation.benchmarks import aligners
from evaluation.benchmarks.aligners import Case, own, pot_fusion
from evaluation.benchmarks.alignment import BenchmarkOptions, _row, _times_faster
from metamerge.structure import Layout, discover_program
from zoo import architectures
from zoo.tasks import Task


@pytest.fixture(scope="module")
def task():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(3000, 1, 4, 4, generator=generator)
    return Task("noise", inputs, torch.arange(3000) % 3, 3, test_rows=range(2000, 3000))


@pytest.fixture(scope="module")
def case(task):
    """A network and two copies that store its units in another order."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = architectures.build("mlp", (1, 4, 4), 3, widths=(7, 6))
    program = architectures.program_of(network, (1, 4, 4))
    layout = Layout(program, discover_program(program))
    generator = torch.Generator().manual_seed(0)
    weights = {key: t.detach() for key, t in network.state_dict().items()}
    members = [
        weights,
        *(layout.spec.permute(weights, layout.spec.random(generator)) for _ in "ab"),
    ]
    return Case("copies, K=3", network, layout, members, task.inputs[:64])


@pytest.mark.parametrize("aligner", [own("weight_matching"), own("optimal_transport"), pot_fusion])
def test_what_an_aligner_reaches_is_computed_by_our_code(aligner, case, task):
    row = _row("some", aligner, case, task, BenchmarkOptions(repeats=1))
    assert row["cost"] == 0.0
    assert row["distance"] == pytest.approx(0.0, abs=1e-6)
    assert row["seconds"] > 0
    assert 0 <= row["accuracy"] <= 1


def test_what_is_missing_or_refuses_is_said(case, task):
    def refusing(case):
        raise ValueError("no")

    options = BenchmarkOptions(repeats=1)
    assert _row("some", "not installed", case, task, options)["why"] == "not installed"
    assert "ValueError('no')" in _row("some", refusing, case, task, options)["why"]
    assert _row("sinkhorn-rebasin", own("canonical"), case, task, options)["why"] == "pairs only"


def test_the_ratio_is_that_to_the_faster_package_on_pairs():
    def row(case, aligner, seconds):
        return {"case": case, "aligner": aligner, "seconds": seconds}

    rows = [
        row("net, K=2", "weight_matching", 0.5),
        row("net, K=2", "rebasin", 2.0),
        row("net, K=2", "sinkhorn-rebasin", 4.0),
        row("net, K=8", "weight_matching", 1.0),
        row("net, K=8", "rebasin", 9.0),
        {"case": "other, K=2", "aligner": "rebasin", "why": "not installed"},
        row("other, K=2", "weight_matching", 1.0),
    ]
    assert _times_faster(rows) == {"net, K=2": 4.0}


def test_an_environment_that_cannot_be_made_says_why(tmp_path, monkeypatch):
    def create(folder, **options):
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "python").symlink_to(sys.executable)

    monkeypatch.setattr(aligners.venv, "create", create)
    monkeypatch.setattr(aligners, "SINKHORN", ("--no-index", "no-such-package-anywhere==1"))
    with pytest.raises(RuntimeError, match="no-such-package-anywhere"):
        aligners.sinkhorn_environment(tmp_path / "environment")
    assert not (tmp_path / "environment" / "ready").exists()
