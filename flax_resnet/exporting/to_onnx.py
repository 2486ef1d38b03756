"""A network as ONNX, by jax2onnx: uint8 images (b, H, W, C) to logits, the weights inside.

The input is what image readers give, so that nothing but resizing is left to the caller; the
transposition to ONNX's channels-first convolutions is one operation of the graph, on bytes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_resnet.errors import UserError
from flax_resnet.exporting.source import Run, Source

OPSET = 21
"""What the oldest onnxruntime of the [onnx] extra, 1.20, knows whole; jax2onnx's default, 23,
needs 1.22."""
INPUT, OUTPUT = "images", "logits"


def write(source: Source, path: Path) -> str:
    """Writes the file; returns what it is, in words.

    Raises:
      UserError: the converter is not installed, or cannot convert the network.
    """
    jax2onnx = _needed("jax2onnx")
    with _quiet():
        try:
            model = jax2onnx.to_onnx(
                lambda images: _traced(source, images),
                [source.spec],
                model_name=source.name,
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
    # The converter's notes on shapes within are wrong in places, and readers infer their own.
    del model.graph.value_info[:]
    for key, value in source.about.items():
        text = value if isinstance(value, str) else json.dumps(value)
        model.metadata_props.add(key=key, value=text)
    path.write_bytes(model.SerializeToString())
    return f"ONNX of opset {OPSET}"


def run(path: Path) -> tuple[Run, str]:
    """The network in a file, by onnxruntime on the CPU, and what computes it, in words."""
    runtime = _needed("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return (lambda images: session.run([OUTPUT], {INPUT: images})[0]), (
        f"onnxruntime {runtime.__version__}"
    )


def _traced(source: Source, images: jax.Array) -> jax.Array:
    """The network, its max-pools without padding: jax2onnx loses padding that is given in numbers.

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
        return source.apply(source.opened.variables, images)
    finally:
        nn.max_pool = theirs


def _needed(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise UserError(
            f"ONNX needs {name}, which is not installed: pip install 'flax_resnet[onnx]'"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the converter's notes; what it makes is measured."""
    logs = [logging.getLogger(name) for name in ("jax2onnx", "onnx_ir", "onnxscript")]
    before = [log.level for log in logs]
    try:
        for log in logs:
            log.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, before, strict=True):
            log.setLevel(level)
