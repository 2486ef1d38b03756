"""How processes hear of each other's end."""

import json
import threading

import pytest
from test_meeting import come

from flax_resnet import lifeline


def test_a_failure_passes_through_process_0_to_all():
    found = come(3, [(0, 3), (1, 3), (2, 3)])
    said, arrived = {}, threading.Semaphore(0)

    def failed(process):
        def take(*what):
            said[process] = what
            for peer in found[process]:  # as the end of the process does
                peer.connection.close()
            arrived.release()

        return take

    lines = {i: lifeline.Lifeline(found[i], i, 30, failed(i)) for i in range(3)}
    lines[2].last_words("error: no", 2)
    assert arrived.acquire(timeout=10)
    assert arrived.acquire(timeout=10)
    assert said == dict.fromkeys((0, 1), ("process 2 has failed: error: no", 2))
    for one in lines.values():
        one.close()


@pytest.mark.parametrize("leaves", [True, False])
def test_an_end_as_it_should_be_is_no_failure(leaves):
    found = come(2, [(0, 2), (1, 2)])
    said = []
    other = lifeline.Lifeline(found[0], 0, 30, lambda *what: said.append(what))
    if leaves:
        found[1][0].tell(left=True)
    found[1][0].connection.close()
    other._thread.join(1)
    other.close()
    assert said == ([] if leaves else [("process 1 has died (its connection is closed)", 1)])


def test_silence_is_a_failure():
    found = come(2, [(0, 2), (1, 2)])
    said = []
    other = lifeline.Lifeline(found[1], 1, 0.5, lambda *what: said.append(what))
    other._thread.join(5)
    other.close()
    found[0][0].connection.close()
    assert said == [("process 0 has been silent for 0.5 s", 1)]


@pytest.mark.parametrize(
    "said",
    [
        b"\xff\xfe",
        b"[" * 60_000,
        b"1" * 5000,
        b"[1]",
        b'{"failed": "x"}',
        b'{"failed": "x", "status": "2", "by": 1}',
        b'{"failed": ["x"], "status": 2, "by": 1}',
    ],
)
def test_what_no_process_says_is_an_end(said):
    found, told = come(2, [(0, 2), (1, 2)]), []
    other = lifeline.Lifeline(found[0], 0, 30, lambda *what: told.append(what))
    found[1][0].connection.sendall(said + b"\n")
    other._thread.join(5)
    found[1][0].connection.close()
    other.close()
    assert told == [("process 1 has died (its connection is closed)", 1)]


def test_a_status_is_one():
    found, told = come(2, [(0, 2), (1, 2)]), []
    other = lifeline.Lifeline(found[1], 1, 30, lambda *what: told.append(what))
    message = {"failed": "x", "status": 2**70 + 3, "by": 0}
    found[0][0].connection.sendall(json.dumps(message).encode() + b"\n")
    other._thread.join(5)
    other.close()
    found[0][0].connection.close()
    assert told == [("x", 3)]


def test_a_lifeline_that_breaks_says_so():
    found, told = come(2, [(0, 2), (1, 2)]), []

    def broken():
        raise RuntimeError("odd")

    found[0][0].read = broken
    other = lifeline.Lifeline(found[0], 0, 30, lambda *what: told.append(what))
    found[1][0].tell()
    other._thread.join(5)
    # Others hear of it; and not being able to tell them keeps nothing from ending.
    assert told == [("the lifeline of process 0 has failed (RuntimeError: odd)", 1)]
    found[1][0].connection.close()
    other.close()
