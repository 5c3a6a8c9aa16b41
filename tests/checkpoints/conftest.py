"""How files of torch.save are made, damaged and refused."""

import zipfile

import pytest
import torch

from metamerge.checkpoints import read_checkpoints


@pytest.fixture(scope="session")
def saved():
    """Save to a path, which it returns; as a zip archive or in the format before it."""

    def save(obj, path, as_zip=True):
        torch.save(obj, path, _use_new_zipfile_serialization=as_zip)
        return path

    return save


@pytest.fixture(scope="session")
def refuse():
    """Reading a path is refused with this error, which names the file and no way around."""

    def check(error, match, path, **options):
        with pytest.raises(error, match=match) as caught:
            read_checkpoints(path, **options)
        assert path.name in str(caught.value)
        assert "weights_only" not in str(caught.value)

    return check


@pytest.fixture(scope="session")
def rewritten():
    """Copy a zip archive record by record, changed."""

    def rewrite(path, change):
        with zipfile.ZipFile(path) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in change(records).items():
                archive.writestr(name, content)
        return path

    return rewrite
