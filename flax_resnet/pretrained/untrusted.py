"""What the readers of weight files share: errors about a file nobody vouches for."""

from __future__ import annotations

from pathlib import Path

from flax_resnet.errors import UserError

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


def damaged(path: Path, what: str) -> UserError:
    """The error for a file that breaks the rules of its own format."""
    return UserError(f"{path} is damaged: {what}; download or export it again")


def too_much(path: Path, what: str) -> UserError:
    """The error for a file that asks for more than weights can need."""
    return UserError(f"{path} is not read, to be safe: {what}; check where it comes from")
