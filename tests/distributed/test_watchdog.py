"""The watchdog: what it reports, and how it ends a process."""

import re
import subprocess
import sys
import threading

import pytest

import flax_resnet
from flax_resnet.distributed import watchdog
from flax_resnet.distributed.watchdog import Watch

START = f"""
import sys, time, types
package = types.ModuleType("flax_resnet")  # without all that the package imports
package.__path__ = {flax_resnet.__path__!r}
sys.modules["flax_resnet"] = package
from flax_resnet.distributed import watchdog
"""
STUCK = """
def blocked_reader(): time.sleep(50)
with watchdog.Watch(1.5, 0.2, "process 1 of 2") as watching:
    for step in range(3):
        watching.at(watchdog.WAITING, step)
    blocked_reader()
"""
HOLDS_PYTHON = """
sys.setswitchinterval(1000)
with watchdog.Watch(0.3) as watching:
    watching.at(watchdog.STEP, 7)
    while True:
        pass
"""


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (
            STUCK,
            r"process 1 of 2: waiting for data for \d s \(step 2\)"
            r"\nTimeout \(0:00:01\.500000\)!\n(.*\n)*  File .* in blocked_reader\n(.*\n)*",
        ),
        (HOLDS_PYTHON, r"(.*\n)*Timeout \(0:00:00\.300000\)!\n(.*\n)*"),
    ],
)
def test_a_stuck_process_says_where_and_ends(program, said):
    command = [sys.executable, "-W", "error", "-c", START + program]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=45)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert re.fullmatch(said, ran.stderr), ran.stderr


@pytest.fixture
def reports(monkeypatch):
    """Reports of the watch; ``wait(n)`` returns when there are n of them."""

    class Reports(list):
        def wait(self, count):
            while len(self) < count:
                assert came.wait(30)
                came.clear()

    found, came = Reports(), threading.Event()

    def report(text):
        found.append(text)
        came.set()
        raise BrokenPipeError  # as of a terminal that is gone: the watch goes on

    monkeypatch.setattr(watchdog, "print_report", report)
    return found


def test_each_stall_is_reported_once(reports):
    with Watch(None, 0.1, "process 3 of 8") as watching:
        watching.at(watchdog.SAVING, 4)
        reports.wait(1)
        watching.at(watchdog.COMPILING, 5)
        reports.wait(2)
        assert not watching._closed.wait(0.5)
    assert [re.sub(r" for \d+ s ", " for S s ", text) for text in reports] == [
        "process 3 of 8: saving a checkpoint for S s (step 4)",
        "process 3 of 8: compiling for S s (step 5)",
    ]
