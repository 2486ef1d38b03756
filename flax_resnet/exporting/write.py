"""Exports a network: written beside its place, measured, and moved there when it is near enough."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_resnet import cpu
from flax_resnet.augment import normalize
from flax_resnet.classify import Classifier, not_finite
from flax_resnet.convert import convert
from flax_resnet.errors import UserError, check_range
from flax_resnet.exporting import loader, source, to_onnx
from flax_resnet.exporting.loader import ABOUT, ARTIFACT, FORMAT, WEIGHTS
from flax_resnet.pretrained import Pretrained, open_weights
from flax_resnet.record import to_record

PLATFORMS = ("cpu", "cuda", "tpu")


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written; as a text, one line."""

    path: Path
    """The file or directory."""
    kind: str
    """Its format, and what computed it to measure the difference."""
    num_bytes: int
    """Its size."""
    network: str
    """Name of the network."""
    difference: float
    """max |a - b| / max |a| over the logits, a the network's and b the export's."""
    num_images: int
    """How many images the difference was measured on, in batches of one and of all."""

    def __str__(self) -> str:
        return (
            f"{self.network} written to {self.path}: {self.kind}, {self.num_bytes / 1e6:.1f} MB; "
            f"largest relative difference {self.difference:.1e} ({self.num_images} images, batches "
            f"of 1 and {self.num_images})"
        )


def check(dest: Path, platforms: Sequence[str], tolerance: float, overwrite: bool) -> None:
    """Raises UserError for arguments of ``export`` that cannot be used."""
    check_range("tolerance", tolerance, 0)
    known = (*PLATFORMS, "rocm")
    if not {"cpu"} <= set(platforms) <= set(known):
        raise UserError(
            f"platforms {' '.join(platforms)}: expected some of {', '.join(known)}, and cpu among "
            "them, where the export is checked"
        )
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
    if not (is_file or (dest / ARTIFACT).is_file()):
        raise UserError(f"{dest} is no exported network, and is not overwritten: give another name")


def export(
    opened: Pretrained,
    dest: Path,
    photographs: Sequence[str | Path],
    platforms: Sequence[str],
    tolerance: float,
    overwrite: bool,
) -> Exported:
    """Exports an opened network; arguments and errors are those of ``flax_resnet.export``."""
    check(dest, platforms, tolerance, overwrite)
    # Accelerators multiply float32 less precisely, each in its own way.
    with jax.default_device(_cpu()):
        opened = source.in_float32(opened)
        network = Classifier.of(opened)
        images = source.prepared_images(network.preprocessing, photographs)
        logits = np.asarray(source.runner(network)(images))
        if not np.isfinite(logits).all():
            raise not_finite()
        try:
            with tempfile.TemporaryDirectory(prefix=f".{dest.name}.", dir=dest.parent) as room:
                partial = Path(room) / dest.name
                kind, run = _write(opened, network, partial, platforms)
                difference = source.difference(run, images, logits)
                if not difference <= tolerance:
                    raise UserError(
                        f"the export is not the network: its outputs differ by {difference:.1e} of "
                        f"the largest, more than {tolerance:g}; nothing was written, --tolerance "
                        "allows more"
                    )
                files = [partial]
                if partial.is_dir():
                    measured = {"largest_relative_difference": difference, "images": len(images)}
                    _write_about(partial, {**run.about, "check": measured})
                    files = list(partial.iterdir())
                    shutil.rmtree(dest, ignore_errors=True)
                size = sum(file.stat().st_size for file in files)
                partial.replace(dest)
        except OSError as error:
            why = error.strerror or error  # not the name of the unfinished one
            raise UserError(f"{dest} cannot be written: {why}") from error
    return Exported(dest, kind, size, opened.name, difference, len(images))


def _write(
    opened: Pretrained, network: Classifier, path: Path, platforms: Sequence[str]
) -> tuple[str, Any]:
    """Writes the format that the name says; returns it in words, and what runs the export."""
    if path.suffix == ".safetensors":
        convert(opened, path)
        kind = "safetensors with torchvision's names, read back"
        return kind, source.runner(Classifier.of(source.in_float32(open_weights(path))))
    about = {
        "network": opened.name,
        "class_names": network.class_names and list(network.class_names),
        "preprocessing": to_record(network.preprocessing),
        "prepare": source.how_to_prepare(network.preprocessing),
    }
    sides = network.preprocessing.shape
    shape = jax.export.symbolic_shape(", ".join(["b", *map(str, sides)]))
    spec = jax.ShapeDtypeStruct(shape, jnp.uint8)
    stats = jax.device_get(network.stats)

    # A function of its own: jit would find a trace of another form in its cache.
    def program(variables: Any, images: jax.Array) -> Any:
        with cpu.plain_forms():
            return network.module.apply(variables, normalize(images, stats))

    if path.suffix == ".onnx":
        to_onnx.write(lambda images: program(opened.variables, images), spec, about, path)
        return to_onnx.run(path)
    # As constants XLA would fold the weights, for minutes where they are large.
    weights = {
        "/".join(names): np.asarray(value)
        for names, value in flatten_dict(dict(opened.variables)).items()
    }
    exported = jax.export.export(
        jax.jit(lambda weights, images: program(unflatten_dict(weights, sep="/"), images)),
        platforms=platforms,
    )(weights, spec)
    path.mkdir()
    (path / ARTIFACT).write_bytes(exported.serialize())
    np.savez(path / WEIGHTS, **weights)  # type: ignore[arg-type]
    (path / "load.py").write_bytes(Path(loader.__file__).read_bytes())
    about |= {
        "format": FORMAT,
        "sha256": {
            name: hashlib.sha256((path / name).read_bytes()).hexdigest()
            for name in (ARTIFACT, WEIGHTS)
        },
        "input": {"shape": ["b", *sides], "dtype": "uint8"},
        "output": {"shape": ["b", network.num_classes], "dtype": "float32"},
        "platforms": list(platforms),
        "jax": jax.__version__,
        "numpy": np.__version__,
    }
    _write_about(path, about)
    return f"StableHLO for {', '.join(platforms)}, run by its loader", loader.load(path)


def _write_about(directory: Path, about: dict[str, Any]) -> None:
    (directory / ABOUT).write_text(json.dumps(about, indent=1) + "\n", "utf-8")


def _cpu() -> jax.Device:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise UserError(
            "exports are checked on the CPU, and $JAX_PLATFORMS leaves it out: add cpu to it"
        ) from error
