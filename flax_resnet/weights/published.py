"""Weights that others have published for these networks: where they are, how they are fed."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator

from flax_resnet import models
from flax_resnet.data.preprocess import KERAS_V1, KERAS_V2, TORCH, Preprocessing
from flax_resnet.errors import UserError, did_you_mean

DEFAULT = "imagenet"
"""The tag that stands for a network's default one."""
_TIMM_TAG = re.compile("timm/[a-z0-9_]+")


@dataclasses.dataclass(frozen=True)
class Published:
    """One set of weights trained on ImageNet: a file on the web, or a repository on the hub."""

    network: str
    """Name of the network in ``models.names()`` that the weights fit exactly."""
    tag: str
    """Name of the weights: "keras", "tv_v1", "tv_v2", "hf" or "timm/NAME"."""
    url: str
    """https://... of the file, or hf://OWNER/NAME of the repository."""
    filename: str = ""
    """Name of the file in the cache; of no repository."""
    checksum: str = ""
    """ "md5:DIGEST", or "sha256:" and the first digits; of no repository."""
    preprocessing: Preprocessing | None = None
    """How the publisher evaluated the weights; None where the repository's config.json says it."""


def find(network: str | None, tag: str = DEFAULT) -> Published:
    """The weights that a tag means for a network.

    Args:
      network: a name of ``models.names()``.
      tag: one of ``tags(network)``, any "timm/NAME", which stands for the repository
        timm/NETWORK.NAME_in1k of the hub, or "imagenet" for ``default_tag(network)``.
    """
    if network is None:
        need = "a tag needs a network (--model NAME)" if is_tag(tag) else "no such file or run"
        raise UserError(f"weights {tag!r}: {need}; or give a file, a run, or hf://OWNER/NAME")
    if _TIMM_TAG.fullmatch(tag):
        models.create(network)  # raises where there is no such network
        return _timm(network, tag.removeprefix("timm/"))
    entries = _all().get(network)
    if entries is None:
        near = did_you_mean(network, _all())
        raise UserError(
            f"network {network!r} has no published weights{near}: expected {', '.join(_all())}"
        )
    wanted = default_tag(network) if tag == DEFAULT else tag
    if wanted not in entries:
        raise UserError(
            f"weights {tag!r} of {network} are not known{did_you_mean(tag, entries)}: expected "
            f"{DEFAULT} ({default_tag(network)}), {', '.join(entries)}, timm/NAME, or a path"
        )
    return entries[wanted]


def is_tag(text: str) -> bool:
    """True for "imagenet", for timm/NAME, and for the tags that ``tags`` lists for any network."""
    known = {DEFAULT, *(tag for entries in _all().values() for tag in entries)}
    return text in known or _TIMM_TAG.fullmatch(text) is not None


def tags(network: str) -> tuple[str, ...]:
    """The tags of a network's published weights; any name of timm is one more, as timm/NAME."""
    return tuple(_all().get(network, ()))


def default_tag(network: str) -> str | None:
    """torchvision's newer weights, else its first, else Keras's, else timm's best, else None."""
    entries = _all().get(network, {})
    return next((tag for tag in ("tv_v2", "tv_v1", "keras", *entries) if tag in entries), None)


def find_source(name: str) -> Published | None:
    """The published weights of a file's name, in the cache or on the web, or of hf://OWNER/NAME."""
    for entry in (entry for entries in _all().values() for entry in entries.values()):
        if name in (entry.filename, entry.url, entry.url.rpartition("/")[2]):
            return entry
    return None


# {network: md5}: the files with the head, which hold all of those without it.
_KERAS = {
    "ResNet50": "2cb95161c43110f7111970584f804107",
    "ResNet101": "f1aeb4b969a6efcfb50fad2f0c20cfc5",
    "ResNet152": "100835be76be38e30d865e96f2aaae62",
    "ResNet50V2": "3ef43a0b657b3be2300d5770ece849e0",
    "ResNet101V2": "6343647c601c52e1368623803854d971",
    "ResNet152V2": "a49b44d1979771252814e80f8ec446f9",
}
# {network: the sha256's first digits of the first weights, of the second}
_TORCHVISION = {
    "resnet18": "f37072fd",
    "resnet34": "b627a593",
    "resnet50": "0676ba61 11ad3fa6",
    "resnet101": "63fe2227 cd907fc2",
    "resnet152": "394f9c45 f82ba261",
    "resnext50_32x4d": "7cdf4587 1a0047aa",
    "resnext101_32x8d": "8ba56ff5 110c445d",
    "resnext101_64x4d": "173b62eb",
    "wide_resnet50_2": "95faca4d 9ba9bcbe",
    "wide_resnet101_2": "32ee1156 d733dc28",
}
# {network that torchvision has no weights of: the most accurate of timm's on ImageNet's classes}
_TIMM = {f"resnet{depth}d": "ra2" for depth in (18, 34, 101, 152, 200)}
_TIMM |= {"resnet50d": "a1", "seresnet50": "ra2"}


def _timm(network: str, name: str) -> Published:
    return Published(network, f"timm/{name}", f"hf://timm/{network}.{name}_in1k")


def _entries() -> Iterator[Published]:
    base = "https://storage.googleapis.com/tensorflow/keras-applications/resnet"
    for network, md5 in _KERAS.items():
        url = f"{base}/{network.lower()}_weights_tf_dim_ordering_tf_kernels.h5"
        how = KERAS_V2 if network.endswith("V2") else KERAS_V1
        yield Published(network, "keras", url, f"keras-{network}.h5", f"md5:{md5}", how)
    for network, row in _TORCHVISION.items():
        for version, sha256 in enumerate(row.split(), 1):
            tag, name = f"tv_v{version}", f"{network}-{sha256}.pth"
            url = f"https://download.pytorch.org/models/{name}"
            # The first weights of resnext101_64x4d are already of the newer recipe.
            newer = version == 2 or network == "resnext101_64x4d"
            how = dataclasses.replace(TORCH, resize=232) if newer else TORCH
            yield Published(network, tag, url, f"{tag}-{name}", f"sha256:{sha256}", how)
    for network, name in _TIMM.items():
        yield _timm(network, name)
    # As preprocessor_config.json says in repositories that are tuned from microsoft/resnet-50:
    # size 224, crop_pct 0.875, resample 3 (bicubic).
    how = dataclasses.replace(TORCH, interpolation="bicubic")
    for depth in (18, 34, 50, 101, 152):
        url = f"hf://microsoft/resnet-{depth}"
        yield Published(f"resnet{depth}", "hf", url, preprocessing=how)


@functools.cache
def _all() -> dict[str, dict[str, Published]]:
    """{network: {tag: its weights}}."""
    table: dict[str, dict[str, Published]] = {}
    for entry in _entries():
        table.setdefault(entry.network, {})[entry.tag] = entry
    for depth in (50, 101, 152):
        table[f"resnet{depth}"]["keras"] = table[f"ResNet{depth}"]["keras"]
        table[f"resnet{depth}_v1"] = table[f"ResNet{depth}"]
        table[f"resnet{depth}_v2"] = table[f"ResNet{depth}V2"]
    for depth in (18, 34):  # without bottlenecks v1 and v1.5 are one network
        table[f"resnet{depth}_v1"] = table[f"resnet{depth}"]
    return table
