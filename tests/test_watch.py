"""The watchdog: what it reports, how it ends a process, and what progress costs."""

import re
import subprocess
import sys
import time
import timeit

import pytest

import flax_resnet
from flax_resnet import watch
from flax_resnet.errors import UserError
from flax_resnet.watch import Watch

START = f"""
import sys, time, types
package = types.ModuleType("flax_resnet")  # without all that the package imports
package.__path__ = {flax_resnet.__path__!r}
sys.modules["flax_resnet"] = package
from flax_resnet import watch
"""
STUCK = (
    START
    + """
def blocked_reader(): time.sleep(30)
with watch.Watch(0.5, report_after=0.2, who="process 1 of 2") as watching:
    for step in range(3):
        watching.at(watch.WAITING, step)
    blocked_reader()
"""
)
HOLDS_PYTHON = (
    START
    + """
sys.setswitchinterval(1000)
with watch.Watch(0.3) as watching:
    watching.at(watch.STEP, 7)
    while True:
        pass
"""
)


def run(program):
    began = time.monotonic()
    command = [sys.executable, "-W", "error", "-c", program]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return ran, time.monotonic() - began


def test_a_stuck_process_says_where_and_ends():
    ran, seconds = run(STUCK)
    assert ran.returncode == 1
    line = "process 1 of 2: stuck for 1 s waiting for data after step 2: ends, so that the others"
    assert ran.stderr.splitlines()[-1].startswith(line)
    assert "in blocked_reader" in ran.stderr
    assert re.match(r"process 1 of 2: no batch for \d s: .* \(step 2\)", ran.stderr)
    assert ran.stdout == ""
    assert seconds < 15


def test_a_process_that_keeps_python_to_itself_ends_too():
    ran, seconds = run(HOLDS_PYTHON)
    assert ran.returncode == 1
    assert re.search(r"Timeout \(.*\)!", ran.stderr)
    assert seconds < 15


def reports(phase, seconds=0.6, **options):
    said = []
    with Watch(None, said.append, 0.1, **options) as watching:
        watching.at(phase, 12)
        time.sleep(seconds)
    return said


def test_a_stall_is_reported_once():
    said = reports(watch.WAITING)
    assert len(said) == 1
    assert said[0].startswith("no batch for 0 s: the input pipeline is stalled (step 12)")


@pytest.mark.parametrize("phase", [watch.STEP, watch.EVALUATING, watch.SAVING])
def test_each_phase_has_a_text(phase):
    (said,) = reports(phase, 0.3)
    assert "(step 12)" in said


@pytest.mark.parametrize("phase", [watch.SETTING_UP, watch.COMPILING, watch.RECORDING])
def test_what_may_take_long_is_no_stall(phase):
    assert reports(phase, 0.3) == [f"{phase} takes 0 s so far"]
    assert reports(phase, 0.3, who="process 3 of 8")[0].startswith(f"process 3 of 8: {phase} ")


def test_a_terminal_that_is_gone_does_not_end_the_watch():
    said = []

    def say(text):
        said.append(text)
        raise BrokenPipeError

    with Watch(None, say, 0.1) as watching:
        for step in range(2):
            watching.at(watch.WAITING, step)
            time.sleep(0.4)
    assert ["(step 0)" in said[0], "(step 1)" in said[1]] == [True, True]


def test_reports_go_to_stderr(capsys):
    with Watch(None, report_after=0.1) as watching:
        watching.at(watch.SAVING, 4)
        time.sleep(0.4)
    out, err = capsys.readouterr()
    assert (out, err.count("saving a checkpoint takes")) == ("", 1)


def test_each_stall_is_reported():
    said = []
    with Watch(None, said.append, 0.1) as watching:
        for step in range(2):
            watching.at(watch.WAITING, step)
            time.sleep(0.4)
    assert ["(step 0)" in said[0], "(step 1)" in said[1]] == [True, True]


def test_progress_is_no_stall():
    ends = []
    with Watch(0.5, ends.append, 0.5, end=lambda *what: ends.append(what)) as watching:
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            watching.at(watch.STEP, 1)
            time.sleep(0.01)
    assert ends == []


def test_who_waits_for_the_stuck_one_ends_later():
    times = {}
    for phase in (watch.WAITING, watch.STEP):
        began, limit = time.monotonic(), 1.0

        def end(line, status, phase=phase, began=began):
            times.setdefault(phase, time.monotonic() - began)

        with Watch(limit, print, end=end) as watching:
            watching.at(phase, 1)
            while phase not in times:
                time.sleep(0.01)
    assert 1.0 < times[watch.WAITING] < times[watch.STEP]


def test_progress_costs_next_to_nothing():
    with Watch(None, print) as watching:
        seconds = min(timeit.repeat(lambda: watching.at(watch.STEP, 3), number=1000, repeat=5))
    assert seconds / 1000 < 5e-6


@pytest.mark.parametrize("times", [{"limit": 0}, {"limit": None, "report_after": 0}])
def test_times_are_checked(times):
    with pytest.raises(UserError, match="=0: expected more than 0"):
        Watch(say=print, **times)
