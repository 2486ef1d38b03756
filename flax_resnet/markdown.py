"""Texts from elsewhere as Markdown: they are shown as they are, whatever is in them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any


def plain(value: Any) -> str:
    """A text on one line, without what a terminal or an editor would act on."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(value).split()))


def text(value: Any) -> str:
    """A text that is no Markdown and no HTML: no links, no elements, no new cell of a table."""
    escaped = re.sub(r"([\\`*{}\[\]<>!|~&$#@])", r"\\\1", plain(value))
    escaped = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", escaped)
    # What GitHub's Markdown takes for an address without being told.
    return re.sub(r"(?<=[A-Za-z])(?=://)|(?<=www)(?=\.)", r"\\", escaped, flags=re.IGNORECASE)


def table(rows: Iterable[tuple[str, Any]]) -> str:
    """A table of two columns, without a head."""
    lines = [f"| {text(name)} | {text(value)} |" for name, value in rows]
    return "\n".join(["| | |", "| --- | --- |", *lines])


def fenced(code: str, language: str) -> str:
    """A block of code; what is within cannot end it."""
    code = "".join(c if c.isprintable() or c in "\n\t" else "?" for c in code)
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", code))])
    return f"{fence}{language}\n{code}\n{fence}"
