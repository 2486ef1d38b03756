"""A trained network with its preprocessing, for use elsewhere: StableHLO, ONNX, safetensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flax_resnet.exporting.write import Exported
    from flax_resnet.pretrained import Pretrained


def export(
    source: str | Path | Pretrained,
    dest: str | Path,
    *,
    images: Sequence[str | Path] = (),
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    tolerance: float = 1e-4,
    overwrite: bool = False,
) -> Exported:
    """Writes a network with its preprocessing, having measured that it computes the same.

    It is written whole or not at all, in float32, and takes uint8 images as its preprocessing gives
    them (safetensors has the weights alone, and the rest in its metadata).

    Args:
      source: a run's working directory, a weight file, or what ``classify.open_network`` gives.
      dest: ends in ".onnx" (needs the [onnx] extra) or ".safetensors" (as ``convert`` writes it);
        else a directory for StableHLO, with a ``load.py`` that needs jax and flatbuffers.
      images: photographs, or folders of them, to measure the difference on; by default
        scikit-learn's two. Each is used in five forms: as it is, mirrored and inverted.
      platforms: of StableHLO; "cpu" is one of them.
      tolerance: largest difference of the outputs, as a share of the largest output.
      overwrite: replace an export that is there.

    Returns:
      What was written, and the difference that was measured; as a text, one line.

    Raises:
      UserError: weights that cannot be had or cannot classify, a place that cannot be written, a
        package that is missing, or a larger difference.
    """
    from flax_resnet.classify import open_network  # these imports take time
    from flax_resnet.exporting import write

    opened = open_network(source) if isinstance(source, (str, Path)) else source
    return write.export(opened, Path(dest).expanduser(), images, platforms, tolerance, overwrite)
