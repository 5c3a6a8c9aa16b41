import pytest
import torch

from evaluation.metrics import family_logits
from metamerge.alignment import weight_matching
from trainers.families import Families
from zoo.variants import Variants


@pytest.fixture(scope="session")
def make_families(digits_zoo):
    """Make a group of families of the small digits zoo, with some or all of their members."""

    def make(members=4, name="k4", variants=None):
        layout, images = digits_zoo.layout, digits_zoo.objective
        raw = {key: tensor[:, :members] for key, tensor in digits_zoo.train.items()}
        aligned = layout.spec.permute(raw, weight_matching(raw, layout.spec))
        answers = family_logits(layout.program, aligned, images[0]).half()
        return Families(name, layout, images, aligned, answers, variants or Variants())

    return make


@pytest.fixture(scope="session")
def renamed_classes():
    """For 36 families, class of the task -> class of the family."""
    return torch.rand(36, 10, generator=torch.Generator().manual_seed(3)).argsort(-1)
