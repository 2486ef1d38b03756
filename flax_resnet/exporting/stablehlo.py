"""A network as StableHLO: a directory with program, weights, a description, and a loader.

The weights are arguments of the program: as constants XLA would fold them, for minutes where they
are large, and keep a copy for every batch size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_resnet.exporting import loader
from flax_resnet.exporting.loader import ABOUT, ARTIFACT, FORMAT, HASHED, WEIGHTS
from flax_resnet.exporting.source import Difference, Run, Source
from flax_resnet.record import to_record

PLATFORMS = ("cpu", "cuda", "tpu")


def write(source: Source, directory: Path, platforms: Sequence[str] = PLATFORMS) -> str:
    """Writes the directory, which is not there yet; returns what it is, in words.

    Args:
      source: the network.
      directory: it will hold net.stablehlo, weights.npz, about.json and load.py.
      platforms: names that jax.export knows.
    """
    weights = {
        "/".join(path): np.asarray(value)
        for path, value in flatten_dict(dict(source.opened.variables)).items()
    }

    # A function of its own: jit would find a trace of another form in its cache.
    def program(weights: dict[str, jax.Array], images: jax.Array) -> jax.Array:
        return source.apply(unflatten_dict(weights, sep="/"), images)

    exported = jax.export.export(jax.jit(program), platforms=platforms)(weights, source.spec)
    directory.mkdir()
    (directory / ARTIFACT).write_bytes(exported.serialize())
    np.savez(directory / WEIGHTS, **weights)  # type: ignore[arg-type]
    (directory / "load.py").write_text(_loader(), "utf-8")
    hashes = {n: hashlib.sha256((directory / n).read_bytes()).hexdigest() for n in HASHED}
    _write_about(directory, {**_about(source, exported), "sha256": hashes})
    return f"StableHLO for {', '.join(platforms)}"


def run(directory: Path) -> Run:
    """The exported network, by the loader, on the default device."""
    return loader.load(directory)


def finish(directory: Path, found: Difference) -> None:
    """Writes down the difference that was measured."""
    about = json.loads((directory / ABOUT).read_text("utf-8"))
    check = {
        "largest_relative_difference": found.largest,
        "images": found.images,
        "batch_sizes": list(found.batch_sizes),
    }
    _write_about(directory, {**about, "check": check})


def _about(source: Source, exported: jax.export.Exported) -> dict[str, Any]:
    names = source.classifier.class_names
    return {
        "format": FORMAT,
        "network": source.name,
        "input": {"shape": ["b", *source.images.shape[1:]], "dtype": "uint8",
                  "what": "images as prepare gives them; they are normalised inside"},
        "output": {"shape": ["b", source.classifier.num_classes], "dtype": "float32",
                   "what": "logits"},
        "class_names": None if names is None else list(names),
        "preprocessing": to_record(source.classifier.preprocessing),
        "platforms": list(exported.platforms),
        "jax": jax.__version__,
        "numpy": np.__version__,
        "calling_convention": exported.calling_convention_version,
    }  # fmt: skip


def _write_about(directory: Path, about: dict[str, Any]) -> None:
    (directory / ABOUT).write_text(json.dumps(about, indent=1) + "\n", "utf-8")


def _loader() -> str:
    package, _, name = loader.__name__.rpartition(".")
    return resources.files(package).joinpath(f"{name}.py").read_text("utf-8")
