"""A network as ONNX, by jax2onnx: uint8 images (b, H, W, C) to logits, the weights inside.

The input is what image readers give, so that nothing but resizing is left to the caller; the
transposition to ONNX's channels-first convolutions is one operation of the graph, on bytes.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_resnet.errors import UserError, import_extra

OPSET = 21
"""What the oldest onnxruntime of the [onnx] extra, 1.20, knows whole; jax2onnx's default, 23,
needs 1.22."""
INPUT, OUTPUT = "images", "logits"


def write(
    program: Callable[[jax.Array], Any],
    spec: jax.ShapeDtypeStruct,
    about: Mapping[str, Any],
    path: Path,
) -> None:
    """Writes a program from images, of the shape and dtype of ``spec``, to logits.

    ``about`` becomes the file's metadata. Where the converter is not installed, or cannot convert
    the network, UserError is raised.
    """
    jax2onnx = import_extra("jax2onnx", "onnx")
    logging.disable(logging.WARNING)  # the converter's notes; what it makes is measured
    try:
        with warnings.catch_warnings(action="ignore"):
            model = jax2onnx.to_onnx(
                lambda images: _without_padding(program, images),
                [spec],
                model_name=about["network"],
                opset=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
            )
    except Exception as error:  # it has no errors of its own
        line = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"jax2onnx cannot convert the network ({type(error).__name__}: {line:.99}): export "
            "it to a directory, as StableHLO"
        ) from error
    finally:
        logging.disable(logging.NOTSET)
    # The converter's notes on shapes within are wrong in places, and readers infer their own.
    del model.graph.value_info[:]
    for key, value in about.items():
        text = value if isinstance(value, str) else json.dumps(value)
        model.metadata_props.add(key=key, value=text)
    path.write_bytes(model.SerializeToString())


def run(path: Path) -> tuple[str, Callable[[Any], Any]]:
    """What the file is, in words, and its network by onnxruntime on the CPU."""
    runtime = import_extra("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    data = path.read_bytes()  # the runtime takes no path that is not UTF-8
    session = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    kind = f"ONNX of opset {OPSET}, run by onnxruntime {runtime.__version__}"
    return kind, lambda images: session.run([OUTPUT], {INPUT: images})[0]


def _without_padding(program: Callable[[jax.Array], Any], images: jax.Array) -> Any:
    """The program, its max-pools without padding: jax2onnx loses padding that is given in numbers.

    It puts functions of its own in place of flax's while it traces, nn.max_pool among them.
    """
    theirs: Any = nn.max_pool

    def max_pool(x: jax.Array, window: Any, strides: Any, padding: Sequence[Any]) -> jax.Array:
        if any(map(any, padding)):
            around = ((0, 0), *padding, (0, 0))
            x = jnp.pad(x, around, constant_values=-jnp.inf)
        return theirs(x, window_shape=window, strides=strides, padding="VALID")

    nn.max_pool = max_pool  # type: ignore[assignment]
    try:
        return program(images)
    finally:
        nn.max_pool = theirs
