import os
import signal
import subprocess
import sys
import threading

import pytest

from flax_resnet.distributed import preemption
from flax_resnet.distributed.preemption import Preempted, Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_question_and_the_handlers_come_back(number, capfd):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Signals() as signals:
        assert not signals()
        os.kill(os.getpid(), number)
        assert signals()
        assert signals()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert f"{number.name}: stops after this step, and saves" in capfd.readouterr().err


def test_a_second_ctrl_c_does_not_wait():
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_in_a_thread_nothing_is_taken_and_a_callable_is_asked():
    before = signal.getsignal(signal.SIGTERM)
    seen, answers = [], iter([False, True])

    def work():
        with Signals(lambda: next(answers)) as signals:
            seen.extend([signal.getsignal(signal.SIGTERM), signals(), signals()])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before, False, True]


def test_a_command_that_is_stopped_ends_with_75():
    with pytest.raises(SystemExit) as stop, preemption.restartable():
        raise Preempted
    assert stop.value.code == preemption.EXIT_PREEMPTED == 75


@pytest.mark.slow
def test_a_sigterm_in_a_compilation_ends_the_command_when_it_is_done(clean_environment):
    """Where an exception would pass through JAX's tracing, and take the process down with it."""
    program = """
import os, signal, threading, jax
from flax_resnet import models
from flax_resnet.distributed import preemption
net = models.create("resnet18")
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
with preemption.restartable():
    models.initialize(net, jax.random.key(0), jax.ShapeDtypeStruct((1, 64, 64, 3), "float32"))
    while True:
        jax.jit(lambda x: x + 1).lower(1.0).compile()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=clean_environment, capture_output=True, text=True
    )
    assert done.returncode == 75
    assert done.stderr == "SIGTERM outside of the training loop: stops, and nothing is lost\n"
    with preemption.restartable():
        pass
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt; a shell that starts the tests behind it has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_signal_that_came_too_late_for_a_run_is_not_lost():
    signals = Signals()
    with pytest.raises(KeyboardInterrupt), signals:
        os.kill(os.getpid(), signal.SIGINT)  # and the run is over without having asked
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals()


def test_with_several_processes_all_hear_of_a_stop_once_they_agree(monkeypatch):
    sent, agreed = [], iter([False, False, True])
    monkeypatch.setattr(preemption.jax, "process_count", lambda: 2)
    monkeypatch.setattr(preemption.os, "kill", lambda process, number: sent.append(number))
    points = preemption.multihost_utils
    monkeypatch.setattr(points, "reached_preemption_sync_point", lambda number: next(agreed))
    with Signals(lambda: True) as signals:
        assert [signals() for _ in range(5)] == [False, False, True, True, True]
    assert sent == [signal.SIGTERM]
