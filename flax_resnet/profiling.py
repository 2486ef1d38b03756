"""A trace of a few training steps, for TensorBoard and Perfetto.

``jax.profiler`` traces from one call to another. This module counts the steps of a run, leaves the
first ones out, and ends the trace when the run ends early.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

FIRST_STEPS = 5
"""Steps at the start that are not traced: buffers are allocated, input and queues fill."""
ANNOTATION = "train"
"""Name of the event that marks each step, with its number among the traced steps."""

Step = Callable[..., Any]


@contextlib.contextmanager
def traced(
    step: Step,
    steps: int,
    directory: Path,
    say: Callable[[str], None],
    steps_of: Callable[..., int] = lambda *arguments: 1,
) -> Iterator[Step]:
    """A step that computes what ``step`` does and traces some of its calls.

    The trace begins after the first FIRST_STEPS steps, when the computation before is done, and
    covers whole calls until ``steps`` steps are done or the context ends. Each of several processes
    traces into ``directory/processI``: the slow process, for which the others wait in a collective,
    is seldom process 0. A trace that cannot be made is one line, and training goes on.

    Args:
      step: takes and returns anything.
      steps: how many steps to trace; 0 yields ``step`` itself.
      directory: where the trace is written.
      say: receives one line: where the trace is, or why there is none.
      steps_of: number of steps of a call, from its arguments.
    """
    if not steps:
        yield step
        return
    if jax.process_count() > 1:
        directory = directory / f"process{jax.process_index()}"
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # each Python call would be an event, and a slow one
    done, first, tracing = 0, None, False

    def works(call: Callable[..., Any], *arguments: Any, **named: Any) -> bool:
        try:
            call(*arguments, **named)
        except (RuntimeError, OSError) as error:  # another trace is under way, or a full disk
            say(f"no profile: {error}")
            return False
        return True

    def end() -> None:
        nonlocal tracing
        tracing = False
        if works(jax.profiler.stop_trace):
            say(
                f"profile of {done - (first or 0)} steps in {directory}: tensorboard --logdir "
                f"{directory} (pip install tensorboard xprof), or open its "
                "plugins/profile/*/*.trace.json.gz in ui.perfetto.dev"
            )

    def traced_step(*arguments: Any) -> Any:
        nonlocal done, first, tracing
        if first is None and done >= FIRST_STEPS:
            first = done
            jax.block_until_ready(arguments)
            tracing = works(jax.profiler.start_trace, directory, profiler_options=options)
        number = done - (first or FIRST_STEPS) + 1
        done += steps_of(*arguments)
        with jax.profiler.StepTraceAnnotation(ANNOTATION, step_num=number):
            result = step(*arguments)
        if tracing and done - (first or 0) >= steps:
            jax.block_until_ready(result)
            end()
        return result

    try:
        yield traced_step
    finally:
        if tracing:
            end()
        elif first is None:
            say(
                f"no profile: this start ended at its step {done}, and the first {FIRST_STEPS} "
                "are not traced"
            )
