"""Files of torch.save: read in both formats, never run, never larger than they are."""

import zipfile

import pytest
import torch
from torch import nn

from metamerge.checkpoints import read_checkpoints
from metamerge.errors import IncompatibleWeights, TooLarge, Truncated, Unreadable

both_formats = pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])


def weights():
    return {"a.weight": torch.randn(4, 3), "steps": torch.tensor(5), "mask": torch.tensor([True])}


@both_formats
@pytest.mark.parametrize("suffix", [".pt", ".bin", ".dat", ""])
def test_a_state_dict_is_read_back_whatever_its_name(tmp_path, saved, as_zip, suffix):
    expected = weights()
    path = saved(expected, tmp_path / f"model{suffix}", as_zip)
    found = read_checkpoints(path)[0]
    assert list(found.weights) == list(expected)
    assert all(torch.equal(found.weights[k], expected[k]) for k in expected)
    assert not found.verified


@both_formats
@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict"])
def test_a_training_checkpoint_is_unwrapped(tmp_path, saved, as_zip, wrapper):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    content = {wrapper: model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    path = saved(content, tmp_path / "run.ckpt", as_zip)
    assert list(read_checkpoints(path)[0].weights) == list(model.state_dict())


def test_a_dict_of_parameters_is_read_as_plain_tensors(tmp_path, saved):
    path = saved(dict(nn.Linear(2, 2).named_parameters()), tmp_path / "a.pt")
    for tensor in read_checkpoints(path)[0].weights.values():
        assert type(tensor) is torch.Tensor
        assert not tensor.requires_grad


@both_formats
def test_tied_tensors_stay_tied(tmp_path, saved, as_zip):
    tied = torch.randn(3, 2)
    path = saved({"embed": tied, "head": tied}, tmp_path / "a.pt", as_zip)
    found = read_checkpoints(path)[0].weights
    assert found["embed"].data_ptr() == found["head"].data_ptr()


@both_formats
def test_a_transposed_view_is_made_contiguous(tmp_path, saved, as_zip):
    matrix = torch.arange(6.0).reshape(2, 3)
    found = read_checkpoints(saved({"w": matrix.t()}, tmp_path / "a.pt", as_zip))[0].weights
    assert found["w"].is_contiguous()
    assert torch.equal(found["w"], matrix.t())


@both_formats
def test_two_state_dicts_in_one_file_are_ambiguous(tmp_path, saved, refuse, as_zip):
    both = {"model": weights(), "state_dict": weights()}
    refuse(Unreadable, "several state dicts", saved(both, tmp_path / "a.pt", as_zip))


@pytest.mark.parametrize("content", [{}, {"epoch": 1}, [torch.zeros(1)], torch.zeros(1), 3])
def test_a_file_without_a_state_dict_is_unreadable(tmp_path, saved, refuse, content):
    refuse(Unreadable, "state dict", saved(content, tmp_path / "a.pt"))


@both_formats
@pytest.mark.parametrize("length", [2**20, 2**33])
def test_a_small_file_with_an_expanded_tensor_is_too_large(tmp_path, saved, refuse, as_zip, length):
    bomb = torch.zeros(1).expand(length)
    path = saved({"fine": torch.zeros(1), "bomb": bomb}, tmp_path / "a.pt", as_zip)
    assert path.stat().st_size < 4000
    refuse(TooLarge, f"'bomb'.*claims {length} elements.*holds 1", path)


def test_a_compressed_archive_is_too_large(tmp_path, refuse):
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))
    assert path.stat().st_size < 20_000
    refuse(TooLarge, "unpacks to 10000000", path)


def test_a_tensor_that_reaches_beyond_its_memory_is_unreadable(tmp_path, saved, refuse, rewritten):
    path = saved({"w": torch.zeros(3)[2:]}, tmp_path / "a.pt")

    def one_further(records):
        description = records["a/data.pkl"]
        assert description.count(b"QK\x02") == 1  # the offset, after the reference to the memory
        return records | {"a/data.pkl": description.replace(b"QK\x02", b"QK\x03")}

    refuse(Unreadable, r"'w' of shape \(1,\) reaches beyond", rewritten(path, one_further))


@both_formats
def test_more_bytes_than_the_limit_are_too_large(tmp_path, saved, refuse, as_zip):
    path = saved({"w": torch.zeros(1000)}, tmp_path / "a.pt", as_zip)
    refuse(TooLarge, "limit is 3999", path, max_bytes=3999)


def test_a_zip_of_something_else_is_unreadable(tmp_path, refuse):
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    refuse(Unreadable, "not one of torch.save", path)


def test_a_missing_record_is_unreadable(tmp_path, saved, refuse, rewritten):
    path = saved({"w": torch.zeros(3)}, tmp_path / "a.pt")
    rewritten(path, lambda records: {k: v for k, v in records.items() if not k.endswith("data/0")})
    refuse(Unreadable, "record '0' should hold 12 bytes, got nothing", path)


def test_a_record_shorter_than_described_is_unreadable(tmp_path, saved, refuse, rewritten):
    path = saved({"w": torch.zeros(3)}, tmp_path / "a.pt")
    rewritten(path, lambda r: {k: v[:8] if k.endswith("data/0") else v for k, v in r.items()})
    refuse(Unreadable, "should hold 12 bytes, got 8", path)


@both_formats
@pytest.mark.parametrize("share", [0.2, 0.5, 0.95])
def test_a_shortened_file_is_refused(tmp_path, saved, refuse, as_zip, share):
    path = saved({"w": torch.randn(500), "v": torch.randn(20)}, tmp_path / "a.pt", as_zip)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refuse(Unreadable if as_zip else Truncated, "damaged|ends", path)


def test_memory_that_a_legacy_file_claims_but_does_not_hold_is_not_allocated(
    tmp_path, saved, refuse
):
    path = saved({"w": torch.zeros(3)}, tmp_path / "a.pt", as_zip=False)
    content = path.read_bytes()
    claim = b"cpuq\x00K\x03".replace(b"q\x00", content[content.index(b"cpu") + 3 :][:2])
    assert content.count(claim) == 1
    path.write_bytes(content.replace(claim, claim[:-2] + b"J\xff\xff\xff\x7f"))
    refuse(Truncated, f"expected .* got {path.stat().st_size}", path)


ODD_TENSORS = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "meta": lambda: torch.zeros(2, device="meta"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@both_formats
@pytest.mark.parametrize("kind", ODD_TENSORS)
def test_tensors_that_cannot_be_merged_are_named(tmp_path, saved, refuse, as_zip, kind):
    content = {"fine": torch.zeros(1), "odd": ODD_TENSORS[kind]()}
    path = saved(content, tmp_path / "a.pt", as_zip)
    refuse(IncompatibleWeights, f"'odd' is .*{kind}.*Save it as a plain dense tensor", path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64])
def test_a_dtype_that_cannot_be_merged_is_named(tmp_path, saved, refuse, dtype):
    path = saved({"odd": torch.zeros(2).to(dtype)}, tmp_path / "a.pt")
    refuse(IncompatibleWeights, f"'odd' has dtype {dtype}", path)
