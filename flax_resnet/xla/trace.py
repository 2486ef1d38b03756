"""A trace of a few training steps, for TensorBoard and Perfetto."""

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
SAID = """profile of {0} steps in {1}: tensorboard --logdir {1} (pip install tensorboard xprof), \
or open its plugins/profile/*/*.trace.json.gz in ui.perfetto.dev"""

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

    The trace begins after FIRST_STEPS steps and covers whole calls until ``steps`` steps are done
    or the context ends. Each of several processes traces into ``directory/processI``.

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
    done, first, is_over = 0, None, False

    def traced_step(*arguments: Any) -> Any:
        nonlocal done, first, is_over
        if first is None and done >= FIRST_STEPS:
            first = done
            jax.block_until_ready(arguments)
            trace.callback(lambda: say(SAID.format(done - first, directory)))
            trace.enter_context(jax.profiler.trace(directory, profiler_options=options))
        with jax.profiler.StepTraceAnnotation(ANNOTATION, step_num=done - (first or 0) + 1):
            result = step(*arguments)
        done += steps_of(*arguments)
        if first is not None and not is_over and done - first >= steps:
            is_over = True
            jax.block_until_ready(result)
            trace.close()
        return result

    with contextlib.ExitStack() as trace:
        yield traced_step
    if first is None:
        say(f"no profile: the run ended at step {done}, and the first {FIRST_STEPS} are left out")
