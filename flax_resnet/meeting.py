"""How the processes of a run meet: each comes to process 0, and keeps that connection.

It is on the coordinator's port, before JAX takes that; so what is wrong there is one line, where
JAX aborts the process with a C++ stack trace.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import selectors
import socket
import time
from typing import Any

from flax_resnet.clusters import LOOPBACK, address
from flax_resnet.errors import TryAgain, UserError

HELLO_SECONDS = 2.0
LONGEST = 2**16
"""Bytes of one message."""
HIGH = 800
"""File numbers of connections, where 1024 are allowed or more."""


class Peer:
    """One end of a connection; messages are lines of JSON."""

    def __init__(self, connection: socket.socket, process: int):
        self.connection, self.process = _raised(connection), process
        self.heard = time.monotonic()
        self.left = False
        """Whether it has said that it ends as it should."""
        self._rest = b""
        self.connection.settimeout(HELLO_SECONDS)
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def tell(self, **message: Any) -> None:
        """Sends a message; where it cannot be, reading will say why."""
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def read(self) -> list[dict[str, Any]] | None:
        """Messages that have come, once there is something to read; None at the end.

        What is no message of ours is an end too: whoever is there is no process of ours.
        """
        try:
            data = self.connection.recv(LONGEST)
        except OSError:
            return None
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        if not data or len(self._rest) > LONGEST:
            return None
        self.heard = time.monotonic()
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            return None
        return messages if all(map(_understood, messages)) else None

    def first(self, until: float) -> dict[str, Any] | None:
        """The first message, if it comes by ``until`` of time.monotonic."""
        while (left := until - time.monotonic()) > 0:
            self.connection.settimeout(left)
            if (messages := self.read()) is None:
                return None
            if messages:
                self.connection.settimeout(HELLO_SECONDS)
                return messages[0]
        return None


def _understood(message: Any) -> bool:
    """Whether it is a message, and if it is of a failure a whole one."""
    if not isinstance(message, dict):
        return False
    kinds = {"failed": str, "status": int, "by": int} if "failed" in message else {}
    return all(type(message.get(name)) is kind for name, kind in kinds.items())


def _raised(connection: socket.socket) -> socket.socket:
    """The same connection under a high number.

    Linux closes the files of a killed process from the highest down, and the others should see
    this one end before JAX's, at which they abort.
    """
    try:
        raised = fcntl.fcntl(connection.fileno(), fcntl.F_DUPFD_CLOEXEC, HIGH)
    except OSError:  # no such numbers are allowed
        return connection
    connection.close()
    return socket.socket(fileno=raised)


def meet(coordinator: str, count: int, process: int, timeout: float) -> list[Peer]:
    """Waits for all processes; the connections of this one: process 0 has all, others one.

    Args:
      coordinator: HOST:PORT; process 0 listens on its port until all have come.
      count: how many processes.
      process: which this is.
      timeout: seconds.

    Raises:
      UserError: the processes disagree about how many there are, or which one is which.
      TryAgain: the port is taken, or processes have not come.
    """
    until = time.monotonic() + timeout
    if process == 0:
        return _gather(coordinator, count, until, timeout)
    return [_reach(coordinator, count, process, until, timeout)]


def listen(coordinator: str) -> socket.socket:
    """Listens on the coordinator's port, where JAX does after: on all interfaces, or on loopback.

    Raises:
      TryAgain: it cannot be; JAX would end with a segmentation fault.
    """
    host, port = address(coordinator)
    inside = LOOPBACK.get(host, "")
    dual = not inside and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual or ":" in inside else socket.AF_INET
    try:
        return socket.create_server(
            (inside, port), family=family, backlog=1024, dualstack_ipv6=dual, reuse_port=False
        )
    except OSError as error:
        used = error.errno == errno.EADDRINUSE
        what = "address in use" if used else error.strerror or str(error)
        raise TryAgain(
            f"process 0 cannot listen on {coordinator} ({what}): another run may have it; "
            "give all processes another port"
        ) from None


def _gather(coordinator: str, count: int, until: float, timeout: float) -> list[Peer]:
    found: dict[int, Peer] = {}
    with listen(coordinator) as server, selectors.DefaultSelector() as readable:
        server.setblocking(False)
        readable.register(server, selectors.EVENT_READ)
        while len(found) < count - 1 and (left := until - time.monotonic()) > 0:
            for key, _ in readable.select(left):
                if key.data is None:
                    with contextlib.suppress(OSError):  # it has gone again
                        peer = Peer(server.accept()[0], -1)
                        readable.register(peer.connection, selectors.EVENT_READ, peer)
                elif (messages := key.data.read()) != []:
                    readable.unregister(key.data.connection)
                    try:
                        _take(key.data, (messages or [{}])[0], count, found)
                    except UserError as wrong:
                        _refuse([*found.values(), key.data], wrong)
                        raise
        for key in readable.get_map().values():
            if key.data is not None:
                key.data.connection.close()  # it has said nothing
    if missing := [str(i) for i in range(1, count) if i not in found]:
        late = TryAgain(
            f"{len(missing)} of {count} processes have not come to {coordinator} in "
            f"{timeout:g} s: {', '.join(missing[:10])}{', ...' if len(missing) > 10 else ''}; see "
            "what they say, or wait longer by --hosts.start-timeout"
        )
        _refuse(list(found.values()), late)
        raise late
    for peer in found.values():
        peer.tell(go=True)
    return [found[i] for i in sorted(found)]


def _take(peer: Peer, hello: dict[str, Any], count: int, found: dict[int, Peer]) -> None:
    """Adds a process that has come; in the place of one that had, and is gone.

    Raises:
      UserError: what it says of itself does not fit.
    """
    process, of = hello.get("process"), hello.get("of")
    if type(process) is not int or type(of) is not int or process < 0:
        peer.connection.close()  # no process of ours
        return
    if of != count:
        raise UserError(
            f"process {process} says that there are {of} processes, and process 0 {count}"
        )
    if process >= count:
        raise UserError(f"process {process} has come, of {count}: expected 1 to {count - 1}")
    if process == 0 or (process in found and not _gone(found[process])):
        raise UserError(f"two processes say that they are process {process} of {count}")
    if process in found:
        found[process].connection.close()
    peer.process, found[process] = process, peer


def _gone(peer: Peer) -> bool:
    """Whether a process that waits for an answer, and says nothing, has closed its connection."""
    peer.connection.setblocking(False)
    try:
        return not peer.connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        peer.connection.settimeout(HELLO_SECONDS)


def _refuse(peers: list[Peer], why: UserError) -> None:
    for peer in peers:
        peer.tell(refused=str(why), again=isinstance(why, TryAgain))
        peer.connection.close()


def _reach(coordinator: str, count: int, process: int, until: float, timeout: float) -> Peer:
    why = "no answer"
    while (left := until - time.monotonic()) > 0:
        try:
            connection = socket.create_connection(address(coordinator), min(left, 10))
        except OSError as error:  # process 0 is not there yet, nor perhaps its name
            why = error.strerror or str(error)
            time.sleep(min(0.2, left))
            continue
        peer = Peer(connection, 0)
        peer.tell(process=process, of=count)
        answer = peer.first(until + HELLO_SECONDS)
        if answer is not None and "go" in answer:
            return peer
        peer.connection.close()
        if answer is not None and "refused" in answer:
            raise (TryAgain if answer.get("again") else UserError)(str(answer["refused"]))
        why = "it gave no answer"  # process 0 has ended, or it is no process of ours
        time.sleep(min(0.2, max(0, left)))
    raise TryAgain(
        f"no coordinator at {coordinator} after {timeout:g} s ({why}): is process 0 running "
        "there, and the port open?"
    )
