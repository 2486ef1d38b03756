"""The table of published weights: whole entries, the tags' meanings, how images are prepared."""

import dataclasses
import re

import pytest

from flax_resnet import models
from flax_resnet.data.preprocess import KERAS_V1, KERAS_V2, TORCH
from flax_resnet.errors import UserError
from flax_resnet.weights import published
from flax_resnet.weights.imagenet import imagenet_classes

PAIRS = [(network, tag) for network in models.names() for tag in published.tags(network)]
ENTRIES = {entry.url: entry for entry in (published.find(*pair) for pair in PAIRS)}.values()


def test_every_entry_is_whole():
    assert len(ENTRIES) == 35
    counts = {tag: sum(e.tag == tag for e in ENTRIES) for tag in ("keras", "tv_v1", "tv_v2", "hf")}
    assert counts == {"keras": 6, "tv_v1": 10, "tv_v2": 7, "hf": 5}
    files = [entry for entry in ENTRIES if entry.filename]
    assert len({entry.filename.lower() for entry in files}) == len(files) == 23
    for entry in ENTRIES:
        assert entry.network in models.names()
        assert entry == published.find(entry.network, entry.tag)
        if entry.tag == "keras":
            assert re.fullmatch("md5:[0-9a-f]{32}", entry.checksum)
            assert re.fullmatch(r"https://storage\.googleapis\.com/.*_kernels\.h5", entry.url)
        elif entry.tag.startswith("tv_"):
            digits = entry.checksum.removeprefix("sha256:")
            assert re.fullmatch("[0-9a-f]{8}", digits)
            assert entry.url.endswith(f"/models/{entry.network}-{digits}.pth")
        else:
            assert re.fullmatch("hf://(timm|microsoft)/[a-z0-9_.-]+", entry.url)


def test_preprocessing_is_the_publishers():
    newer = dataclasses.replace(TORCH, resize=232)
    wanted = {
        ("resnet50", "tv_v1"): TORCH,
        ("resnet50", "tv_v2"): newer,
        ("resnext101_64x4d", "tv_v1"): newer,
        ("ResNet101", "keras"): KERAS_V1,
        ("resnet50_v2", "imagenet"): KERAS_V2,
        ("resnet50", "hf"): dataclasses.replace(TORCH, interpolation="bicubic"),
        ("resnet50", "timm/a1"): None,
    }
    assert {pair: published.find(*pair).preprocessing for pair in wanted} == wanted


def test_default_tags():
    wanted = {
        "ResNet50": "keras", "ResNet152V2": "keras", "resnet50_v1": "keras", "resnet18": "tv_v1",
        "resnet50": "tv_v2", "resnext101_64x4d": "tv_v1", "resnet18d": "timm/ra2",
        "resnet50d": "timm/a1", "seresnet50": "timm/ra2", "resnet20": None,
    }  # fmt: skip
    assert {name: published.default_tag(name) for name in wanted} == wanted
    assert published.find("resnet50", "imagenet").tag == "tv_v2"
    assert published.find("resnet18_v1").network == "resnet18"
    entry = published.find("resnet50d", "timm/new")
    assert (entry.network, entry.url) == ("resnet50d", "hf://timm/resnet50d.new_in1k")


@pytest.mark.parametrize(
    ("network", "tag", "message"),
    [
        ("resnet50", "tv_v3", r"'tv_v3' of resnet50 .*mean 'tv_v[12]'.*imagenet \(tv_v2"),
        ("resnet50", "a1", "tv_v2, hf, keras, timm/NAME, or a path"),
        ("resnet56", "imagenet", "'resnet56' has no published weights.*ResNet50.*seresnet"),
        ("resnet5", "timm/a1", "unknown network 'resnet5'|'resnet5'"),
    ],
)
def test_an_unknown_tag_or_network_is_one_line(network, tag, message):
    with pytest.raises(UserError, match=message):
        published.find(network, tag)


def test_weights_are_known_by_where_they_come_from():
    entry = published.find("resnet50", "tv_v1")
    for name in (entry.filename, "resnet50-0676ba61.pth"):
        assert published.find_source(name) is entry
    entry = published.find("resnet50", "hf")
    assert published.find_source("hf://microsoft/resnet-50") is entry
    assert published.find_source("model.safetensors") is None


def test_imagenet_classes_are_a_thousand_in_the_usual_order():
    names = imagenet_classes()
    assert len(names) == len(set(names)) == 1000
    spots = {0: "tench", 134: "crane bird", 207: "golden retriever", 517: "construction crane",
             638: "maillot", 639: "tank suit", 999: "toilet tissue"}  # fmt: skip
    assert {i: names[i] for i in spots} == spots
    assert all(name == name.strip() and name for name in names)
