"""What the readers of weight files share: texts of a file nobody vouches for, in messages."""

from __future__ import annotations

MAX_RANK = 8


def shown(value: object, length: int = 80) -> str:
    """``value`` from a file as it may stand in a message: short, one line, plain ASCII.

    A file's own text could otherwise fill the screen, or carry a terminal's control codes.
    """
    if isinstance(value, str):
        return ascii(value[:length]) + ("..." if len(value) > length else "")
    if value is None or isinstance(value, bool):
        return str(value)
    if isinstance(value, int):
        return str(value) if value.bit_length() <= 128 else "a number of more than 128 bits"
    return f"a {type(value).__name__}"
