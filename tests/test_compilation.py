"""The cache of compiled programs: where it lies, what may go wrong, and the same numbers."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import assert_trees_equal, tiny_resnet
from jax.experimental.compilation_cache import compilation_cache as jax_cache
from test_train import saved

from experiments import digits
from flax_resnet import command, compilation, distributed, figures, main, metrics, programs
from flax_resnet.config import TrainConfig
from flax_resnet.data import DataConfig
from flax_resnet.train import train_and_evaluate

CACHE = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_enable_compilation_cache",
)


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """JAX as it starts, without a cache; the default one would lie in the path returned."""
    before = {name: getattr(jax.config, name) for name in CACHE}
    jax.config.update(CACHE[0], None)
    jax.config.update(CACHE[1], compilation.JAX_LEAST_COMPILE_SECONDS)
    monkeypatch.setenv("FLAX_RESNET_CACHE", str(tmp_path))
    yield tmp_path / "xla"
    for name, value in before.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()


def test_the_default_is_in_the_users_cache_by_processor(fresh, monkeypatch):
    monkeypatch.delenv("FLAX_RESNET_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh))
    found = compilation.use_cache()
    assert found == fresh / "flax_resnet" / "xla" / compilation.processor()
    assert found.is_dir()
    assert found.stat().st_mode & 0o077 == 0
    assert jax.config.jax_compilation_cache_dir == str(found)
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    assert least == compilation.LEAST_COMPILE_SECONDS


def test_what_the_user_has_set_is_left_alone(fresh):
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 7)
    assert compilation.use_cache() is not None
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 7
    jax.config.update("jax_compilation_cache_dir", "/mine")
    assert compilation.use_cache() is None
    assert jax.config.jax_compilation_cache_dir == "/mine"


def test_who_has_switched_it_off_has_none(fresh):
    jax.config.update("jax_enable_compilation_cache", False)
    assert compilation.use_cache() is None
    assert jax.config.jax_compilation_cache_dir is None
    assert not fresh.exists()


def test_several_processes_on_accelerators_have_none(fresh, monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    assert compilation.use_cache() is not None
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert compilation.use_cache() is None


@pytest.mark.parametrize("place", ["/proc/cache", "/dev/null"])
def test_a_place_that_cannot_be_written_is_one_line(fresh, monkeypatch, capsys, place):
    monkeypatch.setenv("FLAX_RESNET_CACHE", place)
    assert compilation.use_cache() is None
    assert re.fullmatch(r"compiled programs are not kept: .*\n", capsys.readouterr().err)
    assert jax.config.jax_compilation_cache_dir is None


def test_who_has_no_home_has_none(fresh, monkeypatch, capsys):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(compilation, "cache_dir", homeless)
    assert compilation.use_cache() is None
    assert capsys.readouterr().err.count("\n") == 1


def test_the_name_of_a_processor_follows_its_instruction_sets_and_cores(monkeypatch):
    text = "processor : 0\nmodel name : A\nflags : {}\n\nprocessor : 1\nmodel name : A\nflags : x\n"

    def name(flags, model="A"):
        said = text.format(flags).replace("A", model)
        monkeypatch.setattr(pathlib.Path, "read_text", lambda *_, **__: said)
        return compilation.processor()

    assert name("avx2 avx512f") == name("avx512f avx2") != name("avx2")
    assert name("avx2") != name("avx2", model="B")
    one = name("avx2")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    assert name("avx2") != one
    arm = "processor : 0\nFeatures : {}\nCPU part : 0xd0c\n"
    text = arm
    assert name("asimd sve") != name("asimd")


def test_entries_not_used_for_longest_go_and_empty_ones(fresh, monkeypatch):
    place = compilation.default_directory()
    place.mkdir(parents=True)
    for i, size in enumerate((400, 0, 400, 400)):
        (place / f"{i}-cache").write_bytes(bytes(size))
        os.utime(place / f"{i}-cache", (1000 + (i or 9), 500))
    (place / "xla_gpu_per_fusion_autotune_cache_dir").mkdir()
    monkeypatch.setattr(compilation, "MOST_BYTES", 900)
    compilation.use_cache()
    assert sorted(path.name for path in place.glob("*-cache")) == ["0-cache", "3-cache"]


def numbers(workdir):
    """What a run's metrics say, without times."""
    times = ("images_per_second", "data_wait")
    records = metrics.read_metrics(workdir)
    return [{k: v for k, v in record.items() if k not in times} for record in records]


@pytest.mark.slow
def test_a_warm_start_equals_a_cold_one_and_a_damaged_entry_is_no_error(
    fresh, digits_dir, tmp_path, mesh, monkeypatch
):
    for name in ("curves", "confusion"):
        monkeypatch.setattr(figures, name, lambda *_: None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # on any machine
    place = compilation.use_cache()
    data = DataConfig(data_dir=digits_dir)
    config = TrainConfig(tiny_resnet(), data, batch_size=64, num_steps=3, log_every_steps=1)

    def start(name):
        jax.clear_caches()  # as a new process
        jax_cache.reset_cache()
        train_and_evaluate(config, tmp_path / name, mesh=mesh, quiet=True)
        return {path: path.stat().st_mtime_ns for path in place.glob("*-cache")}

    kept = start("cold")
    steps = ("jit_train_step-", "jit_eval_step-")
    both = [path for path in kept if path.name.startswith(steps)]
    assert len(both) == 2
    assert start("warm") == kept
    for path in both:
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache"):
        start("damaged")
    for name in ("warm", "damaged"):
        assert numbers(tmp_path / name) == numbers(tmp_path / "cold")
        assert_trees_equal(saved(tmp_path / name)[0], saved(tmp_path / "cold")[0])


def test_what_comes_from_the_cache_still_takes_its_argument_over(fresh, mesh):
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    place, whole = compilation.use_cache(), distributed.replicated(mesh)

    def compiled():
        jax.clear_caches()
        step = jax.jit(lambda x: x * 3.5 + 1, donate_argnums=0, out_shardings=whole)
        like = jax.ShapeDtypeStruct((64, 64), np.float32, sharding=whole)
        return step.lower(like).compile()

    compiled()
    before = {path: path.stat().st_mtime_ns for path in place.glob("*-cache")}
    warm = compiled()
    assert before == {path: path.stat().st_mtime_ns for path in place.glob("*-cache")} != {}
    given = jax.device_put(np.ones((64, 64), np.float32), whole)
    assert warm(given)[0, 0] == 4.5
    assert given.is_deleted()
    assert programs.memory(warm).aliased == 64 * 64 * 4


def test_the_commands_use_it_and_nothing_else_does(monkeypatch, tmp_path, digits_dir):
    used = []
    monkeypatch.setattr(main, "use_cache", lambda: used.append(True))
    monkeypatch.setattr(main, "train_and_evaluate", lambda *_: {"best_step": 1})
    monkeypatch.setattr(main, "sweep", lambda *_, **__: [])
    argv = ["--workdir", str(tmp_path)]
    main.main(digits.get_config, "w", argv)
    main.ablate(digits.get_config, lambda *_: {}, "w", argv)
    monkeypatch.setattr(command, "use_cache", lambda: used.append(True))
    for name in command.TOOLS:
        with pytest.raises(SystemExit):
            command.command([name, "--no-such-flag"])
    assert len(used) == len(command.TOOLS)  # but for train and finetune, which begin no run
    with pytest.raises(SystemExit):
        main.main(digits.get_config, "w", ["--no-such-flag"])
    assert len(used) == len(command.TOOLS)


def test_the_flags_that_the_documentation_names_are_known_to_xla(clean_environment):
    page = (pathlib.Path(__file__).parents[1] / "docs" / "performance.md").read_text()
    named = sorted(set(re.findall(r"--xla_gpu_\w+=\w+", page)))
    assert len(named) == 4
    done = subprocess.run(
        [sys.executable, "-c", "import jax; jax.numpy.zeros(1)"],
        env={**clean_environment, "XLA_FLAGS": " ".join(named), "JAX_ENABLE_PGLE": "true"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-300:]  # XLA ends a process for a flag it has not
