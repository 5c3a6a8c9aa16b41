"""Training states: the newest whole one is found again, whatever a kill has left behind."""

import shutil

import pytest
import torch
from torch import nn

from metamerge.checkpoints import read_checkpoints, save_checkpoint
from metamerge.errors import ResumeError
from trainers.resume import load_state, optimizer_tensors, restore_optimizer, save_state

MARK = "0123"


def save(folder, step, mark=MARK):
    save_state(folder, step, {"w": torch.full((3,), float(step))}, {"fingerprint": mark, "note": 1})


@pytest.fixture
def states(tmp_path):
    """The folder of a training that saved after 2, 4 and 6 steps."""
    folder = tmp_path / "runs" / "merger.state"
    for step in (2, 4, 6):
        save(folder, step)
    return folder


def step_of(folder, mark=MARK):
    tensors, record = load_state(folder, mark)
    assert torch.equal(tensors["w"], torch.full((3,), float(record["step"])))
    return record["step"]


def steps(folder):
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def test_without_a_state_there_is_nothing_to_resume(tmp_path):
    assert load_state(tmp_path / "merger.state", MARK) is None


def test_the_newest_state_is_read_with_its_record(states):
    tensors, record = load_state(states, MARK)
    assert tensors["w"].tolist() == [6.0, 6.0, 6.0]
    assert record == {"step": 6, "fingerprint": MARK, "note": 1}


def test_two_states_are_kept(states):
    assert steps(states) == [4, 6]
    assert sorted(path.name for path in states.iterdir()) == [
        "LATEST",
        "step-00000004",
        "step-00000006",
    ]


def test_the_pointer_decides_which_state_is_the_newest(states):
    (states / "LATEST").write_text("step-00000004")  # killed between state and pointer
    assert step_of(states) == 4


def truncated(state):
    path = state / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def flipped(state):
    path = state / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


def emptied(state):
    (state / "manifest.json").write_text("")


def stripped(state):
    (state / "manifest.json").unlink()


def anonymous(state):
    weights = read_checkpoints(state)[0].weights
    save_checkpoint(weights, state, metadata={"step": 6}, overwrite=True)


DAMAGES = [truncated, flipped, emptied, stripped, anonymous, shutil.rmtree]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_state_falls_back_to_the_one_before(states, damage):
    damage(states / "step-00000006")
    assert step_of(states) == 4


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_replaced_when_its_step_comes_again(states, damage):
    damage(states / "step-00000006")
    save(states, 6)
    assert step_of(states) == 6
    assert steps(states) == [4, 6]


@pytest.mark.parametrize("damage", DAMAGES[:-1])
def test_damage_to_every_state_is_told_with_a_way_out(states, damage):
    for path in states.glob("step-*"):
        damage(path)
    with pytest.raises(ResumeError) as caught:
        load_state(states, MARK)
    told = str(caught.value)
    assert told.startswith(f"{states}: no state is whole: ")
    assert f"{states / 'step-00000006'}" in told
    assert f"{states / 'step-00000004'}" in told
    assert told.endswith("Delete the folder to start again.")


def test_a_state_of_other_options_is_refused_and_only_its_folder_is_to_be_deleted(states):
    with pytest.raises(ResumeError) as caught:
        load_state(states, "4567")
    told = str(caught.value)
    assert "step-00000006 was written with other options or another zoo" in told
    assert "another --out" in told
    assert f"delete {states} to start again" in told
    assert step_of(states) == 6


def test_what_a_kill_cut_off_is_cleared_away(states):
    left = states / ".step-00000008.0a1b2c.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    save(states, 8)
    assert not left.exists()
    assert step_of(states) == 8


def test_a_restored_optimizer_goes_on_as_if_nothing_had_happened():
    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        groups = [{"params": model[1].parameters()}, {"params": model[0].parameters(), "lr": 0.1}]
        return model, torch.optim.AdamW(groups, lr=0.01)

    def train(model, optimizer, first, last):
        for step in range(first, last):
            inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()

    whole, optimizer = make()
    train(whole, optimizer, 0, 3)
    saved = {key: t.clone() for key, t in whole.state_dict().items()}
    tensors = {key: t.clone() for key, t in optimizer_tensors(optimizer, whole).items()}
    train(whole, optimizer, 3, 7)

    resumed, fresh = make()
    resumed.load_state_dict(saved)
    restore_optimizer(fresh, resumed, tensors)
    train(resumed, fresh, 3, 7)
    for key, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], tensor), key


def test_parameters_whose_names_end_alike_keep_their_own_state():
    model = nn.ModuleDict({"a": nn.Linear(2, 1), "b": nn.ModuleDict({"a": nn.Linear(2, 1)})})
    optimizer = torch.optim.AdamW(model.parameters())
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, float(number + 1))
    optimizer.step()
    fresh = torch.optim.AdamW(model.parameters())
    restore_optimizer(fresh, model, optimizer_tensors(optimizer, model))
    for parameter in model.parameters():
        for what, tensor in optimizer.state[parameter].items():
            assert torch.equal(fresh.state[parameter][what], tensor)
