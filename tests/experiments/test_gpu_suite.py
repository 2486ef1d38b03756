"""experiments.launch.gpu_suite: its commands parse, it goes on, and it judges what it finds."""

import importlib
import json

import pytest
from helpers import line_of_bad_input

from experiments.benchmarks import steps
from experiments.benchmarks.peers import comparison
from experiments.launch import gpu_suite, pieces
from experiments.launch.gpu_suite import PARTS, Settings
from flax_resnet.cli import flags
from flax_resnet.errors import UserError


@pytest.mark.parametrize(
    ("name", "trial"),
    [(name, trial) for name in PARTS for trial in (False, True) if not trial or PARTS[name].trial],
)
def test_every_command_is_one_that_its_module_takes(name, trial):
    words = gpu_suite.command(name, Settings(data_dir="D", workdir="W", trial=trial))
    assert words[:2] == ["python", "-m"]
    module = importlib.import_module(words[2])
    module = getattr(module, "comparison", module)  # a package's commands are a module in it
    if hasattr(module, "get_config"):
        given, rest, _ = flags.arguments(module.get_config, words[3:])
        chosen = flags.parse(module.get_config(**given), "runs/x", rest)
        assert given == {"target": int(name[-2:])}
        assert (chosen.workdir, chosen.in_turn) == (f"W/{name}", True)
        return
    settings = getattr(module, "Settings", steps.Settings)
    chosen = flags.cli(settings, words[3:], module.__doc__, "x")
    if not trial and hasattr(chosen, "device"):
        assert chosen.device == "gpu"


def test_what_is_finished_is_not_run_again(tmp_path, capfd, monkeypatch):
    """The second part runs out of time, then fails, and --retry runs it alone."""
    names = ["numbers", "small", "resnet50"]
    ran, ends = [], {"numbers": True, "small": False, "resnet50": True}

    def run(words, log, end, environment, output):
        ran.append(log.stem)
        output.write_text('{"x": 1}\nnot of it\n{"x": 2}\n')
        if isinstance(ends[log.stem], Exception):
            raise ends[log.stem]
        return ends[log.stem]

    def status_of(*words):
        ran.clear()
        with pytest.raises(SystemExit) as stop:
            gpu_suite.main(
                ["--data-dir", "D", "--workdir", str(tmp_path), "--only", *names, *words]
            )
        return stop.value.code, list(ran), json.loads((tmp_path / "record.json").read_text())

    monkeypatch.setattr(pieces, "run", run)
    monkeypatch.setattr(gpu_suite, "goals", lambda found: [])
    status, parts, record = status_of()
    assert (status, parts, record["missing"]) == (75, names[:2], names[1:])
    assert record["parts"]["numbers"]["rows"] == [{"x": 1}, {"x": 2}]
    ends["small"] = UserError("no room")
    status, parts, record = status_of()
    assert (status, parts, record["failed"]) == (1, names[1:], {"small": "no room"})
    assert status_of()[:2] == (1, [])
    ends["small"] = True
    assert status_of("--retry")[:2] == (0, ["small"])


@pytest.mark.parametrize(
    ("rows", "goal", "measured", "met"),
    [
        ({"numbers": [{"within": True}, {"within": False}]}, "the GPU's numbers", False, False),
        ({}, "the GPU's numbers", None, None),
        (
            {"resnet50": [{"peer": "torch_compiled", "ratio_to_ours": {"median": 1.2}}]},
            "ResNet-50 at 224", 1.2, True,
        ),
        ({"speedrun94": [{"top1": {"mean": 0.9402}}]}, "the speed run's mean top-1, at least 94",
         0.9402, True),
        (
            {"seeds": [{"num_seeds": 4, "together_over_in_turn": 2.0},
                       {"num_seeds": 16, "together_over_in_turn": 0.5}]},
            "16 seeds at once", 0.5, True,
        ),
    ],
)  # fmt: skip
def test_goals_are_judged_by_what_was_measured(rows, goal, measured, met):
    goals = gpu_suite.goals(dict.fromkeys(PARTS, ()) | rows)
    (found,) = [each for each in goals if each["goal"].startswith(goal)]
    assert (found["measured"], found["met"]) == (measured, met)


def test_bad_input_is_one_line(capfd):
    words = ["--trial", "--only", "number"]
    assert "--only 'number': expected some of" in line_of_bad_input(gpu_suite.main, words, capfd)


@pytest.mark.slow
def test_the_trial_runs_all_and_records_it(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        gpu_suite.main(["--trial", "--workdir", str(tmp_path), "--minutes", "30"])
    assert stop.value.code == 0
    made = json.loads((tmp_path / "record.json").read_text())
    assert made["trial"]
    assert (made["missing"], made["failed"]) == ([], {})
    rows = {name: part["rows"] for name, part in made["parts"].items()}
    assert all(rows.values())
    exact, rounded = rows["numbers"]
    assert set(exact["differences"].values()) == {0.0}  # the CPU's beside the CPU's
    gradient = rounded["differences"]["gradient"]
    assert 0 < gradient == pytest.approx(rounded["bound"]["gradient"] / 2)
    assert [row["peer"] for row in rows["small"]] == [comparison.OURS, *comparison.OTHERS]
    assert {row["parameters"] for row in rows["small"][:4]} == {269_722}
    # torch.compile needs a C++ compiler, which a machine may lack.
    assert [row["error"] for row in rows["small"][:4]] == [None] * 4
    assert capsys.readouterr().out.rstrip().splitlines()[-1].startswith("not measured: ")
