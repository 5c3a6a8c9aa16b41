import ast
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]

# What each room must not import: metamerge <- zoo <- evaluation <- trainers, never back.
FORBIDDEN = {
    "metamerge": {"zoo", "evaluation", "trainers"},
    "zoo": {"evaluation", "trainers"},
    "evaluation": {"trainers"},
    "trainers": set(),
}
# One file writes runs. The other, of the library, reads checkpoints that lie in MLflow and imports
# it only when it is given such an address.
MLFLOW_FILES = ("evaluation/tracking/store.py", "metamerge/checkpoints/mlflow_models.py")
NOT_WITH_METAMERGE = {"sklearn", "matplotlib", "mlflow", "accelerate"}


def imported_names(file: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of every import in a file, wherever in the file it stands."""
    package = file.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), filename=str(file))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # Level 1 is the package of the file, every further level one folder up.
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = (*above, *([node.module] if node.module else []))
            # `from .. import zoo` names a room only by its alias, so the alias counts as well.
            yield from ((node.lineno, ".".join((*base, alias.name))) for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).split(".")[-1] in {"import_module", "__import__"}
            and node.args
            and isinstance(node.args[0], ast.Constant)
            and isinstance(node.args[0].value, str)
        ):
            yield node.lineno, node.args[0].value


def violations(root: Path) -> list[str]:
    """Everything below ``root`` that breaks the directions between rooms, one line each."""
    found = []
    for room, forbidden in FORBIDDEN.items():
        for file in sorted((root / room).rglob("*.py")):
            path = file.relative_to(root).as_posix()
            for line, name in imported_names(file, root):
                top = name.split(".")[0]
                if top in forbidden:
                    found.append(f"{path}:{line}: {room} must not import {name}")
                if top.startswith("mlflow") and path not in MLFLOW_FILES:
                    found.append(f"{path}:{line}: only {MLFLOW_FILES} may import {name}")

    # Launching a script puts trainers/ first on the path, so its files hide what bears their name.
    taken = {*FORBIDDEN, "tests", *sys.stdlib_module_names}
    taken |= set(importlib.metadata.packages_distributions())
    stems = {p.stem for p in (root / "trainers").glob("*.py")} - {"__init__", "__main__"}
    stems |= {p.name for p in (root / "trainers").glob("*/") if any(p.glob("*.py"))}
    found += [f"trainers/{stem}: hides the module {stem}" for stem in sorted(stems & taken)]

    # A package tests/zoo/ would be imported under the name zoo.
    for file in sorted((root / "tests").rglob("__init__.py")):
        found.append(f"{file.relative_to(root).as_posix()}: no packages below tests/")
    return found


def write(root: Path, files: dict[str, str]) -> None:
    for path, code in files.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(code, encoding="utf-8")


def test_all_four_rooms_are_there():
    assert [room for room in FORBIDDEN if not any((CHECKOUT / room).rglob("*.py"))] == []


def test_imports_go_one_way():
    assert violations(CHECKOUT) == []


def test_a_tidy_tree_has_no_violations(tmp_path):
    write(
        tmp_path,
        {
            "metamerge/api.py": "from . import weights\nfrom .methods import ties\nimport torch\n",
            "metamerge/methods/ties.py": "from ..weights import flatten\nfrom .. import zoo\n",
            "zoo/store.py": "import metamerge\nfrom metamerge import zoology\n",
            "evaluation/tracking/store.py": "import mlflow\nfrom zoo import store\n",
            "metamerge/checkpoints/mlflow_models.py": "def f():\n    import mlflow\n",
            "trainers/merger.py": "from evaluation.tracking import track\nimport zoo\n",
            "tests/zoo/test_store.py": "import mlflow\n",
        },
    )
    assert violations(tmp_path) == []


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("metamerge/api.py", "import zoo.store"),
        ("metamerge/methods/ties.py", "from evaluation import metrics"),
        ("metamerge/api.py", "def f():\n    from trainers.merger import main"),
        ("metamerge/api.py", "if TYPE_CHECKING:\n    import zoo"),
        ("metamerge/api.py", "from .. import zoo"),
        ("metamerge/methods/ties.py", "from ...zoo import store"),
        ("metamerge/api.py", "import importlib\nimportlib.import_module('zoo.store')"),
        ("metamerge/checkpoints/mlflow.py", "import mlflow.artifacts"),
        ("zoo/store.py", "from evaluation.metrics import accuracy"),
        ("zoo/store.py", "import trainers"),
        ("evaluation/compare.py", "import trainers.merger as m"),
        ("evaluation/compare.py", "from mlflow import log_metric"),
        ("evaluation/tracking/run.py", "from mlflow.entities import Metric"),
        ("trainers/merger.py", "import mlflow"),
        ("trainers/evaluation.py", ""),
        ("trainers/statistics.py", ""),
        ("trainers/accelerate.py", ""),
        ("trainers/zoo/task.py", ""),
        ("tests/zoo/__init__.py", ""),
    ],
)
def test_a_planted_violation_is_found(tmp_path, path, code):
    write(tmp_path, {path: code})
    assert len(violations(tmp_path)) == 1


def test_importing_metamerge_stays_light():
    code = (
        "import json, sys, metamerge; "
        "print(json.dumps([metamerge.__file__, sorted({n.split('.')[0] for n in sys.modules})]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    file, modules = json.loads(done.stdout.splitlines()[-1])
    assert file == str(CHECKOUT / "metamerge" / "__init__.py")
    assert NOT_WITH_METAMERGE.isdisjoint(modules)
