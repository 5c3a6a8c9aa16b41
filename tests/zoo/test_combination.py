import pytest
import torch

from metamerge.errors import ConfigError
from metamerge.gradients import orthogonalise
from zoo.combination import RULES, Rule, combine, rule_named


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SHARES = torch.tensor([[0.5, 0.25, 0.25]]).expand(4, 3)
DRAWS = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))


def test_the_mean_weighs_clusters_by_their_rows():
    gradients = torch.tensor([[[4.0, 0.0], [0.0, 8.0]]])
    found = combine(gradients, torch.tensor([[0.75, 0.25]]), RULES["plain"], DRAWS[:1, :2])
    assert found.tolist() == [[3.0, 2.0]]


def test_a_stretched_step_has_the_direction_of_the_mean_and_the_other_length():
    gradients = drawn(4, 3, 9)
    mean = combine(gradients, SHARES, RULES["plain"], DRAWS)
    summed = combine(gradients, SHARES, RULES["increasing"], DRAWS)
    found = combine(gradients, SHARES, RULES["stretched"], DRAWS)
    torch.testing.assert_close(found.norm(dim=1), summed.norm(dim=1))
    torch.testing.assert_close(torch.cosine_similarity(found, mean), torch.ones(4))


@pytest.mark.parametrize("name", ["plain", "increasing", "stretched", "dropped"])
def test_clusters_that_are_not_admitted_have_no_say(name):
    gradients = drawn(4, 3, 9)
    admitted = torch.tensor([[True, True, False]]).expand(4, 3)
    changed = gradients.clone()
    changed[:, 2] = 100.0
    one, other = (combine(g, SHARES, RULES[name], DRAWS, admitted) for g in (gradients, changed))
    assert torch.equal(one, other)
    assert one.norm(dim=1).min() > 0


def test_gradients_are_dropped_by_their_draws():
    gradients = drawn(1, 3, 5)
    draws = torch.tensor([[0.9, 0.1, 0.5]])
    found = combine(gradients, SHARES[:1], Rule("given", dropped=0.25), draws)
    torch.testing.assert_close(found, orthogonalise(gradients[:, [0, 2]], order="given"))


def test_no_gradients_at_all_are_no_step():
    zeros = torch.zeros(2, 3, 4)
    for rule in RULES.values():
        assert torch.equal(combine(zeros, SHARES[:2], rule, DRAWS[:2]), torch.zeros(2, 4))


def test_an_unknown_rule_is_refused():
    with pytest.raises(ConfigError, match="upward"):
        rule_named("upward")
