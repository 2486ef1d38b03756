"""experiments.launch.gpu_suite: its commands parse, it goes on, and it judges what it finds."""

import importlib
import json
import sys

import pytest
from helpers import line_of_bad_input

from experiments.benchmarks import steps
from experiments.launch import gpu_suite, pieces
from experiments.launch.gpu_suite import PARTS, Settings
from flax_resnet import flags
from flax_resnet.errors import UserError


@pytest.mark.parametrize(
    ("name", "trial"),
    [(name, trial) for name in PARTS for trial in (False, True) if not trial or PARTS[name].trial],
)
def test_every_command_is_one_that_its_module_takes(name, trial):
    words = gpu_suite.command(name, Settings(data_dir="D", workdir="W", trial=trial))
    assert words[:2] == [sys.executable, "-m"]
    module = importlib.import_module(words[2])
    if hasattr(module, "get_config"):
        given, rest = flags.arguments(module.get_config, words[3:])
        chosen = flags.parse(module.get_config(**given), "runs/x", rest)
        assert given == {"target": int(name[-2:])}
        assert (chosen.workdir, chosen.in_turn) == (f"W/{name}", True)
        assert (chosen.config.steps_per_dispatch == 1) == trial
        return
    settings = getattr(module, "Settings", steps.Settings)
    chosen = flags.cli(settings, words[3:], module.__doc__, "x")
    if not trial and hasattr(chosen, "device"):
        assert chosen.device == "gpu"
    if "--data-dir" in words:
        assert chosen.data_dir == "D"


@pytest.fixture
def ran(monkeypatch):
    """Stands in for running; what was run. ``ran.result`` says how each ends."""

    class Ran(list):
        def result(self, name):
            return True

    ran = Ran()

    def run(words, log, end, environment, output):
        assert environment["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
        ran.append(log.stem)
        output.write_text('{"x": 1}\nnot of it\n{"x": 2}\n')
        found = ran.result(log.stem)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(pieces, "run", run)
    monkeypatch.setattr(gpu_suite, "goals", lambda found: [])
    return ran


def status_of(words):
    with pytest.raises(SystemExit) as stop:
        gpu_suite.main(words)
    return stop.value.code


def test_what_is_finished_is_not_run_again(ran, tmp_path, capsys):
    words = ["--data-dir", "D", "--workdir", str(tmp_path), "--only", "numbers", "small", "seeds"]
    ran.result = lambda name: name == "numbers"
    assert status_of(words) == 75
    assert ran == ["numbers", "small"]
    made = json.loads((tmp_path / "record.json").read_text())
    assert made["parts"]["numbers"]["rows"] == [{"x": 1}, {"x": 2}]
    assert made["parts"]["numbers"]["command"].startswith("python -m experiments.benchmarks.num")
    assert len(made["parts"]["numbers"]["commit"].removesuffix("-dirty")) == 40
    assert made["missing"] == ["small", "seeds"]
    assert "the time is up" in capsys.readouterr().out
    ran.clear()
    ran.result = lambda name: UserError("no room") if name == "small" else True
    assert status_of(words) == 1
    assert ran == ["small", "seeds"]  # a part that fails leaves the others alone
    made = json.loads((tmp_path / "record.json").read_text())
    assert (made["failed"], made["missing"]) == ({"small": "no room"}, [])
    ran.clear()
    assert status_of(words) == 1
    assert ran == []
    ran.result = lambda name: True
    assert status_of([*words, "--retry"]) == 0
    assert ran == ["small"]


def test_a_trials_figures_are_no_figures_of_a_gpu(ran, tmp_path):
    words = ["--workdir", str(tmp_path), "--only", "seeds"]
    assert status_of([*words, "--trial"]) == 0
    ran.result = lambda name: False
    assert status_of([*words, "--data-dir", "D"]) == 75
    made = json.loads((tmp_path / "record.json").read_text())
    assert made["parts"]["seeds"].keys() == {"command", "commit", "failed"}


def test_a_part_that_needs_more_than_the_whole_time_does_not_stop_the_others(ran, tmp_path):
    words = ["--data-dir", "D", "--workdir", str(tmp_path), "--only", "numbers", "seeds"]
    ran.result = lambda name: name == "seeds"
    assert status_of(words) == 75
    assert status_of(words) == 1
    assert ran == ["numbers", "seeds"]
    made = json.loads((tmp_path / "record.json").read_text())
    assert made["failed"] == {"numbers": "it takes more than --minutes 9"}


FOUND = {
    "numbers": [{"within": True}, {"within": True}],
    "resnet50": [
        {"peer": "ours", "error": None, "peak_share": 0.4},
        {"peer": "torch_compiled", "error": None, "ratio_to_ours": {"median": 1.2}},
    ],
    "speedrun94": [
        {
            "top1": {"mean": 0.9402},
            "start_seconds": {"mean": 0.3},
            "train_seconds": {"mean": 1.5},
            "eval_seconds": {"mean": 0.2},
        }
    ],
    "airbench94": [{"seconds": {"mean": 1.9}}],
    "seeds": [
        {"num_seeds": 4, "together_over_in_turn": 2.0},
        {"num_seeds": 16, "together_over_in_turn": 0.5},
    ],
}


def judged(**changed):
    found = dict.fromkeys(PARTS, ()) | FOUND | changed
    return [(goal["measured"], goal["met"]) for goal in gpu_suite.goals(found)]


def test_goals_are_judged_by_what_was_measured():
    assert judged() == [
        (True, True),
        (1.2, True),
        (0.4, False),
        (0.9402, True),
        (None, None),
        (None, None),
        (0.95, False),
        (0.5, True),
    ]
    one_off = [{"within": True}, {"within": False}]
    failed = [{"peer": "torch_compiled", "error": "no room", "ratio_to_ours": None}]
    assert judged(numbers=one_off, resnet50=failed)[:3] == [
        (False, False),
        (None, None),
        (None, None),
    ]
    assert judged(airbench94=[])[-2] == (None, None)
    made = {"goals": gpu_suite.goals(dict.fromkeys(PARTS, ()) | FOUND)}
    lines = gpu_suite.report(made).splitlines()
    assert lines[2].startswith("MISSED: ResNet-50: operations")
    assert lines[2].endswith("(0.4)")
    assert lines[4] == "not measured: the speed run's mean top-1, at least 95 %"


def test_the_record_says_what_is_missing(tmp_path):
    made = gpu_suite.record(Settings(trial=True, workdir=str(tmp_path)))
    assert set(made["missing"]) == {name for name, part in PARTS.items() if part.trial}
    assert {goal["met"] for goal in made["goals"]} == {None}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--data-dir: name the directory that holds cifar10"),
        (["--trial", "--only", "seed"], "--only 'seed': expected some of"),
        (["--trial", "--minutes", "0"], "--minutes=0"),
    ],
)
def test_bad_input_is_one_line(words, said, capfd):
    assert said in line_of_bad_input(gpu_suite.main, words, capfd)


@pytest.mark.slow
def test_the_trial_runs_all_and_records_it(tmp_path):
    assert status_of(["--trial", "--workdir", str(tmp_path), "--minutes", "30"]) == 0
    made = json.loads((tmp_path / "record.json").read_text())
    assert made["trial"]
    assert (made["missing"], made["failed"]) == ([], {})
    assert all(part["rows"] for part in made["parts"].values())
