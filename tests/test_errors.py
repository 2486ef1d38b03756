import math

import pytest

from flax_resnet.errors import POSITIVE, TryAgain, UserError, check_range, did_you_mean


def test_a_message_is_one_line():
    assert str(UserError("first\n   second\tthird")) == "first second third"
    assert isinstance(UserError("x"), ValueError)


def test_what_another_try_may_mend_has_another_status():
    assert isinstance(TryAgain("x"), UserError)
    assert (UserError.status, TryAgain.status) == (2, 1)


def test_ranges_name_the_value_and_what_was_expected():
    for value in (None, 0, 0.5):
        check_range("share", value, 0, 1)
    for value in (-1, 1, math.nan, math.inf):
        with pytest.raises(UserError, match=f"share={value}: expected 0 or more, below 1"):
            check_range("share", value, 0, 1)
    with pytest.raises(UserError, match=r"rate=0\.0: expected more than 0$"):
        check_range("rate", 0.0, POSITIVE)


def test_the_nearest_name_is_offered_and_a_far_one_is_not():
    assert did_you_mean("learning_rat", ["momentum", "learning_rate"]) == (
        " (did you mean 'learning_rate'?)"
    )
    assert did_you_mean("xyz", ["momentum", "learning_rate"]) == ""
