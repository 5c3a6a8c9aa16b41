"""What users read names what there is."""

from pathlib import Path

import pytest

from metamerge.ensembles import list_ensembles
from metamerge.registry import list_alignments, list_corrections, list_methods

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name", [*list_methods(), *list_alignments(), *list_corrections(), *list_ensembles()]
)
def test_the_page_about_methods_has_everything_that_is_registered(name):
    assert f"`{name}`" in PAGE
