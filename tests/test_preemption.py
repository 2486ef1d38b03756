import contextlib
import io
import os
import signal
import threading

import pytest

from flax_resnet import preemption
from flax_resnet.preemption import Preempted, Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_question_and_the_handlers_come_back(number, capfd):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Signals() as signals:
        assert not signals()
        os.kill(os.getpid(), number)
        assert signals()
        assert signals()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert f"{number.name}: saves a checkpoint and stops" in capfd.readouterr().err


def test_a_second_ctrl_c_does_not_wait():
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_callable_is_asked_too():
    answers = iter([False, True])
    with Signals(lambda: next(answers)) as signals:
        assert [signals(), signals()] == [False, True]


def test_in_a_thread_nothing_is_taken():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with Signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_command_that_is_stopped_ends_with_75():
    with pytest.raises(SystemExit) as stop, preemption.restartable():
        raise Preempted
    assert stop.value.code == preemption.EXIT_PREEMPTED == 75


def test_a_sigterm_before_the_loop_ends_the_command_too():
    with pytest.raises(SystemExit) as stop, preemption.restartable():
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.value.code == 75
    with contextlib.redirect_stderr(io.StringIO()), preemption.restartable():
        pass
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
