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
from flax_resnet.cli import flags
from flax_resnet.errors import UserError


def config_of(name, **settings):
    """The config that a study trains."""
    words = command(name, Settings(**settings))
    module = importlib.import_module(words[2])
    given, rest, _ = flags.arguments(module.get_config, words[3:])
    return flags.parse(module.get_config(**given), "runs/x", rest).config


@pytest.mark.parametrize("name", STUDIES)
def test_each_study_is_the_whole_schedule_and_a_trial_is_small(name):
    config = config_of(name, data_dir="D")
    assert (config.data.name, config.data.data_dir) == ("cifar10", "D")
    steps = config.num_steps or config.num_epochs * -(-50_000 // config.batch_size)
    assert steps == {"cifar10_mini": 19_550, "cifar10_dropblock": 16_000}.get(name, 64_000)
    if "depth" in name:
        assert 6 * config.model.stage_sizes[0] + 2 == int(name.partition("depth")[2])
    trial = config_of(name, trial=True)
    assert (trial.data.name, trial.num_steps, trial.batch_size) == ("sklearn_digits", 2, 8)
    assert len(getattr(trial.model, "stage_sizes", (1,))) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "--data-dir: name the directory"),
        ({"trial": True, "only": ("cifar10_min",)}, "--only 'cifar10_min'.*mean 'cifar10_mini'"),
        ({"trial": True, "minutes": 0}, "--minutes=0"),
    ],
)
def test_bad_input_is_one_line(settings, message):
    with pytest.raises(UserError, match=f"^{message}"):
        Settings(**settings)


def test_a_command_is_ended_when_the_time_is_up_or_its_launcher_is(tmp_path):
    log, before = tmp_path / "log", signal.getsignal(signal.SIGTERM)
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    words = [sys.executable, "-c", code]
    assert not pieces.run(words, log, time.monotonic() + 5, os.environ, least=0)
    log.write_text("")

    def terminate():
        while not log.read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate, daemon=True).start()
    with pytest.raises(SystemExit) as stop, pieces.terminable():
        pieces.run(words, log, time.monotonic() + 500, os.environ)
    assert stop.value.code == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_command_that_fails_is_reported_by_its_last_line(tmp_path):
    words = [sys.executable, "-c", "import sys; print('no room'); sys.exit(3)"]
    with pytest.raises(UserError, match=r"ended with status 3: no room; see "):
        pieces.run(words, tmp_path / "log", time.monotonic() + 60, os.environ)


@pytest.mark.slow
def test_the_trial_runs_all_once_and_records_it(tmp_path, monkeypatch):
    settings = Settings(trial=True, seeds=2, workdir=str(tmp_path), minutes=10)
    assert tutorials.launch(settings)
    records = results.load_records(tmp_path / "results")
    assert set(records) == set(STUDIES)
    for record in records.values():
        assert [run["step"] for run in record["runs"]] == [2, 2]
        assert str(tmp_path) not in json.dumps(record)
    readme = (tmp_path / "README.md").read_text()
    assert readme.count("run, reduced") == len(STUDIES)
    again = []
    monkeypatch.setattr(pieces, "run", lambda words, *_, **__: again.append(words[2]) or True)
    assert tutorials.launch(settings)
    assert set(again) == {"experiments.results"}
