"""The cache of compiled programs: where it lies, what may go wrong, and the same numbers."""

import os
import platform
import re

import jax
import numpy as np
import pytest
from helpers import assert_trees_equal, tiny_resnet
from jax.experimental.compilation_cache import compilation_cache as jax_cache
from run_helpers import numbers, saved

from experiments import digits
from flax_resnet import figures
from flax_resnet.cli import app, experiment
from flax_resnet.data.config import DataConfig
from flax_resnet.distributed import sharding
from flax_resnet.training.config import TrainConfig
from flax_resnet.training.loop import train_and_evaluate
from flax_resnet.xla import program_cache

CACHE = {
    "jax_compilation_cache_dir": None,
    "jax_enable_compilation_cache": True,
    **{name: default for name, (default, _) in program_cache.SETTINGS.items()},
}
MIN_SECONDS = "jax_persistent_cache_min_compile_time_secs"


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """JAX as it starts, without a cache; the default one would lie in the path returned."""
    before = {name: getattr(jax.config, name) for name in CACHE}
    for name, value in CACHE.items():
        jax.config.update(name, value)
    monkeypatch.setenv("FLAX_RESNET_CACHE", str(tmp_path))
    yield tmp_path / "xla"
    for name, value in before.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()


def test_the_default_is_in_the_users_cache_by_machine_and_cores(fresh, monkeypatch):
    monkeypatch.delenv("FLAX_RESNET_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    found = program_cache.use_cache()
    assert found == fresh / "flax_resnet" / "xla" / f"{platform.machine()}-64-cores"
    assert found.stat().st_mode & 0o077 == 0
    assert jax.config.jax_compilation_cache_dir == str(found)
    assert jax.config.jax_compilation_cache_max_size == 2**30
    assert getattr(jax.config, MIN_SECONDS) == 0.1


def test_what_the_user_has_set_is_left_alone(fresh):
    jax.config.update(MIN_SECONDS, 7)
    assert program_cache.use_cache() is not None
    assert getattr(jax.config, MIN_SECONDS) == 7
    jax.config.update("jax_compilation_cache_dir", "/mine")
    assert program_cache.use_cache() is None
    assert jax.config.jax_compilation_cache_dir == "/mine"
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    assert program_cache.use_cache() is None


def test_several_processes_on_accelerators_have_none(fresh, monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert program_cache.use_cache() is None
    assert not fresh.exists()


@pytest.mark.parametrize("place", ["/proc/cache", "/dev/null"])
def test_a_place_that_cannot_be_written_is_one_line(fresh, monkeypatch, capsys, place):
    monkeypatch.setenv("FLAX_RESNET_CACHE", place)
    assert program_cache.use_cache() is None
    assert re.fullmatch(r"compiled programs are not kept: .*\n", capsys.readouterr().err)
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.slow
def test_a_warm_start_equals_a_cold_one(fresh, digits_dir, tmp_path, mesh, monkeypatch):
    for name in ("curves", "confusion"):
        monkeypatch.setattr(figures, name, lambda *_: None)
    place = program_cache.use_cache()
    jax.config.update(MIN_SECONDS, 0)  # on any machine
    data = DataConfig(data_dir=digits_dir)
    config = TrainConfig(tiny_resnet(), data, batch_size=64, num_steps=3, log_every_steps=1)

    def start(name):
        jax.clear_caches()  # as a new process
        jax_cache.reset_cache()
        train_and_evaluate(config, tmp_path / name, mesh=mesh, quiet=True)
        return {path: path.stat().st_mtime_ns for path in place.glob("*-cache")}

    entries = start("cold")
    assert start("warm") == entries != {}
    assert numbers(tmp_path / "warm") == numbers(tmp_path / "cold")
    assert_trees_equal(saved(tmp_path / "warm")[0], saved(tmp_path / "cold")[0])


def test_what_comes_from_the_cache_still_takes_its_argument_over(fresh, mesh):
    """And a program whose entry a killed process left half written is kept again."""
    whole = sharding.replicated(mesh)
    place = program_cache.use_cache()
    jax.config.update(MIN_SECONDS, 0)

    def compiled():
        jax.clear_caches()
        jax_cache.reset_cache()
        step = jax.jit(lambda x: x * 3.5 + 1, donate_argnums=0, out_shardings=whole)
        like = jax.ShapeDtypeStruct((64, 64), np.float32, sharding=whole)
        return step.lower(like).compile()

    def entries():
        return {path: path.stat().st_mtime_ns for path in place.glob("*-cache")}

    compiled()
    before = entries()
    warm = compiled()
    assert before == entries() != {}
    given = jax.device_put(np.ones((64, 64), np.float32), whole)
    assert warm(given)[0, 0] == 4.5
    assert given.is_deleted()
    for path in place.glob("*-atime"):
        path.unlink()
    jax.config.update("jax_compilation_cache_dir", None)
    program_cache.use_cache()
    assert entries() == {}
    compiled()
    assert set(entries()) == set(before)


def test_the_commands_use_it_and_nothing_else_does(monkeypatch, tmp_path, digits_dir):
    used = []
    monkeypatch.setattr(experiment, "use_cache", lambda: used.append(True))
    monkeypatch.setattr(experiment, "train_and_evaluate", lambda *_: {"best_step": 1})
    monkeypatch.setattr(experiment, "sweep", lambda *_, **__: [])
    argv = ["--workdir", str(tmp_path)]
    experiment.main(digits.get_config, "w", argv)
    experiment.ablate(digits.get_config, lambda *_: {}, "w", argv)
    monkeypatch.setattr(app, "use_cache", lambda: used.append(True))
    assert len(used) == 2
    app.command(["names"])
    assert len(used) == 3
    with pytest.raises(SystemExit):
        app.command(["names", "--no-such-flag"])
    with pytest.raises(SystemExit):
        experiment.main(digits.get_config, "w", ["--no-such-flag"])
    assert len(used) == 3
