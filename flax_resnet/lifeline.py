"""One connection from each process to process 0: who has died, and why.

JAX's runtime finds that out too, and then aborts the process with a C++ stack trace that names no
cause. So the processes keep the connections of their meeting: a process that ends says why, the
kernel closes the connection of one that is killed, and one that is stopped says nothing for too
long. JAX's heartbeats, with a longer time, are what is behind this.
"""

from __future__ import annotations

import contextlib
import selectors
import threading
import time
from collections.abc import Callable

from flax_resnet.meeting import LONGEST, Peer

POLL_SECONDS = 0.02
LAST_SECONDS = 2.0
"""How long process 0 waits for the others to go before it."""
KILLED = 1
"""Exit status of those whose other has died without a word."""


class Lifeline:
    """Watches the connections from a thread, and calls back when another process has failed."""

    def __init__(
        self, peers: list[Peer], process: int, silence: float, failed: Callable[[str, int], None]
    ):
        """Starts at once.

        Args:
          peers: as ``meeting.meet`` gives.
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
        try:
            self._watch()
        except Exception as error:  # without a lifeline the others' ends would go unseen
            what = f"the lifeline of process {self._process} has failed"
            self._fail(f"{what} ({type(error).__name__}: {error})", KILLED, self._process)

    def _watch(self) -> None:
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
                self._fail(message["failed"], message["status"] & 255, message["by"])
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
            with contextlib.suppress(Exception):  # this process has to end, whoever hears of it
                self._spread(what, status, by)
        self._failed(what, status)
