import pytest

from flax_resnet.errors import UserError
from flax_resnet.optim import optimizers


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        (optimizers.Constant(), {0: 2.0, 99: 2.0}),
        (optimizers.Constant(warmup=0.1), {0: 0.0, 5: 1.0, 10: 2.0, 99: 2.0}),
        (optimizers.Constant(warmup=0.1, warmup_start=0.5), {0: 1.0, 5: 1.5, 10: 2.0}),
        (optimizers.Piecewise(), {0: 2.0, 49: 2.0, 50: 0.2, 74: 0.2, 75: 0.02, 99: 0.02}),
        (
            optimizers.Piecewise(boundaries=(0.3,), factor=0.5, warmup=0.1),
            {10: 2.0, 36: 2.0, 37: 1.0},
        ),
        (optimizers.Cosine(), {0: 2.0, 50: 1.0, 100: 0.0}),
        (optimizers.Cosine(final=0.1), {0: 2.0, 50: 1.1, 100: 0.2}),
        (optimizers.Cosine(warmup=0.2), {0: 0.0, 10: 1.0, 20: 2.0, 60: 1.0, 100: 0.0}),
        (optimizers.OneCycle(), {0: 0.08, 30: 2.0, 100: 8e-6}),
    ],
)
def test_schedules(schedule, rates):
    built = schedule.build(2.0, 100)
    got = {step: float(built(step)) for step in rates}
    assert got == pytest.approx(rates, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("cls", "fields"),
    [
        (optimizers.Cosine, {"warmup": 1.5}),
        (optimizers.Constant, {"warmup": float("nan")}),
        (optimizers.Piecewise, {"boundaries": (32_000,)}),
        (optimizers.OneCycle, {"rise": 1.0}),
    ],
)
def test_schedules_take_shares_of_the_run(cls, fields):
    with pytest.raises(UserError, match=rf"schedule\.{next(iter(fields))}=.*: expected a share"):
        cls(**fields)


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_a_warmup_leaves_a_step_however_short_the_run(num_steps):
    built = optimizers.Cosine(warmup=0.96).build(1.0, num_steps)
    assert float(built(num_steps - 1)) == 1.0
