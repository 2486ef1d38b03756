"""Exports a network: written beside its place, measured, and moved there when it is near enough."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_resnet.data.decode import DECODE_ERRORS, PIL_MODES, reason
from flax_resnet.data.folders import find_images
from flax_resnet.data.normalization import normalize
from flax_resnet.data.preprocess import Preprocessing
from flax_resnet.errors import UserError, check_range
from flax_resnet.exporting import loader, to_onnx
from flax_resnet.exporting.loader import ABOUT, ARTIFACT, FORMAT, WEIGHTS
from flax_resnet.inference.classifier import Classifier, not_finite, open_network
from flax_resnet.records.configs import to_record
from flax_resnet.records.files import os_error_as_one_line, replacing_tree, shown
from flax_resnet.weights import Pretrained, open_weights
from flax_resnet.weights.writing import write_weights
from flax_resnet.xla import backend

PLATFORMS = ("cpu", "cuda", "tpu")
Run = Callable[[np.ndarray], Any]
"""Maps uint8 images (N, H, W, C) to logits (N, classes)."""


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
    if dest.exists() and not overwrite:
        raise UserError(f"{dest} is there already: give another name, or --overwrite")
    if dest.exists() and not (dest if is_file else dest / ARTIFACT).is_file():
        raise UserError(f"{dest} is no exported network, and is not overwritten: give another name")


def export(
    source: str | Path | Pretrained,
    dest: str | Path,
    *,
    images: Sequence[str | Path] = (),
    platforms: Sequence[str] = PLATFORMS,
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
        scikit-learn's two. Each is used in five forms: as it is, mirrored, turned, inverted.
      platforms: of StableHLO; "cpu" is one of them.
      tolerance: largest difference of the outputs, as a share of the largest output.
      overwrite: replace an export that is there.

    Returns:
      What was written, and the difference that was measured; as a text, one line.

    Raises:
      UserError: weights that cannot be had or cannot classify, a place that cannot be written, a
        package that is missing, or a larger difference.
    """
    dest = Path(dest).expanduser()
    check(dest, platforms, tolerance, overwrite)
    # Accelerators multiply float32 less precisely, each in its own way.
    with jax.default_device(_cpu()), os_error_as_one_line(dest), replacing_tree(dest) as partial:
        opened = in_float32(open_network(source) if isinstance(source, (str, Path)) else source)
        network = Classifier(opened)
        pixels = prepared_images(network.preprocessing, images)
        logits = np.asarray(network.outputs(pixels)[0])
        if not np.isfinite(logits).all():
            raise not_finite()
        kind, run = _write(opened, network, partial, platforms)
        largest = difference(run, pixels, logits)
        if not largest <= tolerance:
            raise UserError(
                f"the export is not the network: its outputs differ by {largest:.1e} of the "
                f"largest, more than {tolerance:g}; nothing was written, --tolerance allows more"
            )
        if partial.is_dir():
            measured = {"largest_relative_difference": largest, "images": len(pixels)}
            _write_about(partial, {**run.about, "check": measured})
        size = sum(path.stat().st_size for path in (partial, *partial.glob("*")) if path.is_file())
    return Exported(dest, kind, size, opened.name, largest, len(pixels))


def convert(opened: Pretrained, dest: str | Path) -> str:
    """``write_weights`` of an opened network; returns a line that says what was written."""
    about = {n: getattr(opened, n) for n in ("preprocessing", "class_names", "input_shape")}
    write_weights(dest, opened.module, opened.variables, **about)
    parameters = sum(x.size for x in jax.tree.leaves(opened.variables["params"]))
    return f"{opened.name}, {parameters:,} parameters, written to {dest}"


def _write(
    opened: Pretrained, network: Classifier, path: Path, platforms: Sequence[str]
) -> tuple[str, Any]:
    """Writes the format that the name says; returns it in words, and what runs the export."""
    if path.suffix == ".safetensors":
        convert(opened, path)
        again = Classifier(in_float32(open_weights(path)))
        kind = "safetensors with torchvision's names, read back"
        return kind, lambda images: again.outputs(images)[0]
    about = {
        "network": opened.name,
        "class_names": network.class_names and list(network.class_names),
        "preprocessing": to_record(network.preprocessing),
        "prepare": how_to_prepare(network.preprocessing),
    }
    sides = network.preprocessing.shape
    shape = jax.export.symbolic_shape(", ".join(["b", *map(str, sides)]))
    spec = jax.ShapeDtypeStruct(shape, jnp.uint8)
    # As constants XLA would fold the weights, for minutes where they are large.
    weights = jax.tree.map(np.asarray, flatten_dict(dict(opened.variables), sep="/"))
    if path.suffix == ".onnx":
        to_onnx.write(functools.partial(_logits, network, "any", weights), spec, about, path)
        return to_onnx.run(path)
    program = jax.jit(program_by_platform(network))
    exported = jax.export.export(program, platforms=platforms)(weights, spec)
    path.mkdir()
    (path / ARTIFACT).write_bytes(exported.serialize())
    np.savez(path / WEIGHTS, **weights)
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
        "requires": [f"jax>={jax.__version__}", "flatbuffers", "pillow"],
        "numpy": np.__version__,
    }
    _write_about(path, about)
    return f"StableHLO for {', '.join(platforms)}, run by its loader", loader.load(path)


def program_by_platform(network: Classifier) -> Callable[[Any, jax.Array], Any]:
    """A function of weights, {"params/...": array}, and images that runs fast on each platform."""
    # New functions each time: jit would find a trace of other forms in its cache.
    return functools.partial(
        jax.lax.platform_dependent,
        cpu=functools.partial(_logits, network, "cpu"),
        default=functools.partial(_logits, network, "any"),
    )


def _logits(
    network: Classifier, target: Literal["cpu", "any"], weights: Any, images: jax.Array
) -> Any:
    with backend.traced_for(target):
        variables = unflatten_dict(weights, sep="/")
        return network.module.apply(variables, normalize(images, jax.device_get(network.stats)))


def _write_about(directory: Path, about: dict[str, Any]) -> None:
    (directory / ABOUT).write_text(json.dumps(about, indent=1) + "\n", "utf-8")


def _cpu() -> jax.Device:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise UserError(
            "exports are checked on the CPU, and $JAX_PLATFORMS leaves it out: add cpu to it"
        ) from error


def in_float32(opened: Pretrained) -> Pretrained:
    """A network that computes, and has its weights, in float32."""
    fields: dict[str, Any] = {"dtype": "float32", "param_dtype": "float32", "remat": False}
    known = {name: value for name, value in fields.items() if hasattr(opened.module, name)}
    variables = jax.tree.map(lambda x: np.asarray(x, np.float32), opened.variables)
    return dataclasses.replace(opened, module=opened.module.clone(**known), variables=variables)


def prepared_images(prepared: Preprocessing, photographs: Sequence[str | Path]) -> np.ndarray:
    """Photographs, each as it is, mirrored two ways, turned, and inverted: uint8 (5 N, H, W, C).

    They are image files or folders; if there are none, scikit-learn's two.
    """
    if not photographs:
        from sklearn.datasets import load_sample_images

        photographs = load_sample_images().filenames
    images = []
    for path in find_images(photographs):
        try:
            image = prepared(path.read_bytes())
        except DECODE_ERRORS as error:
            raise UserError(f"unreadable image {shown(path)} ({reason(error)})") from error
        images += [image, image[::-1], image[:, ::-1], image[::-1, ::-1], 255 - image]
    return np.stack(images)


def difference(run: Run, images: np.ndarray, logits: np.ndarray) -> float:
    """max |run(images) - logits| / max |logits|, of one image and of all in one batch."""
    gaps = [np.max(np.abs(run(images[:n]) - logits[:n])) for n in (1, len(images))]
    # A NaN stays one: it is no small difference.
    return float(np.max(gaps) / np.maximum(np.max(np.abs(logits)), np.finfo(np.float32).tiny))


def how_to_prepare(prepared: Preprocessing) -> str:
    """The way from a photograph to the network's input, in words; load.py's ``prepare`` goes it."""
    mode, decoder = PIL_MODES[prepared.channels], prepared.decoder
    steps = [f"decode to {mode}"]
    if getattr(decoder or prepared, "as_displayed", False):
        steps += ["turn as EXIF says", "put transparent pixels on white"]
    if decoder is not None:
        steps += [f"crop the central square of {decoder.crop_ratio:g} of the shorter side"]
        steps += [f"resize to {decoder.size}x{decoder.size}, bilinear"]
        steps += [f"pad {decoder.pad} zeros on every side"] if decoder.pad else []
    elif prepared.resize is None:
        steps += [f"resize to {prepared.size}x{prepared.size}, {prepared.interpolation}"]
    else:
        steps += [f"resize the shorter side to {prepared.resize}, {prepared.interpolation}"]
        steps += [f"crop the central {prepared.size}x{prepared.size}"]
    return "; ".join([*steps, "pass uint8 (N, H, W, C), not normalised"])
