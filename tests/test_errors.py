from flax_resnet.errors import UserError, did_you_mean


def test_a_message_is_one_line():
    assert str(UserError("first\n   second\tthird")) == "first second third"
    assert isinstance(UserError("x"), ValueError)


def test_the_nearest_name_is_offered_and_a_far_one_is_not():
    assert did_you_mean("learning_rat", ["momentum", "learning_rate"]) == (
        " (did you mean 'learning_rate'?)"
    )
    assert did_you_mean("xyz", ["momentum", "learning_rate"]) == ""
