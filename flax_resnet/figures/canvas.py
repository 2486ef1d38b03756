"""An empty figure, and its file. Nothing is shown, no setting of matplotlib is changed."""

from __future__ import annotations

import contextlib
import functools
import re
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flax_resnet.records.files import FULL, reason, replacing, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOTS_PER_INCH = 150
TITLE_SIZE = 10
SMALL = 7
# Characters of the small font that fit above a tile of one inch.
CHARACTERS_PER_INCH = 15


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches that keeps its texts apart."""
    # Half a second to import, at the end of a run and not at its start.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG, whole or not at all."""
    _choose_fonts(figure)
    with warnings.catch_warnings(), replacing(path) as partial:
        warnings.filterwarnings("ignore", "Glyph .* missing")  # _choose_fonts has said it
        figure.savefig(partial, format="png", dpi=DOTS_PER_INCH)


def _choose_fonts(figure: Figure) -> None:
    """Gives texts a font of this system for each character that matplotlib's default font lacks."""
    from matplotlib import font_manager
    from matplotlib.text import Text

    default = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    texts: Any = [t for t in figure.findobj(Text) if not t.get_text().isascii()]
    characters = {c for text in texts for c in text.get_text() if not c.isascii()}
    missing = {c for c in characters if not default.get_char_index(ord(c))}
    fonts = font_manager.findSystemFonts() if missing else []
    for path in sorted(fonts, key=lambda path: ("Regular" not in path, path)):
        with contextlib.suppress(RuntimeError, OSError):  # a damaged font
            font = font_manager.get_font(path)
            if drawn := {c for c in missing if font.get_char_index(ord(c))}:
                missing -= drawn
                font_manager.fontManager.addfont(path)
                for text in texts:
                    name = font_manager.fontManager.ttflist[-1].name
                    text.set_fontfamily([*text.get_fontfamily(), name])
    if missing:
        _say_boxes(" ".join(sorted(missing)[:20]))


@functools.cache
def _say_boxes(characters: str) -> None:
    print(
        f"boxes stand for {characters} in pictures: no font here has them; install one that does, "
        "such as Noto Sans CJK (Debian: fonts-noto-cjk)",
        file=sys.stderr,
    )


@contextlib.contextmanager
def failure_as_one_line(path: Path) -> Iterator[Path]:
    """Yields ``path`` to a picture. That it cannot be drawn is said, and ends only the block."""
    try:
        yield path
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        what = f"{type(error).__name__}: {reason(error)}"
        print(shown(f"{path} is not drawn ({what}); all else goes on"), file=sys.stderr)


def plain(text: str) -> str:
    """Text as it is, where matplotlib would read formulas between dollars."""
    return shown(text).replace("$", r"\$")


def short(text: str, most: int) -> str:
    """At most so many characters, the rest an ellipsis; plain."""
    text = shown(text)
    return plain(text if len(text) <= most else text[: most - 1] + "…")


def finish(figure: Figure, text: str, path: Path) -> None:
    """Gives a figure its title, broken where it is too wide, and writes it."""
    width = round(figure.get_figwidth() * 11.5)
    text = re.sub(r"\bn = (?=\d)", "n\u00a0=\u00a0", text)  # keeps together what belongs so
    lines = [line for part in text.split("\n") for line in textwrap.wrap(part, width)]
    figure.suptitle("\n".join(map(plain, lines)), fontsize=TITLE_SIZE)
    save(figure, path)


def tile(axes: Axes, image: Any, above: str = "", **options: Any) -> Any:
    """Draws an image without ticks; ``above`` is cut to the tile's width.

    Args:
      axes: where.
      image: (H, W) numbers, or (H, W, C) uint8 or shares, C 1, 3 or 4.
      above: a line of text over it, or several.
      **options: of imshow.
    """
    if image.ndim == 3 and image.shape[-1] == 1:
        image = image[..., 0]
        options = {"cmap": "gray", "vmin": 0, "vmax": 255, **options}
    drawn = axes.imshow(image, **{"interpolation": "nearest", **options})
    axes.set(xticks=[], yticks=[])
    if above:
        figure: Any = axes.get_figure(root=True)
        grid: Any = axes.get_subplotspec()
        inches = figure.get_figwidth() / grid.get_gridspec().ncols
        most = max(4, int(CHARACTERS_PER_INCH * inches))
        lines = [short(line, most) for line in above.split("\n")]
        axes.set_title("\n".join(lines), fontsize=SMALL, pad=3)
    return drawn


def grid_shape(count: int, columns: int) -> tuple[int, int]:
    """(rows, columns) that hold so many tiles."""
    return -(-count // min(count, columns)), min(count, columns)


def grid(figure: Figure, count: int, columns: int) -> list[Any]:
    """The axes of so many tiles, row by row; what is left of the last row stays empty."""
    axes = figure.subplots(*grid_shape(count, columns), squeeze=False).ravel()
    for empty in axes[count:]:
        empty.axis("off")
    return list(axes[:count])
