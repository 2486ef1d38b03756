"""A network as StableHLO: a directory with program, weights, a description, and a loader.

The weights are arguments of the program: as constants XLA would fold them, for minutes where they
are large, and keep a copy for every batch size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_resnet.exporting import loader
from flax_resnet.exporting.loader import ABOUT, ARTIFACT, FORMAT, HASHED, WEIGHTS
from flax_resnet.exporting.source import Difference, Source

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
    (directory / "load.py").write_bytes(Path(loader.__file__).read_bytes())
    hashes = {n: hashlib.sha256((directory / n).read_bytes()).hexdigest() for n in HASHED}
    _write_about(directory, {**_about(source, exported), "sha256": hashes})
    return f"StableHLO for {', '.join(platforms)}"


def finish(directory: Path, found: Difference) -> None:
    """Adds the measured difference to about.json."""
    about = json.loads((directory / ABOUT).read_text("utf-8"))
    check = {
        "largest_relative_difference": found.largest,
        "images": found.images,
        "batch_sizes": list(found.batch_sizes),
    }
    _write_about(directory, {**about, "check": check})


def _about(source: Source, exported: jax.export.Exported) -> dict[str, Any]:
    inputs, outputs = exported.in_avals[-1], exported.out_avals[0]
    return {
        "format": FORMAT,
        **source.about,
        "input": {"shape": ["b", *inputs.shape[1:]], "dtype": str(inputs.dtype)},
        "output": {"shape": ["b", *outputs.shape[1:]], "dtype": str(outputs.dtype)},
        "platforms": list(exported.platforms),
        "jax": jax.__version__,
        "numpy": np.__version__,
    }


def _write_about(directory: Path, about: dict[str, Any]) -> None:
    (directory / ABOUT).write_text(json.dumps(about, indent=1) + "\n", "utf-8")
