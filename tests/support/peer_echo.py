"""A worker of experiments.benchmarks.workers for its tests: does what its task says."""

import os
import sys

from experiments.benchmarks import workers


def build(task):
    print("noise on the standard output", flush=True)
    match task["do"]:
        case "fail":
            raise ValueError("two\nlines")
        case "miss":
            import no_such_framework  # noqa: F401
        case "kill":
            os.kill(os.getpid(), 9)
        case "hang":
            sys.stdin.read()

    def turn(steps):
        if steps > 3:
            raise RuntimeError("too many")
        return steps / 2

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    about = {"cores": cores, "xla_flags": os.environ.get("XLA_FLAGS")}
    return workers.Built(about, turn)
