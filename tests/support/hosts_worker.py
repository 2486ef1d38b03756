"""A process of several, for test_hosts: joins, does small collectives, and fails as it is told.

python tests/support/hosts_worker.py WHAT WHO [flags of Hosts]: WHAT happens in process WHO.
"""

import sys
import time

import jax
import numpy as np
import tyro
from jax.experimental import multihost_utils

from flax_resnet.cli.experiment import one_line_errors
from flax_resnet.distributed import hosts, watchdog
from flax_resnet.errors import UserError


def work(what: str, who: int) -> None:
    """Steps of one collective each, for a minute at most; WHAT happens after three of them."""
    this = jax.process_index()
    seed = this if what == "differ" else 0
    hosts.check_alike({"config.seed": seed, "config.model": f"resnet{seed}"})
    with hosts.watching() as watching:
        for step in range(1200):
            watching.at(watchdog.WAITING, step)
            if step == 3:
                print("going", flush=True)
                if this == who:
                    fail(what)
                if what == "preempted":
                    sys.exit(75)
                if what in ("end", "late"):
                    return
            watching.at(watchdog.STEP, step)
            multihost_utils.process_allgather(np.int32(step))
            time.sleep(0.05)


def fail(what: str) -> None:
    if what == "error":
        raise UserError("lr=-1: expected 0 or more")
    if what == "exception":
        raise KeyError("lost")
    if what in ("stuck", "late"):
        time.sleep(60 if what == "stuck" else 4)


if __name__ == "__main__":
    chosen = tyro.cli(hosts.Hosts, args=sys.argv[3:])
    with one_line_errors(), hosts.joined(chosen):
        work(sys.argv[1], int(sys.argv[2]))
