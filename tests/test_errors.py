import math
import re

import jax
import numpy as np
import pytest
from helpers import assert_one_line_error

from flax_resnet import (
    SGD,
    Augment,
    CheckpointConfig,
    DataConfig,
    Guard,
    Hosts,
    MLflow,
    Piecewise,
    TrainConfig,
    cifar_resnet,
    train_and_evaluate,
)
from flax_resnet.errors import POSITIVE, TryAgain, UserError, check_range, did_you_mean
from flax_resnet.models import MiniModel
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
        (lambda: TrainConfig(seed=True), "seed=True: expected a whole number"),
        (lambda: TrainConfig(model="resnet18"), "model='resnet18': expected Module"),
        (lambda: TrainConfig(optimizer="sgd"), "optimizer='sgd': expected SGD or Adam or AdamW or"),
        (lambda: SGD(schedule="cosine"), "optimizer.schedule='cosine': expected Constant or"),
        (lambda: SGD(learning_rate="x"), "optimizer.learning_rate='x': expected a number"),
        (lambda: Piecewise(boundaries=3), "schedule.boundaries=3: expected a tuple of numbers"),
        (lambda: Guard(times_chance=0), "guard.times_chance=0: expected more than 0"),
        (lambda: Hosts(num_processes="2"), "hosts.num_processes='2': expected a whole number"),
        (lambda: MLflow(uri=3), "tracking.uri=3: expected text or None"),
        (lambda: cifar_resnet(20, num_classes="10"), "num_classes='10': expected a whole number"),
        (lambda: MiniModel(residual=2), "residual=2: expected True or False"),
        (lambda: Augment(flip="yes"), "augment.flip='yes': expected True or False"),
        (lambda: CheckpointConfig(keep_last=True), "checkpoint.keep_last=True: expected a whole"),
    ],
)
def test_a_field_of_a_wrong_type_is_named_with_what_was_expected(make, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make()
    assert TrainConfig(num_steps=np.int64(3), num_epochs=np.float32(2)).num_steps == 3


@pytest.mark.parametrize("name", REFUSED_SETTINGS)
def test_settings_of_jax_that_no_program_survives_are_refused_by_name(name, tmp_path, call):
    before, value = getattr(jax.config, name), REFUSED_SETTINGS[name][0]
    jax.config.update(name, value)
    message = f"{name.upper()}={value}: programs here do not work with it; unset it"
    try:
        with pytest.raises(UserError, match=message):
            train_and_evaluate(TrainConfig(), tmp_path / "w")
        assert_one_line_error(call("predict", tmp_path), message)
    finally:
        jax.config.update(name, getattr(before, "value", before))
    assert not (tmp_path / "w").exists()
