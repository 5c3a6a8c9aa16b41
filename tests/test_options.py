import math
import re

import numpy as np
import pytest

from metamerge.errors import ConfigError
from metamerge.options import check_choice, check_count, check_number


def refusal(check, *given, **named):
    with pytest.raises(ConfigError) as told:
        check("slerp", "t", *given, **named)
    return str(told.value)


@pytest.mark.parametrize("value", [0.5, 1, 1.0, np.float32(1), np.float64(0.1), 5e-324])
def test_numbers_of_an_interval_pass(value):
    check_number("slerp", "t", value, "(0, 1]")


@pytest.mark.parametrize("value", [0, -0.0, 1.5, math.nan, math.inf, True, None, "1", [1]])
def test_what_is_no_number_of_the_interval_is_refused(value):
    expected = f"slerp: t must be a number in (0, 1], got {value!r}."
    assert refusal(check_number, value, "(0, 1]") == expected


def test_infinity_passes_where_the_interval_says_so():
    check_number("slerp", "t", math.inf, "(0, inf]")
    for value, interval in ((math.inf, "(0, inf)"), (-math.inf, "(-inf, inf)")):
        assert f"must be a number in {interval}" in refusal(check_number, value, interval)
    refusal(check_number, math.nan, "[-inf, inf]")


@pytest.mark.parametrize("value", [1, 3])
def test_whole_numbers_of_a_range_pass(value):
    check_count("slerp", "t", value, 1, 3)
    check_count("slerp", "t", value, 1)


@pytest.mark.parametrize("value", [0, 4, -1, 2.0, True, None, "2", math.nan])
def test_what_is_no_whole_number_of_the_range_is_refused(value):
    message = refusal(check_count, value, 1, 3)
    assert message == f"slerp: t must be a whole number from 1 to 3, got {value!r}."


def test_a_count_without_an_end_says_where_it_begins():
    check_count("slerp", "t", 0)
    assert re.search("a whole number of at least 0, got -1", refusal(check_count, -1))


def test_what_limits_a_count_is_named():
    message = refusal(check_count, 4, 1, 3, limit="the number of members")
    assert "from 1 to the number of members, 3, got 4" in message


def test_none_passes_where_it_says_what_it_does():
    check_count("slerp", "t", None, 1, none="for all")
    check_number("slerp", "t", None, "(0, 1)", none="to have it chosen")
    assert "at least 1, or None for all, got 0" in refusal(check_count, 0, 1, none="for all")
    assert "in (0, 1), or None for all, got 1" in refusal(check_number, 1, "(0, 1)", none="for all")


def test_a_choice_is_one_of_those_told():
    check_choice("slerp", "t", "model", ("tensor", "model"))
    check_choice("slerp", "t", None, ("tensor", None))
    message = refusal(check_choice, "layer", ("tensor", None))
    assert message == "slerp: t must be one of 'tensor', None, got 'layer'."


@pytest.mark.parametrize("value", [0, 1, "True", None, [True]])
def test_only_true_and_false_are_true_and_false(value):
    assert "one of False, True" in refusal(check_choice, value, (False, True))
