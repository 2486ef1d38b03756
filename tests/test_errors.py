import math
import re

import jax
import numpy as np
import pytest

from flax_resnet import (
    SGD,
    Augment,
    CheckpointConfig,
    DataConfig,
    TrainConfig,
    train_and_evaluate,
)
from flax_resnet.errors import POSITIVE, TryAgain, UserError, check_range, did_you_mean
from flax_resnet.xla.backend import REFUSED_SETTINGS


def test_a_message_is_one_line_and_what_another_try_may_mend_has_another_status():
    assert str(TryAgain("first\n   second\tthird")) == "first second third"
    assert issubclass(TryAgain, UserError)
    assert issubclass(UserError, ValueError)
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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataConfig(channels=5), "data.channels=5: expected one of 1, 3, 4, None"),
        (lambda: DataConfig(image_size="224"), "data.image_size='224': expected a whole number or"),
        (lambda: DataConfig(folder=3), "data.folder=3: expected text or None"),
        (lambda: TrainConfig(batch_size=3.5), "batch_size=3.5: expected a whole number"),
        (lambda: TrainConfig(model="resnet18"), "model='resnet18': expected a linen module"),
        (lambda: TrainConfig(optimizer="sgd"), "optimizer='sgd': expected an optimizer, such"),
        (lambda: SGD(schedule="cosine"), "optimizer.schedule='cosine': expected a schedule"),
        (lambda: SGD(learning_rate="x"), "optimizer.learning_rate='x': expected a number"),
        (lambda: Augment(flip="yes"), "augment.flip='yes': expected True or False"),
        (lambda: CheckpointConfig(keep_last=True), "checkpoint.keep_last=True: expected a whole"),
    ],
)
def test_a_field_of_a_wrong_type_is_named_with_what_was_expected(make, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make()
    assert TrainConfig(num_steps=np.int64(3), num_epochs=np.float32(2)).num_steps == 3


@pytest.mark.parametrize("name", REFUSED_SETTINGS)
def test_settings_of_jax_that_no_run_survives_are_refused_by_name(name, tmp_path):
    before, value = getattr(jax.config, name), REFUSED_SETTINGS[name][0]
    jax.config.update(name, value)
    try:
        with pytest.raises(UserError, match=f"{name.upper()}={value}: .* unset it"):
            train_and_evaluate(TrainConfig(), tmp_path / "w")
    finally:
        jax.config.update(name, getattr(before, "value", before))
    assert not (tmp_path / "w").exists()
