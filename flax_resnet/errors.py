"""The one exception for bad input, and the search for the name that was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input from the person at the keyboard.

    The message is one line: the value, what was expected, what to do. The command line
    prints it without a traceback and exits with status 2; in Python it is a ValueError.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Returns ``" (did you mean 'x'?)"`` for the nearest option, or an empty string."""
    near = difflib.get_close_matches(name, list(options), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""
