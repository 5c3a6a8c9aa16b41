import numpy as np
import pytest

from metamerge.errors import ConfigError, ZooError
from zoo.tasks import TASKS, load_task, suggest


def test_an_unknown_task_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"'fashion_mnist', did you mean 'fashion-mnist'\?"):
        load_task("fashion_mnist")
    with pytest.raises(ConfigError, match=", ".join(TASKS)):
        load_task("imagenet")


def test_an_unknown_task_is_told_which_files_are_read():
    with pytest.raises(ConfigError, match=r"must end in \.csv, \.csv\.gz, \.npz, \.parquet"):
        load_task("table.xlsx")


@pytest.mark.parametrize("name", ["digits", "wine", "mnist-1d"])
def test_a_folder_for_what_needs_no_files_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="reads no folder"):
        load_task(name, tmp_path)


@pytest.mark.parametrize("options", [{"target": "y"}, {"kind": "regression"}, {"drop": ["a"]}])
def test_options_of_own_files_are_refused_for_known_tasks(options):
    with pytest.raises(ConfigError, match="has a target of its own"):
        load_task("wine", **options)


def test_a_folder_beside_a_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"is a file, got folder='x'"):
        load_task(tmp_path / "a.csv", "x", target="y")


def test_a_target_beside_an_npz_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="names its target itself"):
        load_task(tmp_path / "a.npz", target="y")


@pytest.mark.parametrize("ending", ["csv", "npz"])
def test_a_single_name_to_drop_is_refused_with_the_list_to_write(tmp_path, ending):
    with pytest.raises(ConfigError, match=r"got 'id'\. Write drop=\['id'\]"):
        load_task(tmp_path / f"a.{ending}", drop="id")


def test_an_unknown_kind_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match=r"no kind 'classify', did you mean 'classification'\?"):
        load_task(tmp_path / "a.npz", kind="classify")


def test_a_file_of_another_format_is_refused(tmp_path):
    path = tmp_path / "table.xlsx"
    path.write_bytes(b"PK")
    with pytest.raises(ConfigError, match=r"is none of \.csv"):
        load_task(path)


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "npz", "parquet"])
def test_a_file_that_is_not_there_is_refused(tmp_path, ending):
    options = {} if ending == "npz" else {"target": "y"}
    with pytest.raises(ZooError, match=rf"nothing\.{ending} cannot be read"):
        load_task(tmp_path / f"nothing.{ending}", **options)


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "npz", "parquet"])
def test_an_empty_file_is_refused(tmp_path, ending):
    path = tmp_path / f"empty.{ending}"
    path.touch()
    with pytest.raises(ZooError, match="is empty"):
        load_task(path, **({} if ending == "npz" else {"target": "y"}))


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "npz", "parquet"])
def test_a_file_above_two_gigabytes_is_refused_unread(tmp_path, ending):
    path = tmp_path / f"huge.{ending}"
    with open(path, "wb") as file:
        file.truncate(2**31 + 1)  # a hole: takes no space on disk
    with pytest.raises(ZooError, match=r"takes 2\.0 GiB, expected at most 2 GiB.*Draw a part"):
        load_task(path, **({} if ending == "npz" else {"target": "y"}))


def test_a_file_does_not_hide_the_task_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wine").write_text("a,b\n1,2\n")
    assert load_task("wine").inputs.shape == (178, 13)


def test_endings_are_read_in_either_case(tmp_path):
    path = tmp_path / "TABLE.NPZ"
    rng = np.random.default_rng(0)
    with open(path, "wb") as file:
        np.savez(file, x=rng.normal(size=(60, 2)), y=np.arange(60) % 2)
    assert load_task(path).outputs == 2


def test_suggestions_find_names_in_another_case_and_stay_short():
    assert suggest("AGE", ["Age", "Sex"]) == ", did you mean 'Age'? There are: Age, Sex."
    assert suggest("z", [f"f{i}" for i in range(100)]).endswith("f38, f39 and 60 more.")
