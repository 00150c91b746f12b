"""Numbers of JSON files: what is a number, its limits, and messages that name value and rule."""

import math

import pytest

from pretrain.json_values import check_number


@pytest.mark.parametrize("value", [0, 1, 0.5, 1e300])
def test_finite_numbers_pass(value):
    check_number(value, "x")


@pytest.mark.parametrize(
    ("value", "limits", "message"),
    [
        (True, {}, "x=True must be a number of at least 0"),
        ("1", {}, "x='1' must be a number"),
        (None, {}, "x=None must be a number"),
        (math.nan, {}, "x=nan must be a number"),
        (math.inf, {}, "x=inf must be a number"),
        (-1, {}, "x=-1 must be a number of at least 0"),
        (1, {"high": 1, "exclude": 1}, "x=1 must be a number from 0 to 1, but not 1"),
        (2.0, {"low": 1, "whole": True}, "x=2.0 must be a whole number of at least 1"),
    ],
)
def test_a_value_out_of_its_limits_is_named_with_the_rule(value, limits, message):
    with pytest.raises(ValueError, match=message):
        check_number(value, "x", **limits)
