"""Several processes as one run: how they start together, agree, and end together."""

import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from experiments.launch import local
from flax_resnet import hosts
from flax_resnet.clusters import OURS, Cluster
from flax_resnet.errors import TryAgain, UserError
from flax_resnet.hosts import Hosts, find

WORKER = str(pathlib.Path(__file__).with_name("hosts_worker.py"))
PROMISED_SECONDS = 15
"""In which both of two processes end when one fails."""


def test_explicit_fields_win_over_the_environment():
    environ = dict(zip(OURS, ("a:1", "2", "0"), strict=True))
    assert find(Hosts("h:5", 3, 2), environ) == Cluster("h:5", 3, 2)
    assert find(Hosts("h:5", 1, 0), environ) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *[
            ({"coordinator": address, "num_processes": 3, "process_id": 0}, "expected HOST:PORT")
            for address in ("h", "h:x", ":5", "h:70000")
        ],
        *[
            ({name: -1}, f"hosts.{name}=-1: expected")
            for name in ("start_timeout", "heartbeat_timeout", "step_timeout", "num_processes")
        ],
    ],
)
def test_bad_input_is_one_line(fields, message):
    with pytest.raises(UserError, match=re.escape(message)):
        find(Hosts(**fields), {})


def test_one_process_has_nothing_to_do():
    with hosts.joined(Hosts()):
        hosts.check_alike({"config.seed": 1})
    with pytest.raises(ZeroDivisionError), hosts.joined(Hosts()):
        raise ZeroDivisionError
    assert hosts.watching().limit is None


def test_differences_are_named():
    first = {"config.seed": 0, "config.model.depth": 20, "code": "a", "x": 1, "y": None}
    second = {"config.seed": 0, "config.model.depth": 56, "code": "b", "x": 2, "z": 1}
    hosts._check_equal([first, first])
    with pytest.raises(UserError) as raised:
        hosts._check_equal([first, first, second])
    assert str(raised.value) == (
        "the processes differ: config.model.depth is 20 in process 0 and 56 in process 2; code is "
        "'a' in process 0 and 'b' in process 2; x is 1 in process 0 and 2 in process 2; and 2 "
        "more: start all with the same command, code and devices"
    )


def test_a_taken_port_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"localhost:{taken.getsockname()[1]}"
        with pytest.raises(TryAgain, match=f"cannot listen on {where} .Address already in use.:"):
            hosts.start(Hosts(where, 2, 0))


class Run:
    """Two worker processes under the launcher: what they printed, and how they ended.

    ``act`` is (process, signal), sent when both work. A stopped process goes on when the other has
    ended, or else the launcher would have to kill it.
    """

    def __init__(self, environ, capfd, *words, act=None):
        self.capfd, self.out, self.act = capfd, "", act
        command = [sys.executable, WORKER, *map(str, words)]
        settings = local.Settings(2, 1, grace=PROMISED_SECONDS)
        self.status = local.launch(command, settings, environ, self.started)
        self.thread.join()
        self.out += "".join(capfd.readouterr())

    def started(self, children):
        self.children = children
        self.thread = threading.Thread(target=self.send)
        self.thread.start()

    def running(self):
        time.sleep(0.05)
        return [i for i in (0, 1) if self.children[i].returncode is None]

    def send(self):
        if self.act is None:
            return
        while "[0] going" not in self.out and len(self.running()) == 2:
            self.out += "".join(self.capfd.readouterr())
        victim, number = self.act
        self.children[victim].send_signal(number)
        until = time.monotonic() + PROMISED_SECONDS
        while len(self.running()) == 2 and time.monotonic() < until:
            pass
        if number == signal.SIGSTOP:
            self.children[victim].send_signal(signal.SIGCONT)

    def lines(self, process):
        """What a process said of its end."""
        return re.findall(rf"^\[{process}\] (process {process} of .*)$", self.out, re.MULTILINE)


@pytest.fixture
def environ(clean_environment):
    return clean_environment | {"PYTHONPATH": str(pathlib.Path(WORKER).parents[1])}


@pytest.fixture
def start(environ, capfd):
    return lambda *words, **options: Run(environ, capfd, *words, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "status"),
    [(("end", 0), 0), (("preempted", 0), 75), (("late", 1, "--step-timeout", "20"), 0)],
)
def test_a_common_end(start, words, status):
    run = start(*words)
    assert run.status == status, run.out
    assert run.lines(0) == run.lines(1) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [0, 1])
def test_one_that_is_killed_or_stopped_ends_both_in_time(start, victim, number):
    run = start("run", -1, "--heartbeat-timeout", 5, act=(victim, number))
    assert run.status not in (0, 2, 75), run.out
    assert "still run" not in run.out  # what the launcher says when it has to end one


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "who", "status", "line"),
    [
        ("error", 0, 2, "error: lr=-1: expected 0 or more"),
        ("exception", 1, 1, "KeyError: 'lost'"),
    ],
)
def test_one_that_raises_ends_both_in_time(start, what, who, status, line):
    run = start(what, who)
    assert run.lines(who) == [f"process {who} of 2: {line}"], run.out
    assert run.status == status
    assert "still run" not in run.out
    assert (f"[{who}] Traceback" in run.out) == (what == "exception")


@pytest.mark.slow
def test_one_that_is_stuck_ends_both_and_says_where(start):
    run = start("stuck", 1, "--step-timeout", 3)
    assert re.search(r"\[1\] Timeout \(0:00:03\)!", run.out), run.out
    assert re.search(r"\[1\] +File .* in fail", run.out)
    assert run.status == 1
    assert "still run" not in run.out


@pytest.mark.slow
def test_differing_configs_are_named_in_one_line(start):
    run = start("differ", 0)
    assert run.status == 2, run.out
    for i, child in enumerate(run.children):
        assert child.returncode == 2
        (line,) = run.lines(i)
        assert "processes differ: config.seed is 0 in process 0 and 1 in process 1: start" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "status", "line"),
    [
        (("HERE", "2", "0"), 1, "process 0 of 2: error: not all processes have come to HERE in 2 "),
        (("HERE", "2", "1"), 1, "process 1 of 2: error: not all processes have come to HERE in 2 "),
        (("HERE", "2", "2"), 2, "error: jax.distributed does not start: process_id and num"),
        (("HERE",), 2, "error: jax.distributed does not start: Number of processes must be def"),
    ],
)
def test_processes_that_do_not_come_are_one_line(environ, variables, status, line):
    here = f"localhost:{local.free_port()}"
    environ |= {n: v.replace("HERE", here) for n, v in zip(OURS, variables, strict=False)}
    command = [sys.executable, WORKER, "end", "0", "--start-timeout", "2"]
    ran = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (status, "")
    assert re.fullmatch(line.replace("HERE", here) + ".*\n", ran.stderr)
