"""Several processes as one run: who there is, how they meet, agree, and end together."""

import dataclasses
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from test_clusters import SLURM
from test_meeting import coordinator

from experiments.launch import local
from flax_resnet import hosts, meeting
from flax_resnet.clusters import Cluster
from flax_resnet.errors import TryAgain, UserError
from flax_resnet.hosts import Hosts, find

WORKER = str(pathlib.Path(__file__).with_name("hosts_worker.py"))


def test_explicit_flags_go_before_the_environment():
    said = Hosts(coordinator="h:5", num_processes=3, process_id=2)
    assert find(said, SLURM) == Cluster("--hosts", "h:5", 3, 2)
    assert find(dataclasses.replace(said, num_processes=1, process_id=0), SLURM) is None
    with pytest.raises(UserError, match=r"--hosts\.num-processes and --hosts\.process-id miss"):
        find(Hosts(coordinator="h:5"), {})
    with pytest.raises(UserError, match="process 3 of 3"):
        find(dataclasses.replace(said, process_id=3), {})
    for address in ("h", "h:x", ":5", "h:70000"):
        with pytest.raises(UserError, match="expected HOST:PORT"):
            find(dataclasses.replace(said, coordinator=address), {})


@pytest.mark.parametrize(
    "field", ["start_timeout", "heartbeat_timeout", "step_timeout", "num_processes", "process_id"]
)
def test_numbers_are_checked(field):
    with pytest.raises(UserError, match=f"hosts.{field}=-1"):
        Hosts(**{field: -1})


def test_one_process_has_nothing_to_do():
    with hosts.joined(Hosts()):
        hosts.check_alike({"config": 1})
    with pytest.raises(ZeroDivisionError), hosts.joined(Hosts()):
        raise ZeroDivisionError
    assert hosts.watching().limit is None


def test_differences_are_named():
    first = {"config": {"seed": 0, "model": {"depth": 20}}, "code": "a", "x": 1, "y": 1}
    second = {"config": {"seed": 0, "model": {"depth": 56}}, "code": "b", "x": 2, "z": 1}
    flat = [hosts._flat(first), hosts._flat(first), hosts._flat(second)]
    hosts._check_equal(flat[:2])
    with pytest.raises(UserError) as raised:
        hosts._check_equal(flat)
    assert str(raised.value) == (
        "the processes differ: config.model.depth is 20 in process 0 and 56 in process 2; code is "
        "'a' in process 0 and 'b' in process 2; x is 1 in process 0 and 2 in process 2; and 2 "
        "more: start all with the same command, code and devices"
    )


def test_a_taken_port_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"localhost:{taken.getsockname()[1]}"
        said = Hosts(coordinator=where, num_processes=2, process_id=0)
        with pytest.raises(TryAgain, match=f"cannot listen on {where} .address in use.: another"):
            hosts.start(said)
        # A program that listens and is no coordinator.
        with pytest.raises(TryAgain, match=r"no coordinator at .* after 0\.5 s"):
            meeting.meet(where, 2, 1, 0.5)


def test_a_missing_coordinator_is_one_line():
    said = Hosts(coordinator=coordinator(), num_processes=2, process_id=1, start_timeout=0.5)
    with pytest.raises(TryAgain, match=r"no coordinator at .* after 0.5 s \(Connection refused"):
        hosts.start(said)


class Run:
    """Worker processes under the launcher: what they said, how they ended and when."""

    def __init__(self, environ, capfd, *words, processes=2, act=None):
        self.ended, self.acted = {}, None
        self.capfd, self.out = capfd, ""
        settings = local.Settings(processes, 1, grace=15)
        self.act = act
        command = [sys.executable, WORKER, *map(str, words)]
        self.status = local.launch(command, settings, environ, self.started)
        self.watcher.join(10)
        self.out += "".join(capfd.readouterr())

    def started(self, children):
        self.children = children
        self.watcher = threading.Thread(target=self.watch)
        self.watcher.start()

    def watch(self):
        """Waits until they work, acts, and notes when each ends."""
        while self.act and "[0] going" not in self.out:
            self.out += "".join(self.capfd.readouterr())
            if all(child.returncode is not None for child in self.children):
                return
            time.sleep(0.05)
        if self.act:
            victim, number = self.act
            self.children[victim].send_signal(number)
        self.acted = time.monotonic()
        while len(self.ended) < len(self.children):
            for i, child in enumerate(self.children):
                if child.returncode is not None and i not in self.ended:
                    self.ended[i] = time.monotonic() - self.acted
            if self.act and self.act[1] == signal.SIGSTOP and len(self.ended) == 1:
                self.children[self.act[0]].send_signal(signal.SIGCONT)
            time.sleep(0.02)

    def lines(self, process):
        """What a process said of its end."""
        return re.findall(rf"^\[{process}\] (process {process} of .*)$", self.out, re.MULTILINE)


@pytest.fixture
def start(clean_environment, capfd):
    environ = clean_environment | {"PYTHONPATH": str(pathlib.Path(WORKER).parents[1])}
    return lambda *words, **options: Run(environ, capfd, *words, **options)


@pytest.mark.slow
@pytest.mark.parametrize(("what", "status"), [("end", 0), ("preempted", 75)])
def test_a_common_end(start, what, status):
    run = start(what, 0)
    assert run.status == status, run.out
    assert run.lines(0) == run.lines(1) == []


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
def test_one_that_finishes_late_is_waited_for(start, who):
    run = start("late", who, "--step-timeout", 20)
    assert run.status == 0, run.out
    run = start("late", who, "--step-timeout", 2)
    assert run.status == 1, run.out
    said = f"has finished; for 2 s process {who} has not"
    assert run.lines(1 - who) == [f"process {1 - who} of 2: {said}"]
    line = f"process {who} of 2: ends, since process {1 - who} has failed: {said}"
    assert run.lines(who) == [line]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["run", "idle"])
@pytest.mark.parametrize("victim", [0, 1])
def test_killing_one_ends_the_other(start, victim, what):
    other = 1 - victim
    run = start(what, -1, "--heartbeat-timeout", 6, act=(victim, signal.SIGKILL))
    line = f"process {other} of 2: ends, since process {victim} has died"
    assert run.lines(other) == [f"{line} (its connection is closed)"], run.out
    assert run.ended[other] < 5, run.ended
    assert run.status in (1, 137)


@pytest.mark.slow
def test_killing_one_of_three_ends_the_others(start):
    run = start("run", -1, processes=3, act=(2, signal.SIGKILL))
    for other in (0, 1):
        line = f"process {other} of 3: ends, since process 2 has died (its connection is closed)"
        assert run.lines(other) == [line], run.out
    assert max(run.ended.values()) < 8, run.ended


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_process_ends_the_other(start, victim):
    other = 1 - victim
    run = start("run", -1, "--heartbeat-timeout", 4, act=(victim, signal.SIGSTOP))
    line = f"process {other} of 2: ends, since process {victim} has been silent for 4 s"
    assert run.lines(other) == [line], run.out
    assert 2 < run.ended[other] < 8, run.ended


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
def test_a_stuck_process_ends_all(start, who):
    run = start("stuck", who, "--step-timeout", 3, "--heartbeat-timeout", 30)
    stuck = "stuck for 3 s waiting for data after step 3: ends, so that the others do too"
    assert run.lines(who)[-1] == f"process {who} of 2: {stuck}", run.out
    line = f"process {1 - who} of 2: ends, since process {who} has failed: {stuck}"
    assert run.lines(1 - who) == [line]
    assert "in _fail" in run.out
    assert run.status == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "who", "status", "said"),
    [
        ("error", 0, 2, "error: lr=-1: expected 0 or more"),
        ("error", 1, 2, "error: lr=-1: expected 0 or more"),
        ("exception", 1, 1, "KeyError: 'lost'"),
        ("exit", 0, 3, "ends with status 3"),
    ],
)
def test_an_error_in_one_ends_the_other(start, what, who, status, said):
    run = start(what, who)
    assert run.lines(who) == [f"process {who} of 2: {said}"], run.out
    line = f"process {1 - who} of 2: ends, since process {who} has failed: {said}"
    assert run.lines(1 - who) == [line]
    assert run.status == status
    assert ("Traceback" in run.out) == (what == "exception")


@pytest.mark.slow
def test_differing_configs_are_named(start):
    run = start("differ", 0)
    said = "error: the processes differ: config.seed is 0 in process 0 and 1 in process 1: start"
    assert run.status == 2, run.out
    for i in (0, 1):
        assert len(run.lines(i)) == 1
        assert said in run.lines(i)[0]


@pytest.mark.slow
def test_a_process_that_never_comes(clean_environment):
    environ = clean_environment | dict(zip(local.OURS, (coordinator(), "2", "0"), strict=True))
    environ |= {"PYTHONPATH": str(pathlib.Path(WORKER).parents[1])}
    command = [sys.executable, "-W", "error", WORKER, "end", "0", "--start-timeout", "2"]
    ran = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (TryAgain.status, "")
    assert re.fullmatch(r"error: 1 of 2 processes have not come to \S+ in 2 s: 1; .*\n", ran.stderr)
    assert os.environ.get(local.OURS[0]) is None
