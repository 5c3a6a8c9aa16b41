import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import metamerge.methods
from metamerge.registry import get_method, list_methods

CHECKOUT = Path(__file__).resolve().parents[2]


def test_every_public_file_holds_one_method_of_its_name():
    files = {module.name for module in pkgutil.iter_modules(metamerge.methods.__path__)}
    assert sorted(name for name in files if not name.startswith("_")) == list_methods()


@pytest.mark.parametrize("name", list_methods())
def test_file_function_and_register_bear_one_name(name):
    module = importlib.import_module(f"metamerge.methods.{name}")
    method = get_method(name)
    assert method.function is getattr(module, name)
    assert method.function is getattr(metamerge.methods, name)


@pytest.mark.parametrize("name", list_methods())
def test_the_file_tells_the_paper_that_is_registered(name):
    told = sys.modules[f"metamerge.methods.{name}"].__doc__
    paper = get_method(name).paper
    assert ("Paper: " in told) == (paper is not None)
    assert paper is None or paper in told


def test_methods_are_imported_without_heavy_packages():
    code = "import sys, metamerge.methods as m; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    loaded = {module.split(".")[0] for module in done.stdout.split()}
    assert "torch" in loaded
    assert loaded.isdisjoint({"sklearn", "torch_geometric"})
