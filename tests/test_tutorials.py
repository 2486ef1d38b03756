"""experiments.launch.tutorials: its commands parse, and it stops in time and goes on."""

import importlib
import json
import os
import signal
import sys
import threading
import time

import pytest

from experiments import results
from experiments.launch import pieces, tutorials
from experiments.launch.tutorials import STUDIES, Settings, command
from flax_resnet import flags
from flax_resnet.errors import UserError


def config_of(words):
    """The config that a command line of an experiment trains."""
    found = importlib.import_module(words[2])
    given, rest = flags.arguments(found.get_config, words[3:])
    return flags.parse(found.get_config(**given), "runs/x", rest)


@pytest.mark.parametrize("name", STUDIES)
def test_each_study_is_the_whole_schedule(name):
    chosen = config_of(command(name, Settings(data_dir="D", seeds=3, workdir="runs/t")))
    assert (chosen.num_seeds, chosen.workdir) == (3, f"runs/t/{name}")
    config = chosen.config
    assert (config.data.name, config.data.data_dir, config.model.num_classes) == (
        "cifar10",
        "D",
        10,
    )
    steps = config.num_steps or config.num_epochs * -(-50_000 // config.batch_size)
    assert steps == {"cifar10_mini": 19_550, "cifar10_dropblock": 16_000}.get(name, 64_000)
    wide = name in ("cifar10_mini", "cifar10_dropblock")
    assert config.model.dtype == ("bfloat16" if wide else "float32")


def test_each_depth_is_its_own():
    sizes = [config_of(command(name, Settings(data_dir="D"))).config.model.stage_sizes
             for name in STUDIES if "depth" in name]  # fmt: skip
    assert sizes == [(3, 3, 3), (9, 9, 9), (18, 18, 18)]


@pytest.mark.parametrize("name", STUDIES)
def test_a_trial_is_small(name):
    config = config_of(command(name, Settings(trial=True))).config
    assert (config.data.name, config.num_steps, config.batch_size) == ("sklearn_digits", 2, 8)
    assert len(getattr(config.model, "stage_sizes", (1,))) == 1


def test_bad_settings_are_refused_in_one_line():
    with pytest.raises(UserError, match=r"^--data-dir: name the directory"):
        Settings()
    with pytest.raises(UserError, match=r"--only 'cifar10_min'.*did you mean 'cifar10_mini'"):
        Settings(trial=True, only=("cifar10_min",))
    with pytest.raises(UserError, match=r"--minutes=0"):
        Settings(trial=True, minutes=0)


def test_a_command_is_ended_when_the_time_is_up(tmp_path):
    code = "import time; print('began', flush=True); time.sleep(60)"
    began = time.monotonic()
    words = [sys.executable, "-c", code]
    assert not pieces.run(words, tmp_path / "log", began + 1, os.environ, least=0)
    assert time.monotonic() - began < 10
    assert (tmp_path / "log").read_text().strip() in ("", "began")


def test_a_command_is_ended_with_its_launcher(tmp_path, monkeypatch):
    log, before = tmp_path / "log", signal.getsignal(signal.SIGTERM)

    def terminate():
        while not log.exists() or not log.read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    def launch(settings):
        assert signal.getsignal(signal.SIGTERM) != before
        threading.Thread(target=terminate, daemon=True).start()
        code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
        end = time.monotonic() + 60
        return pieces.run([sys.executable, "-c", code], log, end, os.environ)

    monkeypatch.setattr(tutorials, "launch", launch)
    with pytest.raises(SystemExit) as stop:
        tutorials.main(["--trial"])
    assert stop.value.code == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_command_that_fails_is_reported_by_its_last_line(tmp_path):
    words = [sys.executable, "-c", "import sys; print('no room'); sys.exit(3)"]
    with pytest.raises(UserError, match=r"ended with status 3: no room; see "):
        pieces.run(words, tmp_path / "log", time.monotonic() + 60, os.environ)


def test_what_is_finished_is_not_run_again(tmp_path, monkeypatch):
    """Two studies; the second runs out of time, and is alone in the second call."""
    ran, limits = [], iter([True, True, False, True, True])
    settings = Settings(trial=True, seeds=2, workdir=str(tmp_path), only=tuple(STUDIES)[:2])

    def run(words, log, end, environment, least=None):
        done = next(limits)
        ran.append(words[2])
        if done and words[2] != "experiments.results":
            for seed in (0, 1):
                path = tmp_path / log.stem / f"seed{seed}"
                path.mkdir(parents=True)
                (path / "result.json").write_text("{}")
        return done

    monkeypatch.setattr(pieces, "run", run)
    assert not tutorials.launch(settings)
    assert ran == ["experiments.cifar10_resnet", "experiments.results", "experiments.cifar10_mini"]
    ran.clear()
    limits = iter([True, True, True])
    assert tutorials.launch(settings)
    assert ran == ["experiments.results", "experiments.cifar10_mini", "experiments.results"]


@pytest.mark.slow
def test_the_trial_runs_all_and_records_it(tmp_path):
    settings = Settings(trial=True, seeds=2, workdir=str(tmp_path), minutes=10)
    assert tutorials.launch(settings)
    records = results.load_records(tmp_path / "results")
    assert set(records) == set(STUDIES)
    for record in records.values():
        assert [run["step"] for run in record["runs"]] == [2, 2]
        assert str(tmp_path) not in json.dumps(record)
    readme = (tmp_path / "README.md").read_text()
    assert readme.count("run, reduced") == len(STUDIES)
