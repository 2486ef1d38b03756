"""A trace of a few training steps, for TensorBoard and Perfetto."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

FIRST_STEPS = 5
"""Steps of a start that are not traced: buffers are allocated, input and queues fill."""
ANNOTATION = "train"
"""Marks each step for the tools, with its number among those traced."""

Step = Callable[..., Any]


@contextlib.contextmanager
def traced(step: Step, steps: int, directory: Path, say: Callable[[str], None]) -> Iterator[Step]:
    """The step to take instead of ``step``: it computes the same, and some calls are traced.

    The trace is of calls FIRST_STEPS + 1 to FIRST_STEPS + ``steps``, from the moment that
    the computation before them is done until theirs is, and of whatever the loop does between
    them. It ends with the context, if not before. One that cannot be made is said, and no more.

    Of several processes each traces into ``directory/processI``: the slow one, for which the
    others wait in a collective, is seldom the lead, and only traces side by side tell which it is.

    Args:
      step: takes and returns anything.
      steps: how many calls; with 0 ``step`` itself is yielded.
      directory: of the traces.
      say: told where the trace is, or why there is none.
    """
    if not steps:
        yield step
        return
    if jax.process_count() > 1:
        directory = directory / f"process{jax.process_index()}"
    trace = _Trace(step, steps, directory, say)
    try:
        yield trace
    finally:
        trace.end()


class _Trace:
    """A step that counts its calls and traces some of them."""

    def __init__(self, step: Step, steps: int, directory: Path, say: Callable[[str], None]):
        self._step, self._steps, self._directory, self._say = step, steps, directory, say
        self._calls = 0
        self._tracing = self._over = False

    def __call__(self, *arguments: Any) -> Any:
        self._calls += 1
        if self._calls == FIRST_STEPS + 1:
            self._begin(arguments)
        with jax.profiler.StepTraceAnnotation(ANNOTATION, step_num=self._calls - FIRST_STEPS):
            result = self._step(*arguments)
        if self._tracing and self._calls == FIRST_STEPS + self._steps:
            jax.block_until_ready(result)
            self.end()
        return result

    def _begin(self, arguments: Any) -> None:
        jax.block_until_ready(arguments)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # each Python call is an event, and a slow one
        try:
            jax.profiler.start_trace(self._directory, profiler_options=options)
        except (RuntimeError, OSError) as error:  # another trace of this process is under way
            self._over = True
            self._say(f"no profile: {error}")
        else:
            self._tracing = True

    def end(self) -> None:
        """Ends the trace and says where it is; after the first time nothing."""
        if self._over:
            return
        self._over = True
        if not self._tracing:
            self._say(
                f"no profile: this start ended at its step {self._calls}, and the first "
                f"{FIRST_STEPS} are not traced"
            )
            return
        self._tracing = False
        try:
            jax.profiler.stop_trace()
        except (RuntimeError, OSError) as error:
            self._say(f"no profile: {error}")
            return
        self._say(
            f"profile of {self._calls - FIRST_STEPS} steps in {self._directory}: tensorboard "
            f"--logdir {self._directory} (pip install tensorboard xprof), or open its "
            "plugins/profile/*/*.trace.json.gz in ui.perfetto.dev"
        )
