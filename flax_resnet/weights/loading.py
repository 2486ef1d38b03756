"""Weights by tag, path, working directory or hub address; ``load``, a network with its weights."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from flax_resnet import models
from flax_resnet.checkpoints import seals
from flax_resnet.checkpoints.checkpoints import CheckpointConfig, Checkpoints
from flax_resnet.data.preprocess import Preprocessing
from flax_resnet.errors import Note, UserError
from flax_resnet.models import ResNet
from flax_resnet.models.arguments import Dtype
from flax_resnet.records.configs import from_record, untracked
from flax_resnet.records.run_dir import read_record
from flax_resnet.weights import hub, published, trees
from flax_resnet.weights.imagenet import imagenet_classes
from flax_resnet.weights.pretrained import Pretrained, Variables, image_shape
from flax_resnet.weights.published_cache import fetch
from flax_resnet.weights.reading import open_file

FILENAMES = (hub.WEIGHTS, "pytorch_model.bin")
"""Names of the weights in a folder that a repository of the hub was saved to."""
SUFFIXES = (".safetensors", ".keras", ".h5", ".hdf5", ".pth", ".pt", ".th", ".tar", ".bin", ".ckpt")


def load(
    name: str,
    *,
    weights: Variables | str | Path | None = None,
    include_top: bool = True,
    pooling: Literal["avg", "max"] | None = None,
    num_classes: int | None = None,
    classes: int | None = None,
    input_shape: tuple[int, int, int] | None = None,
    dtype: Dtype = "float32",
    seed: int = 0,
    **fields: Any,
) -> tuple[nn.Module, Variables]:
    """A network by name, and its variables: fresh, published, from a file, or those given.

    Args:
      name: one of ``names()``; Keras's spellings (``ResNet152V2``) give Keras's networks.
      weights: None starts afresh; "imagenet" or another of ``tags(name)`` fetches published
        weights; a path reads a weight file or a run's working directory (FILE#NAME one of several
        networks in a file); "hf://OWNER/NAME" and
        "hf://OWNER/NAME@REVISION" download from the Hugging Face hub (needs [hub]); variables
        ({"params", "batch_stats"}, blocks stacked or not) are taken as they are.
      include_top: end with the dense head; its output is logits. False drops that of the weights.
      pooling: without the top: None gives the last map (N, h, w, C), "avg" and "max" its
        global pool (N, C).
      num_classes: width of the head; by default that of the weights, else the network's own:
        1000, of CIFAR nets 10.
      classes: Keras's word for num_classes.
      input_shape: (H, W, C); by default (224, 224, 3), of CIFAR nets (32, 32, 3), with the
        channels that weights of a file take.
      dtype: computation dtype.
      seed: of the initialisation.
      **fields: any other field of the network.

    Returns:
      (module, variables). Of "keras" asked for ``resnet50`` the module is ``ResNet50``'s.

    Raises:
      UserError: an unknown name, tag or field, an input too small, weights that cannot be had,
        or that do not fit.
    """
    if None not in (classes, num_classes) and classes != num_classes:
        raise UserError(f"num_classes={num_classes} and classes={classes}: give one of them")
    num_classes = classes if num_classes is None else num_classes
    top = {"include_top": include_top, "pooling": pooling}
    fields |= {key: value for key, value in top.items() if value not in (True, None)}
    opened = None
    if isinstance(weights, (str, Path)):
        models.create(name, dtype=dtype, **fields)  # what is wrong with these comes first
        opened = open_weights(weights, name)
        name, weights = opened.network or name, opened.variables
        if include_top and num_classes is None:
            num_classes = getattr(opened.module, "num_classes", None)
    if num_classes is not None:
        fields["num_classes"] = num_classes
    module = models.create(name, dtype=dtype, **fields)
    if opened is not None:
        check_same(opened, module, name)
    default = image_shape(module, None if opened is None else opened.variables)
    shape = models.check_shape(default if input_shape is None else input_shape)
    images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    if weights is None:
        return module, models.initialize(module, jax.random.key(seed), images)
    if not (isinstance(weights, Mapping) and "params" in weights):
        raise UserError(
            f"weights={weights!r:.50}: expected None, a tag, a path, or variables, a dict with "
            "'params' and 'batch_stats'"
        )
    want = models.variable_shapes(module, images)
    return module, models.match_variables(module, want, weights)


def open_weights(weights: str | Path, network: str | None = None) -> Pretrained:
    """Weights with their network and what they were trained on.

    Args:
      weights: a tag, a weight file, a folder with one as Hugging Face names it, a run's working
        directory (its best checkpoint), or "hf://OWNER/NAME[@REVISION]"; FILE#NAME of a file that
        holds several networks.
      network: a name of ``names()``, which a tag needs.
    """
    entry = None if is_path(weights) else published.find(network, str(weights))
    address = str(weights) if entry is None else entry.url
    if hub.is_address(address):
        path = hub.fetch_folder(address) / hub.WEIGHTS
        known = entry or published.find_source(address.partition("@")[0])
    elif entry is not None:
        path, known = fetch(entry), entry
    else:
        path = Path(weights).expanduser()
        if path.is_dir():
            inside = [path / name for name in FILENAMES if (path / name).is_file()]
            if not inside:
                return open_run_weights(path)[0]
            path = inside[0]
        known = published.find_source(path.name)
    opened = open_file(path)
    prepared = known.preprocessing if known is not None else None
    if prepared is not None and (opened.assumed or opened.preprocessing is None):
        opened = dataclasses.replace(opened, preprocessing=prepared, assumed="")
    width = opened.module.num_classes if getattr(opened.module, "include_top", True) else None
    if opened.class_names is None and opened.preprocessing is not None and width == 1000:
        opened = dataclasses.replace(opened, class_names=imagenet_classes())
    if opened.assumed:
        warnings.warn(
            f"{path}: nothing says how images are prepared for it: unless it is given, the "
            f"preprocessing is {opened.assumed}, of photographs as they are displayed",
            Note,
            stacklevel=2,
        )
    if entry is None:
        return opened
    module = models.create(entry.network, num_classes=getattr(opened.module, "num_classes", 1000))
    return dataclasses.replace(opened, module=module, network=entry.network, certain=True)


def is_path(weights: str | Path) -> bool:
    """True for a path or an hf:// address, False for a tag; ./imagenet is a path."""
    text = str(weights)
    if isinstance(weights, Path) or hub.is_address(weights):
        return True
    if published.is_tag(text):
        return False
    text = trees.split(text)[0]
    looks = text.startswith((".", "/", "~")) or text.lower().endswith(SUFFIXES)
    return looks or Path(text).expanduser().exists()


def preprocessing(network: str, weights: str | Path = published.DEFAULT) -> Preprocessing:
    """How images are prepared for weights; those of a timm tag are downloaded, to say it.

    Args:
      network: a name of ``names()``.
      weights: a tag, a weight file, a working directory or hf://OWNER/NAME.

    Raises:
      UserError: an unknown tag, or a file that does not say.
    """
    entry = None if is_path(weights) else published.find(network, str(weights))
    prepared = entry.preprocessing if entry is not None else None
    prepared = prepared or open_weights(weights, network).preprocessing
    if prepared is None:
        raise UserError(f"{weights} does not say how to prepare images for it: write it yourself")
    return prepared


def check_same(opened: Pretrained, module: nn.Module, name: str) -> None:
    """Raises UserError where a file says, by more than its shapes, that it is not of ``module``."""
    if not opened.certain:
        return
    if not (isinstance(module, ResNet) and isinstance(opened.module, ResNet)):
        if type(module) is not type(opened.module):
            kinds = f"a {type(opened.module).__name__}'s, {name} is a {type(module).__name__}"
            raise UserError(f"the weights are {kinds}: ask for the other, or for other weights")
        return
    there, here = models.architecture(opened.module), models.architecture(module)
    fields = [f"{k}={there[k]!r} there, {here[k]!r} here" for k in here if there[k] != here[k]]
    if fields:
        like = models.name_of(opened.module)
        advice = f"ask for {like}" if like else "give these fields, or other weights"
        raise UserError(f"the weights are not of {name} ({'; '.join(fields)}): {advice}")


def open_run_weights(workdir: Path) -> tuple[Pretrained, dict[str, Any]]:
    """The best checkpoint of a run, else its newest: (its network, what it says of itself)."""
    state, meta = read_checkpoint(workdir)
    config = from_record(untracked(meta["config"]))
    stats, shape = state["normalization"], models.check_shape(meta["image_shape"])
    prepared = None  # rectangles: there is no way to bring a photograph to one without bending it
    if shape[0] == shape[1]:
        decoder = config.data.decoder(shape[2])
        prepared = Preprocessing(
            size=decoder.side or shape[0],
            resize=None,
            channels=shape[2],
            mean=tuple(np.ravel(stats["mean"]).tolist()),
            std=tuple(np.ravel(stats["std"]).tolist()),
            bgr="order" in stats,
            decoder=decoder,
            as_displayed=decoder.as_displayed,
        )
    variables = saved_variables(config.model, state)
    names = tuple(meta["class_names"])
    return Pretrained(config.model, variables, prepared, names, certain=True), meta


def read_checkpoint(
    workdir: Path, which: Literal["best", "latest"] = "best"
) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """(the state, what the checkpoint says of itself), from where the run's record has them."""
    elsewhere = None
    with contextlib.suppress(UserError, KeyError, TypeError):
        elsewhere = read_record(workdir)["config"]["checkpoint"]["directory"]
    directory = CheckpointConfig(directory=elsewhere).place(workdir)
    if not seals.is_remote(directory) and not directory.is_dir():
        raise UserError(
            f"{workdir} holds no run: expected its checkpoints in {directory}, or a weight file"
        )
    with contextlib.closing(Checkpoints(directory)) as reader:
        return reader.read(which)


def saved_variables(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint's state is evaluated with: averaged where it is, blocks not stacked."""
    averaged = state.get("ema") or {}
    variables = {kind: averaged.get(kind, state.get(kind)) for kind in ("params", "batch_stats")}
    if isinstance(module, ResNet):
        variables = models.unstack_blocks(module, variables)
    return {kind: tree for kind, tree in variables.items() if tree}
