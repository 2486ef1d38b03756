"""A process of several, for test_hosts: joins, does small collectives, and fails as it is told.

python tests/hosts_worker.py WHAT WHO [flags of Hosts]: WHAT happens in process WHO.
"""

import os
import sys
import time

import jax
import numpy as np
import tyro
from jax.experimental import multihost_utils

from flax_resnet import hosts, watch
from flax_resnet.errors import UserError
from flax_resnet.main import one_line_errors


def work(what: str, who: int, seconds: float = 40) -> None:
    """Steps of one collective each; after a few of them WHAT happens."""
    this = jax.process_index()
    facts = {"config": {"seed": this if what == "differ" else 0, "model": {"depth": 20}}}
    hosts.check_alike(facts)
    until = time.monotonic() + (3 if what in ("end", "late", "preempted") else seconds)
    with hosts.watching() as watching:
        step = 0
        while time.monotonic() < until:
            watching.at(watch.WAITING, step)
            if step == 3 and this == who:
                _fail(what)
            if step == 3 and what in ("end", "late"):
                break
            if step == 3 and what == "preempted":
                sys.exit(75)
            if what in ("idle", "none-collective"):
                time.sleep(0.05)
            watching.at(watch.STEP, step)
            if what != "idle":
                multihost_utils.process_allgather(np.int32(step))
            step += 1
            if step == 5 and this == 0:
                print("going", flush=True)
    if what == "late" and this == who:
        time.sleep(4)
    print(f"ended at step {step}", flush=True)


def _fail(what: str) -> None:
    if what == "error":
        raise UserError("lr=-1: expected 0 or more")
    if what == "exception":
        raise KeyError("lost")
    if what == "stuck":
        time.sleep(60)
    if what == "kill":
        os.kill(os.getpid(), 9)
    if what == "exit":
        sys.exit(3)


if __name__ == "__main__":
    chosen = tyro.cli(hosts.Hosts, args=sys.argv[3:])
    with one_line_errors(), hosts.joined(chosen):
        work(sys.argv[1], int(sys.argv[2]))
