"""How processes meet, and who is no process of theirs."""

import json
import socket
import threading
import time

import pytest

from experiments.launch import local
from flax_resnet import meeting
from flax_resnet.errors import TryAgain, UserError


def coordinator():
    return f"localhost:{local.free_port()}"


def come(count, processes, timeout=10.0):
    """What ``meet`` gives or raises in each of some processes, here threads."""
    where, found = coordinator(), {}

    def one(process, of):
        try:
            found[process] = meeting.meet(where, of, process, timeout)
        except UserError as error:
            found[process] = str(error)

    threads = [threading.Thread(target=one, args=[i, of]) for i, of in processes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_who_has_not_come_is_named():
    found = come(4, [(0, 4), (2, 4)], 1.0)
    assert "2 of 4 processes have not come to localhost:" in found[0]
    assert "in 1 s: 1, 3" in found[0]
    assert "in 1 s: 1, 3" in found[2]


def test_processes_that_disagree_about_how_many():
    found = come(2, [(0, 2), (1, 3)])
    assert found[0] == found[1] == "process 1 says that there are 3 processes, and process 0 2"


@pytest.fixture
def gathering():
    """Process 0 of 3 as it waits: where, and what meet gives or raises once ``done``."""
    where, found = coordinator(), {}

    def gather():
        try:
            found["peers"] = meeting.meet(where, 3, 0, 10)
        except UserError as error:
            found["error"] = error

    thread = threading.Thread(target=gather)
    thread.start()
    yield where, found, thread
    thread.join(15)
    for peer in found.get("peers", ()):
        peer.connection.close()


def say(where, text):
    """A connection to process 0 on which something has been said."""
    host, port = where.split(":")
    for _ in range(100):
        try:
            connection = socket.create_connection((host, int(port)), 5)
            break
        except ConnectionRefusedError:
            time.sleep(0.02)
    connection.sendall(text if isinstance(text, bytes) else json.dumps(text).encode() + b"\n")
    return connection


def answer(connection):
    with connection, connection.makefile() as lines:
        return json.loads(lines.readline())


def test_a_process_that_comes_again_takes_its_own_place(gathering):
    where, found, thread = gathering
    say(where, {"process": 1, "of": 3}).close()
    again = say(where, {"process": 1, "of": 3})
    other = say(where, {"process": 2, "of": 3})
    thread.join(5)
    assert [peer.process for peer in found["peers"]] == [1, 2]
    assert answer(again) == answer(other) == {"go": True}


@pytest.mark.parametrize(
    ("process", "message"),
    [
        (1, "two processes say that they are process 1 of 3"),
        (0, "two processes say that they are process 0 of 3"),
        (3, "process 3 has come, of 3: expected 1 to 2"),
    ],
)
def test_a_number_that_does_not_fit(gathering, process, message):
    where, found, thread = gathering
    first = say(where, {"process": 1, "of": 3})
    time.sleep(0.1)
    second = say(where, {"process": process, "of": 3})
    thread.join(5)
    assert (str(found["error"]), found["error"].status) == (message, 2)
    assert answer(first) == answer(second) == {"refused": message, "again": False}


def test_strangers_hold_up_nothing(gathering):
    where, found, thread = gathering
    texts = [b"", b"GET / HTTP/1.1\r\n\r\n", b"{", b"[" * 60_000 + b"\n", [1], {"process": 1}]
    strangers = [say(where, text) for text in texts]
    began = time.monotonic()
    ours = [say(where, {"process": i, "of": 3}) for i in (2, 1)]
    thread.join(5)
    assert time.monotonic() - began < 1
    assert [peer.process for peer in found["peers"]] == [1, 2]
    for connection in (*strangers, *ours):
        connection.close()


@pytest.mark.parametrize(("host", "open_to"), [("localhost", "127.0.0.1"), ("there", None)])
def test_a_run_on_one_machine_listens_there_alone(host, open_to):
    with meeting.listen(f"{host}:{local.free_port()}") as server:
        assert (server.getsockname()[0] == "127.0.0.1") == (open_to is not None)


def test_what_another_try_may_mend_says_so():
    found = {}

    def one(process):
        with pytest.raises(TryAgain, match="1 of 3 processes have not come to") as raised:
            meeting.meet(where, 3, process, 0.5)
        found[process] = raised.value.status

    where = coordinator()
    threads = [threading.Thread(target=one, args=[i]) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: 1, 1: 1}
