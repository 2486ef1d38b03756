"""The weights that others have published for these networks: where, of what hash, fed how."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal

from flax_resnet.errors import UserError, did_you_mean
from flax_resnet.preprocess import KERAS_V1, KERAS_V2, TORCH, Preprocessing

HUB = "https://huggingface.co"
DEFAULT = "imagenet"
"""The tag that stands for a network's default one."""


@dataclasses.dataclass(frozen=True)
class Checksum:
    """What a file's digest is, or begins with."""

    algorithm: Literal["md5", "sha256"]
    """Of hashlib."""
    value: str
    """Hex digits; fewer than the whole digest are its beginning."""


@dataclasses.dataclass(frozen=True)
class Published:
    """One file of weights for ImageNet's 1000 classes."""

    network: str
    """The name of ``models.names()`` whose module the file fits exactly."""
    tag: str
    """What to call it: "keras", "tv_v1", "tv_v2", "hf", "timm/a1", ..."""
    url: str
    """Where it is, by https."""
    filename: str
    """Its name in the cache, shared with no other file."""
    checksum: Checksum | None
    """None: the Hugging Face hub says the sha256 when asked."""
    preprocessing: Preprocessing
    """What its publishers evaluated it with."""
    top1: float | None
    """Published accuracy on ImageNet's validation set, in percent."""
    licence: str
    """Of the weights, as their publishers name it."""


def find(network: str, tag: str = DEFAULT) -> Published:
    """The file that ``tag`` means for a network.

    Args:
      network: a name of ``models.names()``. The tag "keras" of ``resnet50`` or ``resnet50_v1``
        is that of ``ResNet50``, of ``resnet50_v2`` that of ``ResNet50V2``.
      tag: one of ``tags(network)``, or "imagenet" for ``default_tag(network)``.

    Raises:
      UserError: the network has no published weights, or none of that tag.
    """
    known = _all()
    if network not in known:
        raise UserError(
            f"network {network!r} has no published weights{did_you_mean(network, known)}: those "
            f"that have some are {', '.join(known)}"
        )
    found = known[network]
    wanted = default_tag(network) if tag == DEFAULT else tag
    if wanted not in found:
        near = did_you_mean(f"timm/{tag}" if f"timm/{tag}" in found else str(tag), found)
        raise UserError(
            f"weights {tag!r} of {network} are not known{near}: expected "
            f"{DEFAULT} (which is {default_tag(network)}), {', '.join(found)}, or the path of a "
            "file"
        )
    return found[wanted]


def is_tag(text: str) -> bool:
    """True for "imagenet", and for what is a tag of any network."""
    return text == DEFAULT or any(text in found for found in _all().values())


def tags(network: str) -> tuple[str, ...]:
    """The tags of a network's published weights; none where it has no such weights."""
    return tuple(_all().get(network, ()))


def default_tag(network: str) -> str | None:
    """What "imagenet" means for a network; None where it has no published weights.

    torchvision's newer weights, else its first, else Keras's for the networks that only Keras
    has, else timm's most accurate.
    """
    found = _all().get(network, {})
    for tag in ("tv_v2", "tv_v1", "keras"):
        if tag in found:
            return tag
    return max(found, key=lambda tag: found[tag].top1 or 0.0, default=None)


def find_file(name: str) -> Published | None:
    """The entry of a file called as in the cache, or as at its source; None of any other."""
    entries = {entry.filename: entry for found in _all().values() for entry in found.values()}
    sources = {
        entry.url.rpartition("/")[2]: entry
        for entry in entries.values()
        if entry.checksum is not None  # the hub's files all have one name
    }
    return entries.get(name) or sources.get(name)


def find_repository(name: str) -> Published | None:
    """The entry whose file lies in a repository OWNER/NAME of the hub; None of any other."""
    start = f"{HUB}/{name}/resolve/"
    entries = (entry for found in _all().values() for entry in found.values())
    return next((entry for entry in entries if entry.url.startswith(start)), None)


@functools.cache
def _all() -> dict[str, dict[str, Published]]:
    """{network: {tag: its file}}."""
    found: dict[str, dict[str, Published]] = {}
    for entry in [*_keras(), *_torchvision(), *_timm(), *_transformers()]:
        found.setdefault(entry.network, {})[entry.tag] = entry
    for depth in _KERAS:
        found[f"resnet{depth}"]["keras"] = found[f"ResNet{depth}"]["keras"]
        found[f"resnet{depth}_v1"] = found[f"ResNet{depth}"]
        found[f"resnet{depth}_v2"] = found[f"ResNet{depth}V2"]
    for depth in (18, 34):  # without bottlenecks v1 and v1.5 are one network
        found[f"resnet{depth}_v1"] = found[f"resnet{depth}"]
    return found


# {depth: ((md5, top-1) of v1, of v2)}; the files with the head, which holds all of the others.
_KERAS = {
    50: (
        ("2cb95161c43110f7111970584f804107", 74.9),
        ("3ef43a0b657b3be2300d5770ece849e0", 76.0),
    ),
    101: (
        ("f1aeb4b969a6efcfb50fad2f0c20cfc5", 76.4),
        ("6343647c601c52e1368623803854d971", 77.2),
    ),
    152: (
        ("100835be76be38e30d865e96f2aaae62", 76.6),
        ("a49b44d1979771252814e80f8ec446f9", 78.0),
    ),
}


def _keras() -> list[Published]:
    base = "https://storage.googleapis.com/tensorflow/keras-applications/resnet/"
    kinds = (("", KERAS_V1, "MIT"), ("V2", KERAS_V2, "BSD"))
    return [
        Published(
            network=f"ResNet{depth}{kind}",
            tag="keras",
            url=f"{base}resnet{depth}{kind.lower()}_weights_tf_dim_ordering_tf_kernels.h5",
            filename=f"keras-ResNet{depth}{kind}.h5",
            checksum=Checksum("md5", md5),
            preprocessing=preprocessing,
            top1=top1,
            licence=licence,
        )
        for depth, pair in _KERAS.items()
        for (md5, top1), (kind, preprocessing, licence) in zip(pair, kinds, strict=True)
    ]


# {network: "sha256's first digits, top-1" of the first weights, then of the second}
_TORCHVISION = {
    "resnet18": "f37072fd 69.758",
    "resnet34": "b627a593 73.314",
    "resnet50": "0676ba61 76.130 11ad3fa6 80.858",
    "resnet101": "63fe2227 77.374 cd907fc2 81.886",
    "resnet152": "394f9c45 78.312 f82ba261 82.284",
    "resnext50_32x4d": "7cdf4587 77.618 1a0047aa 81.198",
    "resnext101_32x8d": "8ba56ff5 79.312 110c445d 82.834",
    "resnext101_64x4d": "173b62eb 83.246",
    "wide_resnet50_2": "95faca4d 78.468 9ba9bcbe 81.602",
    "wide_resnet101_2": "32ee1156 78.848 d733dc28 82.510",
}
_TORCH_V2 = dataclasses.replace(TORCH, resize=232)


def _torchvision() -> list[Published]:
    found = []
    for network, row in _TORCHVISION.items():
        words = row.split()
        for version, (sha256, top1) in enumerate(zip(words[::2], words[1::2], strict=True), 1):
            # Its first weights are already of the newer recipe.
            newer = version == 2 or network == "resnext101_64x4d"
            found.append(
                Published(
                    network=network,
                    tag=f"tv_v{version}",
                    url=f"https://download.pytorch.org/models/{network}-{sha256}.pth",
                    filename=f"tv_v{version}-{network}-{sha256}.pth",
                    checksum=Checksum("sha256", sha256),
                    preprocessing=_TORCH_V2 if newer else TORCH,
                    top1=float(top1),
                    licence="BSD-3-Clause",
                )
            )
    return found


# {network: "tag top-1 ..."}: those of timm's networks that are these to the last weight. Its
# seresnet18 and 34 squeeze to at least 8 channels, and have no weights. Accuracies are those of
# timm's results/results-imagenet.csv, at the sizes below; "-" where that has none.
_TIMM = {
    "resnet18": "a1 73.158 a2 72.372 a3 68.254 tv 69.760 gluon 70.838 "
    "fb_ssl_yfcc100m_ft 72.594 fb_swsl_ig1b_ft 73.282",
    "resnet34": "a1 77.918 a2 77.158 a3 72.970 bt 76.480 ra4_e3600_r224 - tv - gluon 74.578",
    "resnet50": "a1 81.214 a1h 80.676 a2 80.772 a3 78.048 b1k 80.706 b2k 80.454 c1 80.912 "
    "c2 80.870 d 80.972 ram 79.976 am 78.998 ra 79.836 bt 79.640 tv 76.130 tv2 80.850 "
    "gluon 77.580 fb_ssl_yfcc100m_ft 79.234 fb_swsl_ig1b_ft 81.182",
    "resnet101": "a1h 82.778 a1 82.322 a2 82.236 a3 79.814 tv 77.376 tv2 81.890 gluon 79.310",
    "resnet152": "a1h 83.450 a1 82.732 a2 82.608 a3 80.546 tv 78.322 tv2 82.288 gluon 79.694",
    "resnet18d": "ra2 73.794 ra4_e3600_r224 -",
    "resnet34d": "ra2 78.436",
    "resnet50d": "ra2 81.356 ra4_e3600_r224 - a1 81.450 a2 81.164 a3 78.722 gluon 79.078",
    "resnet101d": "ra2 83.016 gluon 80.426",
    "resnet152d": "ra2 83.684 gluon 80.476",
    "resnet200d": "ra2 83.964",
    "seresnet50": "a1 81.102 a2 81.106 a3 77.028 ra2 81.284",
    "resnext50_32x4d": "a1h 82.014 a1 81.466 a2 81.304 a3 79.268 ra 80.698 tv 77.618 tv2 81.182 "
    "gluon 79.360 fb_ssl_yfcc100m_ft 80.338 fb_swsl_ig1b_ft 82.174",
    "resnext101_32x8d": "tv 79.310 tv2 82.832 fb_wsl_ig1b_ft 82.698 fb_ssl_yfcc100m_ft 81.606 "
    "fb_swsl_ig1b_ft 84.302",
    "resnext101_64x4d": "c1 83.156 tv 82.992 gluon 80.600",
    "wide_resnet50_2": "racm 82.280 tv 78.480 tv2 81.606",
    "wide_resnet101_2": "tv 78.838 tv2 82.498",
}


def _timm() -> list[Published]:
    found = []
    for network, row in _TIMM.items():
        words = row.split()
        for name, top1 in zip(words[::2], words[1::2], strict=True):
            licence = {"tv": "BSD-3-Clause", "fb": "CC-BY-NC-4.0"}.get(name[:2], "Apache-2.0")
            found.append(
                Published(
                    network=network,
                    tag=f"timm/{name}",
                    url=f"{HUB}/timm/{network}.{name}_in1k/resolve/main/model.safetensors",
                    filename=f"timm_{name}-{network}.safetensors",
                    checksum=None,
                    preprocessing=_timm_preprocessing(network, name),
                    top1=None if top1 == "-" else float(top1),
                    licence=licence,
                )
            )
    return found


def _timm_preprocessing(network: str, name: str) -> Preprocessing:
    """At the test size and crop, where timm has those beside the ones of training."""
    bicubic = functools.partial(dataclasses.replace, TORCH, interpolation="bicubic")
    half = (0.5, 0.5, 0.5)
    if name == "ra2" and network in ("resnet101d", "resnet152d", "resnet200d"):
        return bicubic(size=320, resize=320)
    if name == "a1h" and network == "resnet50":
        return bicubic(resize=224)
    if name == "tv2":
        return _TORCH_V2
    if name.startswith(("tv", "fb")):
        return TORCH
    if name in ("am", "gluon"):
        return bicubic()
    if name == "a3":
        return bicubic(resize=math.floor(224 / 0.95))
    if name in ("ra", "ra2", "ram", "racm", "bt"):
        return bicubic(size=288, resize=math.floor(288 / 0.95))
    if name == "ra4_e3600_r224":
        return bicubic(size=288, resize=288, mean=half, std=half)
    return bicubic(size=288, resize=288)


def _transformers() -> list[Published]:
    # Read off copies of their preprocessor_config.json in repositories tuned from resnet-50:
    # ConvNextImageProcessor, size 224, crop_pct 0.875, resample 3 (bicubic).
    return [
        Published(
            network=f"resnet{depth}",
            tag="hf",
            url=f"{HUB}/microsoft/resnet-{depth}/resolve/main/model.safetensors",
            filename=f"hf-resnet{depth}.safetensors",
            checksum=None,
            preprocessing=dataclasses.replace(TORCH, interpolation="bicubic"),
            top1=None,
            licence="Apache-2.0",
        )
        for depth in (18, 34, 50, 101, 152)
    ]
