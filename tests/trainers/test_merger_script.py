"""The merger's training as users start it: real processes, kills, resumes, two ranks."""

import json
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from evaluation.metrics import accuracy
from metamerge import merge
from metamerge.alignment import weight_matching
from metamerge.checkpoints import read_checkpoints
from metamerge.errors import ConfigError
from metamerge.mergers import fuse, load_merger, read_card
from metamerge.mergers.watching import told_apart
from metamerge.weights import stack
from trainers.finishing import ENOUGH, LONG, REFINING, WORTH, Way, promising
from trainers.merger import MergerOptions, fingerprint, main, make_merger
from trainers.resume import load_state
from zoo.build import ZooOptions, build, split_of
from zoo.options import parse
from zoo.training import predict

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "trainers" / "merger.py")
STEPS, SAVE_EVERY = 120, 5
SMALL = (
    # of 32 probes the fit of so small a merger is left to chance: a broken gate, other ranks
    *("--probes", "64", "--width", "8", "--families", "6", "--images", "128"),
    *("--steps", str(STEPS), "--eval-every", "20", "--save-every", str(SAVE_EVERY)),
    *("--garbage", "1"),  # so few steps have to see noise in each to learn to leave it out
    *("--average", "0.8"),  # of so few steps: 0.95 would still remember the first ones
)

SMALL_ZOO = ZooOptions(
    widths=(16,),
    segment_size=150,
    members=(2, 3),
    train_families=12,
    validation_families=8,
    test_families=2,
    epochs=15.0,
)

pytestmark = [pytest.mark.xdist_group("merger_script"), pytest.mark.usefixtures("one_thread")]


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [SCRIPT, *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code


def mark_of(zoo):
    """Fingerprint of the trainings of this module."""
    options = parse(MergerOptions, [*SMALL], prog="merger")
    return fingerprint(options, [zoo.digest])


def weights_of(folder):
    return read_checkpoints(folder)[0].weights


def assert_bit_equal(one, other):
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def zoo(place):
    return build(replace(SMALL_ZOO, out=str(place / "zoo")))


@pytest.fixture(scope="module")
def train(place, zoo):
    """The script in this process, on the small zoo: what it printed."""

    def train(out):
        printed = StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
            patch.chdir(place)
            patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place}/mlflow.db")
            patch.setenv("COLUMNS", "200")
            patch.setattr(sys, "argv", [SCRIPT, "--zoo", str(zoo.folder), "--out", out, *SMALL])
            main()
        return printed.getvalue()

    return train


@pytest.fixture(scope="module")
def trained(place, train):
    """One training that nothing interrupts."""
    out = train("whole")
    return SimpleNamespace(folder=place / "whole", out=out, card=read_card(place / "whole"))


@pytest.fixture(scope="module")
def killed(place, zoo, killed_when):
    """What a training leaves that is killed half-way; its newest state is damaged as well."""
    latest = place / "killed.state" / "LATEST"

    def holds():
        return latest.exists() and int(latest.read_text()[-8:]) >= 3 * SAVE_EVERY

    killed_when(holds, place, "--zoo", str(zoo.folder), "--out", "killed", *SMALL)
    assert not (place / "killed").exists()
    reached = int(latest.read_text()[-8:])
    assert 3 * SAVE_EVERY <= reached < STEPS
    tensors, record = load_state(place / "killed.state", mark_of(zoo))
    assert record["step"] == reached
    assert {"merger.strength", "averaged.module.strength", "best.strength"} < tensors.keys()
    newest = place / "killed.state" / f"step-{reached:08d}"
    (newest / "manifest.json").write_text("")
    return SimpleNamespace(reached=reached)


def runs(place, name):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{place}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "metamerge"]
    found = client.search_runs([experiment.experiment_id])
    return client, [run for run in found if run.info.run_name == name]


# ------------------------------------------------------------------------------- one training


def test_a_training_writes_a_merger_and_says_so(trained, zoo):
    told = " ".join(trained.out.split())
    accuracy = trained.card["validation"]["validation_accuracy"]
    assert f"whole: validation accuracy {accuracy:.3f}" in told
    assert "gates all" in told
    merged = merge(zoo.address("test", 3, 0), merger=trained.folder)
    assert merged.report["method"] == "gnn"
    config = load_merger(trained.folder).config
    assert config.shapes == ((1, 8, 8),)
    assert config.probes == 64


def test_a_trained_merger_beats_the_average_that_it_started_as(trained, zoo):
    inputs, targets = split_of(zoo).images("validation")
    averages = stack(
        [merge(zoo.address("validation", 3, f), method="average").weights for f in range(8)]
    )
    start = float(accuracy(predict(zoo.layout.program, averages, inputs), targets).mean())
    assert trained.card["validation"]["validation_accuracy_k3"] > start + 0.05


def test_the_card_says_where_a_merger_comes_from(trained, zoo):
    card = trained.card
    assert card["options"]["probes"] == 64
    assert card["options"]["steps"] == STEPS
    (told,) = card["zoos"]
    assert told["digest"] == zoo.digest
    assert told["options"] == zoo.options
    assert told["task"]["name"] == "digits"
    assert 0 < card["step"] <= STEPS
    assert card["seconds"] > 0
    assert [entry["step"] for entry in card["history"]][-1] == STEPS
    assert all(entry.keys() >= {"loss", *card["validation"]} for entry in card["history"])
    best = next(e for e in card["history"] if e["step"] == card["step"])
    assert best.items() >= card["validation"].items()
    sizes = {f"validation_accuracy_k{members}" for members in (2, 3)}
    assert card["validation"].keys() > sizes
    assert json.loads(json.dumps(card)) == card


def test_the_steps_of_refining_are_those_that_validation_families_chose(trained):
    told = trained.card["refining"]
    refining = {Way(row["steps"], row["mixtures"], row["start"]): row["accuracy"] for row in told}
    tried = LONG in refining
    assert tuple(refining) == (*REFINING, *[LONG] * tried)
    # By means alone, which leave no room for errors; with these there is more to try.
    assert tried or not promising({w: torch.tensor([score]) for w, score in refining.items()})
    assert not tried or refining[Way(400, 0)] > refining[Way(0, 0)]
    # Without refining it is the merger that the loop judged.
    found = trained.card["validation"]["validation_accuracy"]
    assert refining[Way(0, 0)] == pytest.approx(found, abs=1e-6)
    config = load_merger(trained.folder).config
    choice = Way(config.refine, config.mixtures, config.start)
    alike = {way: refining[way] for way in REFINING if way[1:] == choice[1:]}
    few = min(way for way, score in alike.items() if score >= max(alike.values()) - ENOUGH)
    assert choice == few or (choice == LONG and refining[LONG] > refining[few] + WORTH)
    assert f"{refining[choice]:.3f} after {choice}, " in " ".join(trained.out.split())


def test_what_is_familiar_is_less_than_any_validation_family_tells_apart(trained, zoo):
    merger = load_merger(trained.folder)
    least = []
    for members in (2, 3):
        families = zoo.families("validation", members)
        asked = {key: tensor.flatten(0, 1) for key, tensor in families.items()}
        answers = predict(zoo.layout.program, asked, merger.probes((1, 8, 8)).detach())
        least.append(told_apart(answers.unflatten(0, (-1, members))).min())
    assert merger.config.familiar == pytest.approx(max(0, 0.85 * float(min(least))), abs=1e-4)
    assert trained.card["familiar"] == merger.config.familiar


def test_whether_inputs_are_of_use_is_what_validation_families_say(trained, zoo):
    merger, found = load_merger(trained.folder), []
    told = {
        Way(row["steps"], row["mixtures"], row["start"]): row["accuracy"]
        for row in trained.card["refining"]
    }
    split = split_of(zoo)
    images, classes = split.images("validation")
    shown = torch.cat([split.images("objective")[0], merger.probes((1, 8, 8)).detach()])
    for members in (2, 3):
        families = zoo.families("validation", members)
        aligned = zoo.layout.spec.permute(families, weight_matching(families, zoo.layout.spec))
        fused = fuse(merger, aligned, zoo.layout, shown)
        named = predict(zoo.layout.program, fused, images).argmax(-1)
        found += (named == classes).float().mean(1).tolist()
    accuracy = sum(found) / len(found)
    assert trained.card["inputs"]["accuracy"] == pytest.approx(accuracy, abs=1e-3)
    config = merger.config
    useful = accuracy > told[Way(config.refine, config.mixtures, config.start)] - 0.005
    assert merger.config.inputs == trained.card["inputs"]["useful"] == useful


def test_every_gate_was_measured_and_passed(trained):
    assert trained.card["gates"].keys() == {"k2", "k3"}
    for gates in trained.card["gates"].values():
        assert len(gates) >= 6
        assert [gate["name"] for gate in gates if not gate["passed"]] == []
        assert all(gate["value"] <= gate["limit"] for gate in gates)


def test_the_run_in_mlflow_holds_options_and_curves(trained, place):
    client, (run,) = runs(place, "train whole")
    assert run.info.status == "FINISHED"
    assert run.info.run_id == trained.card["run"]
    assert run.data.params["probes"] == "64"
    assert run.data.params["processes"] == "1"
    curve = client.get_metric_history(run.info.run_id, "validation_accuracy")
    assert [point.step for point in curve] == [*range(20, STEPS + 1, 20)]
    best = max(point.value for point in curve)
    assert best == pytest.approx(trained.card["validation"]["validation_accuracy"])
    assert {key for key in run.data.metrics if key.startswith("gates/k2/")}


def test_the_run_names_its_zoo_and_has_the_merger_and_its_card(trained, place, zoo, monkeypatch):
    client, (run,) = runs(place, "train whole")
    read = {one.dataset.name: one.dataset.digest for one in run.inputs.dataset_inputs}
    assert read == {"digits": zoo.manifest["task"]["digest"][:36], "zoo zoo": zoo.digest[:36]}
    assert "card.json" in {found.path for found in client.list_artifacts(run.info.run_id)}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place}/mlflow.db")
    back = load_merger(f"runs:/{run.info.run_id}/m").state_dict()
    assert all(torch.equal(back[k], t) for k, t in load_merger(trained.folder).state_dict().items())


def test_other_options_are_not_resumed_and_nothing_is_touched(
    trained, zoo, place, monkeypatch, capsys
):
    before = weights_of(trained.folder)
    monkeypatch.chdir(place)
    arguments = ("--zoo", str(zoo.folder), "--out", "whole", *SMALL, "--lr", "0.1")
    assert command(monkeypatch, *arguments, "--no-tracking") != 0
    told = " ".join(capsys.readouterr().err.split())
    assert f"whole.state/step-{STEPS:08d} was written with other options or another zoo" in told
    assert "Choose another --out, or delete whole.state to start again." in told
    assert_bit_equal(weights_of(trained.folder), before)


# ------------------------------------------------------------------------------- kills


def test_a_killed_training_costs_a_few_steps_and_no_bit(trained, killed, train, place):
    out = train("killed")
    # The newest state is damaged: the one before it has to do.
    assert f"resumed at step {killed.reached - SAVE_EVERY} of {STEPS}" in out
    assert_bit_equal(weights_of(place / "killed"), weights_of(trained.folder))
    card = read_card(place / "killed")
    assert card["validation"] == trained.card["validation"]
    assert card["refining"] == trained.card["refining"]
    assert card["step"] == trained.card["step"]
    assert card["gates"] == trained.card["gates"]


def test_a_resumed_training_goes_on_in_its_run(killed, place):
    client, (run,) = runs(place, "train killed")  # one run, not two
    assert run.info.status == "FINISHED"
    curve = client.get_metric_history(run.info.run_id, "loss")
    assert [point.step for point in curve] == [*range(20, STEPS + 1, 20)]


# ------------------------------------------------------------------------------- processes


def test_two_processes_reach_what_one_reaches(trained, zoo, place, launch, two_processes):
    done = launch(
        place,
        *("--zoo", str(zoo.folder), "--out", "two", *SMALL, "--no-tracking"),
        **two_processes,
    )
    assert done.code == 0, done.err
    assert done.out.count("gates all") == 1  # one of the two speaks
    card = read_card(place / "two")
    for key in ("validation_accuracy", "validation_accuracy_k2", "validation_accuracy_k3"):
        assert card["validation"][key] == pytest.approx(trained.card["validation"][key], abs=0.02)


# ------------------------------------------------------------------------------- several zoos


def test_one_merger_learns_from_several_zoos(zoo, place, monkeypatch, capsys):
    other = build(replace(SMALL_ZOO, out=str(place / "wide"), widths=(24,), relabel=True, seed=1))
    arguments = ("--zoo", str(zoo.folder), str(other.folder), "--out", str(place / "both"))
    together = ("--groups", "2", "--precision", "bfloat16", "--probe-rate", "0", "--spare", "9")
    settings = (*SMALL, "--steps", "20", "--no-labels", "--no-tracking", *together)
    monkeypatch.setattr(sys, "argv", [SCRIPT, *arguments, *settings])
    code = 0
    try:
        main()
    except SystemExit as stopped:  # twenty steps may not be enough for all gates
        code = stopped.code
    card = read_card(place / "both")
    bank = load_merger(place / "both").probes
    known = torch.cat([split_of(one).images("objective")[0] for one in (zoo, other)]).flatten(1)
    for probes, count in ((bank((1, 8, 8)), 64), (bank.spare((1, 8, 8)), 9)):
        assert len(probes) == count
        nearest = torch.cdist(probes.detach().flatten(1), known).amin(1)
        assert nearest.max() < 1e-3  # as they started
    assert [told["digest"] for told in card["zoos"]] == [zoo.digest, other.digest]
    assert [told["options"]["widths"] for told in card["zoos"]] == [[16], [24]]
    groups = {f"{name}_k{members}" for name in ("zoo", "wide") for members in (2, 3)}
    scores = {key for key in card["validation"] if key.startswith("validation_accuracy_")}
    assert scores == {f"validation_accuracy_{group}" for group in groups}
    assert card["gates"].keys() == groups
    broken = [
        f"{group} {gate['name']}"
        for group, gates in card["gates"].items()
        for gate in gates
        if not gate["passed"]
    ]
    told = " ".join(capsys.readouterr().err.split())
    assert code == bool(broken)
    assert all(gate in told for gate in broken)
    mean = sum(card["validation"][score] for score in scores) / 4  # of 8 families each
    assert card["validation"]["validation_accuracy"] == pytest.approx(mean, abs=1e-6)


def test_no_image_starts_two_probes_while_there_are_others(make_families):
    groups = [make_families(2, "k2"), make_families(4, "k4")]  # of the same images
    known = groups[0].images[0]
    merger = make_merger(MergerOptions(probes=len(known) - 7, spare=7), groups)
    bank = torch.cat([merger.probes((1, 8, 8)), merger.probes.spare((1, 8, 8))]).detach()
    assert torch.equal(bank.flatten(1).unique(dim=0), known.flatten(1).unique(dim=0))
    doubled = replace(groups[1], images=(1 - known, groups[1].images[1]))
    merger = make_merger(MergerOptions(probes=16, spare=len(known)), [*groups, doubled])
    assert len(merger.probes.spare((1, 8, 8))) == len(known)  # other images count


def test_spare_probes_that_there_are_no_images_for_are_refused(make_families):
    groups = [make_families(2, "k2"), make_families(4, "k4")]
    there = len(groups[0].images[0])
    told = rf"spare: 32 probes and {there} spare ones .* {there} objective images .* up to"
    with pytest.raises(ConfigError, match=rf"{told} {there - 32}\."):
        make_merger(MergerOptions(probes=32, spare=there), groups)


# ------------------------------------------------------------------------------- command line


def test_a_launch_without_a_config_file_works(place, launch):
    done = launch(place, "--help", launcher=())
    assert done.code == 0, done.err
    told = " ".join(done.out.split())
    assert "usage: accelerate launch trainers/merger.py" in told
    assert "learned probe inputs of each shape that members are watched on (default: 256)" in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--step", "3"], "unknown option '--step'. Did you mean --steps?"),
        (["--steps", "0"], "steps: expected more than 0, got 0"),
        (["--prior", "4"], "prior: expected 0 or an odd number, got 4"),
        (["--save-every", "0"], "save_every: expected at least 1"),
        (["--reference", "median"], "reference: got 'median'"),
        (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (["--probe-rate", "-1"], "probe_rate: expected 0 or more, got -1.0"),
        (["--spare", "-1"], "spare: expected 0 or more, got -1"),
        (["--garbage", "1.5"], "garbage: expected 0 to 1, got 1.5"),
        (["--drop", "-0.1"], "drop: expected 0 to 1, got -0.1"),
        (["--average", "2"], "average: expected 0 to 1, got 2"),
        (["--kind", "mean"], "kind: expected one of ('gnn', 'autoencoder'), got 'mean'"),
        (["--groups", "0"], "groups: expected more than 0, got 0"),
        (["--precision", "half"], "precision: expected one of ('float32', 'bfloat16'), got 'half'"),
        (["--pretrain", "5"], "pretrain: only --kind autoencoder reconstructs its members"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_make_no_sense_end_with_code_2(monkeypatch, capsys, arguments, told):
    assert command(monkeypatch, *arguments) == 2
    assert told in capsys.readouterr().err


def test_bad_options_are_refused_from_python_too():
    with pytest.raises(ConfigError, match="steps"):
        MergerOptions(steps=0)


def test_where_a_run_lies_and_how_often_it_saves_does_not_shape_the_result():
    mark = fingerprint(MergerOptions(), ["1234"])
    moved = MergerOptions(zoo=("a",), out="b", tracking=False, experiment="c", save_every=7)
    assert fingerprint(moved, ["1234"]) == mark
    assert fingerprint(MergerOptions(seed=1), ["1234"]) != mark
    assert fingerprint(MergerOptions(garbage=0.3), ["1234"]) != mark
    assert fingerprint(MergerOptions(), ["1234", "5678"]) != mark
    assert fingerprint(MergerOptions(), ["5678"]) != mark
