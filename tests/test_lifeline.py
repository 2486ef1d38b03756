"""How processes meet, and hear of each other's end."""

import threading

import pytest

from experiments.launch import local
from flax_resnet import lifeline
from flax_resnet.errors import UserError


def coordinator():
    return f"localhost:{local.free_port()}"


def meeting(count, processes, timeout=10.0):
    """What ``meet`` gives or raises in each of some processes, here threads."""
    where, found = coordinator(), {}

    def one(process, of):
        try:
            found[process] = lifeline.meet(where, of, process, timeout)
        except UserError as error:
            found[process] = str(error)

    threads = [threading.Thread(target=one, args=[i, of]) for i, of in processes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_who_has_not_come_is_named():
    found = meeting(4, [(0, 4), (2, 4)], 1.0)
    assert "2 of 4 processes have not come to localhost:" in found[0]
    assert "in 1 s: 1, 3" in found[0]
    assert "in 1 s: 1, 3" in found[2]


def test_processes_that_disagree_about_how_many():
    found = meeting(2, [(0, 2), (1, 3)])
    assert found[0] == found[1] == "process 1 says that there are 3 processes, and process 0 2"


def test_a_failure_passes_through_process_0_to_all():
    found = meeting(3, [(0, 3), (1, 3), (2, 3)])
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
    found = meeting(2, [(0, 2), (1, 2)])
    said = []
    other = lifeline.Lifeline(found[0], 0, 30, lambda *what: said.append(what))
    if leaves:
        found[1][0].tell(left=True)
    found[1][0].connection.close()
    other._thread.join(1)
    other.close()
    assert said == ([] if leaves else [("process 1 has died (its connection is closed)", 1)])


def test_silence_is_a_failure():
    found = meeting(2, [(0, 2), (1, 2)])
    said = []
    other = lifeline.Lifeline(found[1], 1, 0.5, lambda *what: said.append(what))
    other._thread.join(5)
    other.close()
    found[0][0].connection.close()
    assert said == [("process 0 has been silent for 0.5 s", 1)]
