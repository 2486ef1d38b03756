"""Exports a network: written beside its place, measured, and moved there when it is near enough."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from flax_resnet.classify import Classifier
from flax_resnet.convert import convert
from flax_resnet.errors import UserError, check_range
from flax_resnet.exporting import loader, stablehlo, to_onnx
from flax_resnet.exporting.loader import ABOUT, HASHED
from flax_resnet.exporting.source import Difference, Run, Source, in_float32, runner
from flax_resnet.exporting.stablehlo import PLATFORMS
from flax_resnet.pretrained import Pretrained, open_weights

TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written."""

    path: Path
    """The file or directory."""
    kind: str
    """Its format, in words."""
    num_bytes: int
    """Its size."""
    network: str
    """Name of the network."""
    difference: Difference
    """To the source."""
    by: str
    """What computed the export to measure that."""

    def __str__(self) -> str:
        """One line."""
        found = self.difference
        images = "1 image" if found.images == 1 else f"{found.images} images"
        sizes = " and ".join(map(str, found.batch_sizes))
        return (
            f"{self.network} written to {self.path}: {self.kind}, {self.num_bytes / 1e6:.1f} MB; "
            f"largest relative difference {found.largest:.1e} ({self.by}; {images}, batches of "
            f"{sizes})"
        )


def check_platforms(platforms: Sequence[str]) -> None:
    """Raises UserError unless ``platforms`` are some of PLATFORMS or "rocm", "cpu" among them."""
    known = (*PLATFORMS, "rocm")
    if not {"cpu"} <= set(platforms) <= set(known) or len(set(platforms)) != len(platforms):
        raise UserError(
            f"--platforms {' '.join(platforms)}: expected some of {', '.join(known)}, each once, "
            "and cpu among them, where the export is checked"
        )


def check_dest(dest: Path, overwrite: bool) -> None:
    """Raises UserError where an export cannot, or must not, take that place."""
    is_file = dest.suffix in (".onnx", ".safetensors")
    if re.fullmatch(r"\.([A-Za-z]+|hd?f?5)", dest.suffix) and not is_file:
        raise UserError(
            f"{dest}: expected a name that ends in .onnx or .safetensors, or a directory's, for "
            "StableHLO; `convert` writes .weights.h5"
        )
    if not dest.exists():
        return
    if is_file and dest.is_dir():
        raise UserError(f"{dest} is a directory: name a file")
    if not overwrite:
        raise UserError(f"{dest} is there already: give another name, or --overwrite")
    if not is_file and not all((dest / name).is_file() for name in (ABOUT, *HASHED)):
        raise UserError(f"{dest} is no exported network, and is not overwritten: give another name")


def export(
    opened: Pretrained,
    dest: Path,
    *,
    images: Sequence[str | Path] = (),
    platforms: Sequence[str] = PLATFORMS,
    tolerance: float = TOLERANCE,
    overwrite: bool = False,
) -> Exported:
    """Exports an opened network; arguments and errors are those of ``flax_resnet.export``."""
    check_platforms(platforms)
    check_range("tolerance", tolerance, 0)
    check_dest(dest, overwrite)
    with _on_cpu(), _in_place(dest) as partial:
        source = Source.of(opened, images)
        kind, by, found = _written(source, partial, platforms)
        if not found.largest <= tolerance:
            raise UserError(
                f"the export is not the network: its outputs differ by {found.largest:.1e} of the "
                f"largest ({by}), more than {tolerance:g}; nothing was written, --tolerance allows "
                "more"
            )
        files = [partial] if partial.is_file() else list(partial.iterdir())
        size = sum(file.stat().st_size for file in files)
    return Exported(dest, kind, size, source.name, found, by)


def _written(
    source: Source, partial: Path, platforms: Sequence[str]
) -> tuple[str, str, Difference]:
    """(What it is, what it was measured by, the difference)."""
    run: Run
    if partial.suffix == ".onnx":
        kind = to_onnx.write(source, partial)
        run, by = to_onnx.run(partial)
    elif partial.suffix == ".safetensors":
        convert(source.opened, partial)
        kind, by = "safetensors with torchvision's names", "read back"
        run = runner(Classifier.of(in_float32(open_weights(partial))))
    else:
        kind = stablehlo.write(source, partial, platforms)
        run, by = loader.load(partial), f"its loader, jax {jax.__version__}"
    found = source.difference(run)
    if partial.is_dir():
        stablehlo.finish(partial, found)
    return kind, by, found


@contextlib.contextmanager
def _on_cpu() -> Iterator[None]:
    """Computes on the CPU: accelerators multiply float32 less precisely, each in its own way."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise UserError(
            "exports are checked on the CPU, and $JAX_PLATFORMS leaves it out: add cpu to it"
        ) from error
    with jax.default_device(device):
        yield


@contextlib.contextmanager
def _in_place(dest: Path) -> Iterator[Path]:
    """Yields a path of the same name; it takes the place of ``dest`` if the block ends well."""
    try:
        with tempfile.TemporaryDirectory(
            prefix=f".{dest.name}.", suffix=".partial", dir=dest.parent
        ) as room:
            partial, old = Path(room) / dest.name, Path(room) / "old"
            yield partial
            if dest.is_dir():
                dest.rename(old)
            try:
                partial.replace(dest)
            except BaseException:
                if old.exists():
                    old.rename(dest)
                raise
    except OSError as error:
        why = error.strerror or error  # not the name of the unfinished one
        raise UserError(f"{dest} cannot be written: {why}") from error
