import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from evaluation.benchmarks import streaming
from metamerge import merge_files
from metamerge.errors import ConfigError


@pytest.fixture
def family(tmp_path, monkeypatch):
    """A base and two members of a language model that is narrow."""
    for name, size in (("HIDDEN", 16), ("INNER", 44), ("WORDS", 64)):
        monkeypatch.setattr(streaming, name, size)
    return streaming.write_family(tmp_path, 20_000, torch.bfloat16)


def test_tensors_have_about_the_numbers_asked_for():
    for numbers in (10**6, 10**8, 10**9):
        made = sum(torch.Size(s).numel() for s in streaming.shapes(numbers).values())
        assert numbers <= made <= numbers + streaming.WORDS * streaming.HIDDEN


def test_members_differ_from_the_base_by_a_tenth(family):
    base, first, second = (load_file(path)["embed.weight"].float() for path in family)
    assert float((first - base).std() / base.std()) == pytest.approx(0.1, rel=0.2)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("method", streaming.METHODS)
def test_our_command_merges(family, tmp_path, method):
    out = tmp_path / "out"
    program, option, code = streaming.our_command(method, family, out, "500MB")
    assert (program, option) == (sys.executable, "-c")
    exec(code, {})
    counts = streaming.disagreements(method, out, out, family)
    assert (counts["unequal"], counts["undecided"]) == (0, 0)
    assert counts["entries"] == sum(t.numel() for t in load_file(family[0]).values())


def test_a_process_is_measured(tmp_path):
    work = "import time\nwhile time.process_time() < 0.2: held = bytearray(20 << 20)"
    run = streaming.observe([sys.executable, "-c", work], tmp_path)
    assert run.seconds >= run.working >= 0.2
    assert run.resident >= run.anonymous >= 20


@pytest.mark.parametrize("method", streaming.METHODS)
def test_the_recipe_names_members_and_base(family, tmp_path, method):
    command = streaming.their_command(method, family, tmp_path / "out", "1GB", "/there/bin/python")
    assert command[0] == "/there/bin/mergekit-pytorch"
    recipe = json.loads((tmp_path / "out.yml").read_text())
    assert [model["model"] for model in recipe["models"]] == [str(path) for path in family[1:]]
    base = {"average": None, "slerp": str(family[1]), "ties": str(family[0])}[method]
    assert recipe.get("base_model") == base


def test_planted_differences_are_counted_and_those_at_the_cut_apart(family, tmp_path):
    merge_files(family[1:], tmp_path / "ours", method="ties", base=family[0])
    found = load_file(tmp_path / "ours" / "model.safetensors")
    base, *members = (load_file(path)["embed.weight"].float() for path in family)
    size = (members[0] - base).abs().flatten()
    order = size.argsort(descending=True)
    at_the_cut, far = int(order[int(0.2 * len(size)) - 1]), int(order[0])
    for place in (at_the_cut, far):
        found["embed.weight"].view(-1)[place] += 1
    (tmp_path / "theirs").mkdir()
    save_file(found, tmp_path / "theirs" / "model.safetensors")
    folders = tmp_path / "ours", tmp_path / "theirs"
    counts = streaming.disagreements("ties", *folders, family)
    assert (counts["unequal"], counts["undecided"]) == (1, 1)
    assert streaming.disagreements("average", *folders, family)["unequal"] == 2


def test_a_command_that_fails_is_told_with_what_it_said():
    with pytest.raises(ConfigError, match="no such luck"):
        streaming.observe([sys.executable, "-c", "raise SystemExit('no such luck')"])
