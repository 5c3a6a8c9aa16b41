"""Looking at zoos: the table by hand, pictures that are drawn, mistakes that are refused."""

import io
import sys

import pytest
import torch
from rich.console import Console

from zoo import show
from zoo.build import build
from zoo.recipe import ZooOptions
from zoo.show import ShowOptions
from zoo.store import load_zoo


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shown") / "zoo"
    options = ZooOptions(
        out=str(folder), members=(2, 3), train_families=3, validation_families=1, test_families=2,
        epochs=2, segment_size=60, snapshots=4, widths=(8,),
    )  # fmt: skip
    return build(options)


def shown(options):
    console = Console(record=True, width=110, file=io.StringIO())
    made = show.show(options, console)
    return made, console.export_text()


def test_all_pictures_are_drawn_and_the_table_has_every_group(zoo, tmp_path):
    made, text = shown(ShowOptions(str(zoo.folder), out=str(tmp_path / "drawn")))
    assert sorted(p.stem for p in made) == ["curves", "path", "segments", "weight_space"]
    for path in made:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000
    assert all(name in text for name in zoo.groups)
    assert "digits, mlp, split dirichlet, init own" in " ".join(text.split())


def test_scores_of_the_table_are_those_of_the_records(zoo, tmp_path):
    _, text = shown(ShowOptions(str(zoo.folder), out=str(tmp_path)))
    score = zoo.records("train", 3)["validation_accuracy"]
    (row,) = [line for line in text.splitlines() if line.strip().startswith("train-k3")]
    assert f"{score.mean():.2f} ± {score.std(correction=0):.2f}" in row
    assert f"{score.min():.2f}..{score.max():.2f}" in row


def test_distances_are_relative_to_norms():
    points = torch.tensor([[[3.0, 0.0], [0.0, 4.0]]])  # 5 apart, of norms 3 and 4
    assert show._relative(points) == pytest.approx(5 / 3.5)


def test_the_plane_keeps_distances_of_points_that_lie_in_one():
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(2, 4, 2, generator=generator, dtype=torch.float64)
    axes = torch.linalg.qr(torch.randn(9, 2, generator=generator, dtype=torch.float64))[0]
    plane = show._plane((flat @ axes.T).float()).flatten(0, 1).double()
    expected = torch.cdist(flat.flatten(0, 1), flat.flatten(0, 1))
    assert torch.allclose(torch.cdist(plane, plane), expected, atol=1e-5)


def test_aligned_members_are_no_further_apart(zoo):
    apart, aligned, _ = map(float, show._distances(zoo, "train", 3))
    assert aligned < apart


def test_families_and_members_that_are_not_there_are_refused(zoo, tmp_path, monkeypatch, capsys):
    for words, match in (
        (["--members", "9"], "has no families"),
        (["--part", "trial"], "there are"),
        (["--member", "3"], "have 3 members"),
    ):
        arguments = ["show", "--zoo", str(zoo.folder), "--out", str(tmp_path), *words]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as stopped:
            show.main()
        assert stopped.value.code == 2
        assert match in capsys.readouterr().err


def test_a_zoo_without_snapshots_says_how_to_get_them(tmp_path):
    options = ZooOptions(
        task="diabetes", out=str(tmp_path / "zoo"), members=(2,), train_families=1,
        validation_families=0, test_families=0, epochs=1, split="disjoint", segment_size=40,
        objective=60, widths=(4,),
    )  # fmt: skip
    build(options)
    made, text = shown(ShowOptions(str(tmp_path / "zoo"), out=str(tmp_path)))
    assert sorted(p.stem for p in made) == ["curves", "weight_space"]
    assert "--snapshots" in text
    assert load_zoo(tmp_path / "zoo").snapshots("train", 2) == {}
