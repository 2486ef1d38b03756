"""One connection from each process to process 0: who has not come, who has died, and why.

JAX's runtime finds these out too, and then aborts the process with a C++ stack trace that names no
cause. So the processes meet on the coordinator's port before JAX takes it, and keep that
connection: a process that ends says why, the kernel closes the connection of one that is killed,
and one that is stopped says nothing for too long. JAX's heartbeats, with a longer time, are what
is behind this.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from flax_resnet.clusters import address
from flax_resnet.errors import UserError

HELLO_SECONDS = 2.0
LONGEST = 2**16
"""Bytes of one message."""
HIGH = 800
"""File numbers of connections, where 1024 are allowed or more."""
POLL_SECONDS = 0.02
LAST_SECONDS = 2.0
"""How long process 0 waits for the others to go before it."""
KILLED = 1
"""Exit status of those whose other has died without a word."""


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
        """Messages that have come, once there is something to read; None at the end."""
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
        except ValueError:
            return None
        return [m for m in messages if isinstance(m, dict)]

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
      UserError: the port is taken, processes have not come, or they disagree about how many.
    """
    until = time.monotonic() + timeout
    if process == 0:
        return _gather(coordinator, count, until, timeout)
    return [_reach(coordinator, count, process, until, timeout)]


def listen(coordinator: str) -> socket.socket:
    """Listens on the coordinator's port, on all interfaces, as JAX does after.

    Raises:
      UserError: it cannot be; JAX would end with a segmentation fault.
    """
    port = address(coordinator)[1]
    try:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        return socket.create_server(
            ("", port), family=family, backlog=1024, dualstack_ipv6=dual, reuse_port=False
        )
    except OSError as error:
        what = "address in use" if error.errno == 98 else error.strerror or str(error)
        raise UserError(
            f"process 0 cannot listen on {coordinator} ({what}): another run may have it; "
            "give all processes another port"
        ) from None


def _gather(coordinator: str, count: int, until: float, timeout: float) -> list[Peer]:
    found: dict[int, Peer] = {}
    with listen(coordinator) as server:
        while len(found) < count - 1:
            server.settimeout(max(0.01, until - time.monotonic()))
            try:
                peer = Peer(server.accept()[0], -1)
            except TimeoutError:
                break
            hello = peer.first(min(until, time.monotonic() + HELLO_SECONDS)) or {}
            peer.process = hello.get("process", -1)
            if type(peer.process) is not int or peer.process < 0:
                peer.connection.close()  # no process of ours
                continue
            wrong = _wrong(peer.process, hello.get("of"), count, found)
            if wrong:
                _refuse([*found.values(), peer], wrong)
                raise UserError(wrong)
            found[peer.process] = peer
    if missing := [str(i) for i in range(1, count) if i not in found]:
        wrong = (
            f"{len(missing)} of {count} processes have not come to {coordinator} in "
            f"{timeout:g} s: {', '.join(missing[:10])}{', ...' if len(missing) > 10 else ''}"
        )
        _refuse(list(found.values()), wrong)
        raise UserError(f"{wrong}; see what they say, or wait longer by --hosts.start-timeout")
    for peer in found.values():
        peer.tell(go=True)
    return [found[i] for i in sorted(found)]


def _refuse(peers: list[Peer], why: str) -> None:
    for peer in peers:
        peer.tell(refused=why)
        peer.connection.close()


def _wrong(process: int, of: Any, count: int, found: dict[int, Peer]) -> str | None:
    """What does not fit about a process that has come."""
    if of != count:
        return f"process {process} says that there are {of} processes, and process 0 {count}"
    if process in found or not 0 < process < count:
        return f"two processes say that they are process {process} of {count}"
    return None


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
            raise UserError(str(answer["refused"]))
        why = "it gave no answer"  # process 0 has ended, or it is no process of ours
        time.sleep(min(0.2, max(0, left)))
    raise UserError(
        f"no coordinator at {coordinator} after {timeout:g} s ({why}): is process 0 running "
        "there, and the port open?"
    )


class Lifeline:
    """Watches the connections from a thread, and calls back when another process has failed."""

    def __init__(
        self, peers: list[Peer], process: int, silence: float, failed: Callable[[str, int], None]
    ):
        """Starts at once.

        Args:
          peers: as ``meet`` gives.
          process: which this is.
          silence: seconds after which a process that says nothing counts as dead.
          failed: gets what happened to the other and an exit status; called once, from a
            thread.
        """
        self._peers, self._process = peers, process
        self._silence, self._failed = silence, failed
        self._closed = threading.Event()
        self.failing = threading.Event()
        """Set when another has failed, before the callback."""
        for peer in peers:
            peer.heard = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="lifeline", daemon=True)
        self._thread.start()

    def last_words(self, what: str, status: int) -> None:
        """Tells the others that this process fails; see ``_spread`` for what process 0 does.

        Args:
          what: one line.
          status: its exit status, and theirs.
        """
        self._closed.set()
        text = f"process {self._process} has failed: {what[: LONGEST // 4]}"
        self._spread(text, status, self._process)

    def _spread(self, what: str, status: int, by: int) -> None:
        """Sends a failure to those this process knows, but to the one that it is about.

        Process 0 then waits until they have gone: JAX aborts a process that sees its end.
        """
        others = [peer for peer in self._peers if peer.process != by]
        for peer in others:
            peer.tell(failed=what, status=status, by=by)
        until = time.monotonic() + LAST_SECONDS
        for peer in others if self._process == 0 else ():
            while peer.first(until) is not None:
                pass

    def leave(self, timeout: float) -> list[int]:
        """Waits until all processes end as they should; goes on watching them.

        Args:
          timeout: seconds.

        Returns:
          Those that do not: of a process that is not process 0 that one, whoever it waits for.
        """
        if self._process != 0:
            self._peers[0].tell(left=True)
        until = time.monotonic() + timeout
        while waits := [peer.process for peer in self._peers if not peer.left]:
            if time.monotonic() > until:
                return waits
            time.sleep(POLL_SECONDS)
        if self._process == 0:
            for peer in self._peers:
                peer.tell(left=True)
        return []

    def close(self) -> None:
        """Ends the watching."""
        self._closed.set()
        self._thread.join(5)
        for peer in self._peers:
            peer.connection.close()

    def _run(self) -> None:
        every = min(5.0, self._silence / 4)
        with selectors.DefaultSelector() as readable:
            for peer in self._peers:
                readable.register(peer.connection, selectors.EVENT_READ, peer)
            told = looked = time.monotonic()
            while not self._closed.is_set():
                for key, _ in readable.select(min(every, 0.25)):
                    if not self._hear(key.data):
                        readable.unregister(key.fileobj)
                now = time.monotonic()
                if now - looked > self._silence / 2:  # this process was the one that stood still
                    for peer in self._peers:
                        peer.heard = now
                looked = now
                if now - told > every:
                    told = now
                    for peer in self._peers:
                        peer.tell()
                for peer in self._peers:
                    if not peer.left and now - peer.heard > self._silence:
                        self._died(peer, f"has been silent for {self._silence:g} s")

    def _hear(self, peer: Peer) -> bool:
        """Takes what a peer says; False at its end."""
        messages = peer.read()
        for message in messages or ():
            peer.left |= "left" in message
            if "failed" in message:
                self._fail(str(message["failed"]), int(message["status"]), int(message["by"]))
        if messages is None and not peer.left:
            self._died(peer, "has died (its connection is closed)")
        return messages is not None

    def _died(self, peer: Peer, how: str) -> None:
        self._fail(f"process {peer.process} {how}", KILLED, peer.process)

    def _fail(self, what: str, status: int, by: int) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        self.failing.set()
        if self._process == 0:
            self._spread(what, status, by)
        self._failed(what, status)
