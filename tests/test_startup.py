"""What a start takes: what is imported, and the benchmark that times it."""

import dataclasses
import json
import subprocess
import sys
import time

import pytest
from helpers import line_of_bad_input, tiny_resnet

from experiments.benchmarks import compile_cache, startup
from flax_resnet.config import TrainConfig
from flax_resnet.data import DataConfig

LATE = {
    "array_record",
    "gradio",
    "grain",
    "h5py",
    "keras",
    "matplotlib",
    "mlflow",
    "orbax",
    "pandas",
    "requests",
    "safetensors",
    "scipy",
    "sklearn",
    "tensorboardX",
    "tensorflow",
    "tensorflow_datasets",
    "tensorstore",
    "torch",
    "wandb",
}
"""Packages that a command imports where it needs them, and not before."""


def test_importing_the_library_imports_what_every_command_needs_alone(clean_environment):
    code = "import flax_resnet.main, sys; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=clean_environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    loaded = set(done.stdout.split())
    assert "jax" in loaded
    assert LATE & loaded == set()


def test_the_phases_of_a_start_add_up(digits_dir, tmp_path):
    data = DataConfig(data_dir=digits_dir)
    config = TrainConfig(tiny_resnet(), data, batch_size=64, num_steps=9)
    began = time.time()
    found = startup.phases(config, tmp_path / "w", began - 1.5)
    assert tuple(found) == startup.PHASES
    assert found["import"] == pytest.approx(1.5, abs=0.5)
    assert sum(found.values()) <= time.time() - began + 1.5
    assert (tmp_path / "w" / "checkpoints" / "1").is_dir()


def test_the_benchmark_takes_cold_and_warm_starts_in_turn(monkeypatch, capfd):
    ran = []

    def run(arguments, environment):
        ran.append((arguments, environment["FLAX_RESNET_CACHE"]))
        assert "JAX_COMPILATION_CACHE_DIR" not in environment
        return json.dumps(dict.fromkeys(startup.PHASES, float(len(ran))))

    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    monkeypatch.setattr(startup, "run_python", run)
    monkeypatch.setattr(startup, "prepare", lambda *_: "")
    startup.main(["--repeats", "2"])
    starts = [cache for arguments, cache in ran if startup.START in arguments]
    assert starts[0] == starts[1] != starts[2] == starts[3]
    out, err = capfd.readouterr()
    cold, warm, *others = map(json.loads, out.splitlines())
    assert cold["total"] == {"median": 8.0, "least": 4.0, "most": 12.0, "n": 2}
    assert (warm["start"], warm["compile"]["median"]) == ("warm", 3.0)
    assert [row["start"] for row in others] == list(startup.COMMANDS)
    assert err.splitlines()[-1].split()[0] == "import"


def test_bad_input_is_one_line(capfd):
    assert "--repeats=0: expected 1" in line_of_bad_input(startup.main, ["--repeats", "0"], capfd)


def test_a_start_that_fails_is_one_line(monkeypatch):
    with pytest.raises(startup.UserError, match=r"failed: .*no such thing"):
        startup.run_python(["-c", "raise SystemExit('no such thing')"], {})


def test_networks_are_compiled_cold_and_warm_in_turn(monkeypatch, capfd):
    ran = []

    def run(arguments, environment):
        ran.append((arguments[-2], environment["FLAX_RESNET_CACHE"]))
        found = dict.fromkeys(compile_cache.PHASES, float(len(ran)))
        return json.dumps({**found, "peak_rss_bytes": len(ran)})

    monkeypatch.setattr(startup, "run_python", run)
    compile_cache.main(["--models", "resnet20", "resnet1202", "--repeats", "2"])
    assert [name for name, _ in ran] == ["resnet20"] * 4 + ["resnet1202"] * 4
    caches = [cache for _, cache in ran]
    assert caches[::2] == caches[1::2]
    assert len(set(caches)) == 4
    out, err = capfd.readouterr()
    cold, warm, deep, _ = map(json.loads, out.splitlines())
    assert cold["compile"] == {"median": 2.0, "least": 1.0, "most": 3.0, "n": 2}
    assert (warm["total"]["median"], warm["peak_rss_bytes"]) == (9.0, 4)
    assert (cold["scanned"], deep["scanned"]) == (False, True)
    assert "resnet1202, scanned" in err


def test_the_phases_of_a_compilation(monkeypatch, capfd):
    monkeypatch.setattr(compile_cache.models, "create", lambda name, **fields: tiny_resnet())
    settings = compile_cache.Settings(models=("mini",), scanned=(), batch_size=2)
    given, began = json.dumps(dataclasses.asdict(settings)), time.time() - 1.5
    compile_cache.start(repr(began), "mini", given)
    found = json.loads(capfd.readouterr().out)
    assert found.pop("peak_rss_bytes") > 1e8
    assert tuple(found) == compile_cache.PHASES
    assert found["import"] == pytest.approx(1.5, abs=0.5)
    assert found["compile"] > 0.1
    assert sum(found.values()) <= time.time() - began


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--models", "resnet21"], "resnet21"),
        (["--models", "resnet20"], "--scanned resnet1202: it is none of --models"),
        (["--repeats", "0"], "--repeats=0: expected 1"),
    ],
)
def test_what_cannot_be_compiled_is_one_line(words, said, capfd):
    assert said in line_of_bad_input(compile_cache.main, words, capfd)
