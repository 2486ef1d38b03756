"""Writing a file whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path to write to; it takes ``path``'s place when the block ends without error."""
    partial = path.with_name(f"{path.name}.partial")
    yield partial
    partial.replace(path)
