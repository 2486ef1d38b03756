"""Several processes as one run: how they start together, agree, and end together."""

import pathlib
import re
import signal
import socket
import subprocess
import sys

import processes
import pytest

from experiments.launch import local
from flax_resnet.distributed import hosts
from flax_resnet.distributed.hosts import OURS, Hosts, find
from flax_resnet.errors import TryAgain, UserError

WORKER = str(pathlib.Path(__file__).parents[1] / "support" / "hosts_worker.py")


def test_explicit_fields_win_over_the_environment():
    environ = dict(zip(OURS, ("a:1", "2", "0"), strict=True))
    assert find(Hosts("h:5", 3, 2), environ) == ("h:5", 3, 2, ())
    assert find(Hosts("h:5", 1, 0), environ) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"coordinator": "h", "num_processes": 3, "process_id": 0}, "'h': expected HOST:PORT"),
        ({"coordinator": "h:x", "num_processes": 3, "process_id": 0}, "'h:x': expected HOST:PORT"),
        ({"num_processes": -1}, "JAX_NUM_PROCESSES='-1': expected a whole number"),
        ({"heartbeat_timeout": 0}, "hosts.heartbeat_timeout=0: expected more than 0"),
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


def test_a_taken_port_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"localhost:{taken.getsockname()[1]}"
        with pytest.raises(TryAgain, match=f"cannot listen on {where} .*Address already in use"):
            hosts._check_port(where)


@pytest.fixture
def environ(clean_environment):
    return clean_environment | {"PYTHONPATH": str(pathlib.Path(WORKER).parents[2])}


@pytest.fixture
def run(environ):
    """(what happens, in which process, flags) -> the processes' statuses, and what each printed.

    ``act`` is (process, signal), sent when both work.
    """

    def run(*words, act=None):
        children = processes.start([sys.executable, WORKER, *map(str, words)], environ)
        printed = ["", ""]
        for i, child in enumerate(children):
            while (line := child.stdout.readline()) not in ("going\n", ""):
                printed[i] += line
        if act is not None:
            victim, number = children[act[0]], act[1]
            victim.send_signal(number)
            children[1 - act[0]].wait(processes.PROMISED_SECONDS)
            if number == signal.SIGSTOP:
                victim.send_signal(signal.SIGCONT)
        ends = processes.ended(children)
        return [child.returncode for child in children], [
            a + b for a, b in zip(printed, ends, strict=True)
        ]

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "status"),
    [(("end", 0), 0), (("preempted", 0), 75), (("late", 1, "--step-timeout", "20"), 0)],
)
def test_a_common_end(run, words, status):
    statuses, printed = run(*words)
    assert statuses == [status, status], printed
    assert "process " not in "".join(printed)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [0, 1])
def test_one_that_is_killed_or_stopped_ends_both_in_time(run, victim, number):
    statuses, printed = run("run", -1, act=(victim, number))
    assert not {0, 2, 75} & set(statuses), printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "who", "status", "line"),
    [
        ("error", 0, 2, "error: lr=-1: expected 0 or more"),
        ("exception", 1, 1, "KeyError: 'lost'"),
    ],
)
def test_one_that_raises_ends_both_in_time(run, what, who, status, line):
    statuses, printed = run(what, who)
    assert statuses[who] == status
    assert statuses[1 - who] not in (0, 75)
    assert f"process {who} of 2: {line}\n" in printed[who]
    assert ("Traceback" in printed[who]) == (what == "exception")


@pytest.mark.slow
def test_one_that_is_stuck_ends_both_and_says_where(run):
    statuses, printed = run("stuck", 1, "--step-timeout", 3)
    assert re.search(r"Timeout \(0:00:03\)!\n(.*\n)* +File .* in fail", printed[1]), printed
    assert statuses[1] == 1
    assert statuses[0] not in (0, 75)


@pytest.mark.slow
def test_differing_configs_are_named_in_one_line(run):
    statuses, printed = run("differ", 0)
    assert statuses == [2, 2], printed
    for i, text in enumerate(printed):
        assert text.endswith(
            f"process {i} of 2: error: the processes differ: config.seed is 0 in process 0 and 1 "
            "in process 1; so do config.model: start all with the same command, code and devices\n"
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "status", "line"),
    [
        (("HERE", "2", "0"), 1, "process 0 of 2: error: not all processes have come to HERE in 2 "),
        (("HERE", "2", "1"), 1, "process 1 of 2: error: not all processes have come to HERE in 2 "),
        (("HERE", "2", "2"), 2, "process 2 of 2: error: jax.distributed does not start: process_i"),
        (("HERE",), 2, "process on .*: error: jax.distributed does not start: Number of processes"),
    ],
)
def test_processes_that_do_not_come_are_one_line(environ, variables, status, line):
    here = local.environments(local.Settings(1), environ)[0][OURS[0]]
    environ |= {n: v.replace("HERE", here) for n, v in zip(OURS, variables, strict=False)}
    command = [sys.executable, WORKER, "end", "0", "--start-timeout", "2"]
    ran = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (status, "")
    assert re.fullmatch(line.replace("HERE", here) + ".*\n", ran.stderr)
