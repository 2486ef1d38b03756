import re
import urllib.parse

import pytest

from flax_resnet import models
from flax_resnet.errors import UserError
from flax_resnet.preprocess import KERAS_V1, KERAS_V2, TORCH
from flax_resnet.pretrained import published
from flax_resnet.pretrained.classes import imagenet_classes

NETWORKS = [name for name in models.names() if published.tags(name)]
PAIRS = [(network, tag) for network in NETWORKS for tag in published.tags(network)]
ENTRIES = list({e.filename: e for e in (published.find(*pair) for pair in PAIRS)}.values())


def test_there_are_weights_of_every_family():
    assert len(ENTRIES) == 115
    counts = {tag: sum(e.tag == tag for e in ENTRIES) for tag in ("keras", "tv_v1", "tv_v2", "hf")}
    assert counts == {"keras": 6, "tv_v1": 10, "tv_v2": 7, "hf": 5}


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.filename)
def test_an_entry_is_whole(entry):
    url = urllib.parse.urlsplit(entry.url)
    assert url.scheme == "https"
    assert re.fullmatch(r"[\w.-]+", url.netloc)
    assert re.fullmatch(r"(/[\w.-]+)+\.(pth|h5|safetensors)", url.path)
    assert not url.query + url.fragment
    assert re.fullmatch(r"[\w.-]+", entry.filename)
    assert entry.filename.endswith(url.path[url.path.rindex(".") :])
    assert entry.network in models.names()
    assert entry == published.find(entry.network, entry.tag)
    assert entry.licence in {"MIT", "BSD", "BSD-3-Clause", "Apache-2.0", "CC-BY-NC-4.0"}
    assert entry.top1 is None or 60 < entry.top1 < 90
    how = entry.preprocessing
    assert how.size in (224, 288, 320)
    assert how.resize is None or how.size <= how.resize < 1.2 * how.size
    assert how.channels == 3


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.filename)
def test_a_checksum_is_what_its_host_gives(entry):
    name = entry.url.rpartition("/")[2]
    if entry.url.startswith("https://huggingface.co/"):
        assert entry.checksum is None
        assert "/resolve/main/model.safetensors" in entry.url
    elif entry.tag == "keras":
        assert entry.checksum.algorithm == "md5"
        assert re.fullmatch("[0-9a-f]{32}", entry.checksum.value)
    else:
        assert name == f"{entry.network}-{entry.checksum.value}.pth"
        assert entry.checksum.algorithm == "sha256"
        assert re.fullmatch("[0-9a-f]{8}", entry.checksum.value)


def test_filenames_are_unique_even_where_case_is_ignored():
    found = [published.find(*pair) for pair in PAIRS]
    assert len({e.filename.lower() for e in found}) == len(set(found)) == len(ENTRIES)
    assert len({e.url for e in ENTRIES}) == len(ENTRIES)


@pytest.mark.parametrize(
    ("network", "tag", "size", "resize", "interpolation"),
    [
        ("resnet50", "tv_v1", 224, 256, "bilinear"),
        ("resnet50", "tv_v2", 224, 232, "bilinear"),
        ("resnext101_64x4d", "tv_v1", 224, 232, "bilinear"),
        ("resnet50", "hf", 224, 256, "bicubic"),
        ("resnet50", "timm/a1", 288, 288, "bicubic"),
        ("resnet50", "timm/a3", 224, 235, "bicubic"),
        ("resnet50", "timm/a1h", 224, 224, "bicubic"),
        ("resnet101", "timm/a1h", 288, 288, "bicubic"),
        ("resnet50", "timm/ra", 288, 303, "bicubic"),
        ("resnet50", "timm/tv2", 224, 232, "bilinear"),
        ("resnet50", "timm/gluon", 224, 256, "bicubic"),
        ("resnet18", "timm/fb_swsl_ig1b_ft", 224, 256, "bilinear"),
        ("resnet18d", "timm/ra2", 288, 303, "bicubic"),
        ("resnet200d", "timm/ra2", 320, 320, "bicubic"),
    ],
)
def test_preprocessing_is_the_publishers(network, tag, size, resize, interpolation):
    how = published.find(network, tag).preprocessing
    assert (how.size, how.resize, how.interpolation) == (size, resize, interpolation)
    assert (how.mean, how.std, how.bgr) == (TORCH.mean, TORCH.std, False)


def test_preprocessing_of_keras_and_of_halves():
    assert published.find("ResNet101").preprocessing is KERAS_V1
    assert published.find("ResNet101V2").preprocessing is KERAS_V2
    how = published.find("resnet50d", "timm/ra4_e3600_r224").preprocessing
    assert (how.mean, how.std, how.size) == ((0.5,) * 3, (0.5,) * 3, 288)


def test_keras_weights_of_the_papers_names_are_those_of_keras_networks():
    for name in ("resnet50", "resnet50_v1", "ResNet50"):
        assert published.find(name, "keras").network == "ResNet50"
    assert published.find("resnet50_v2", "keras") is published.find("ResNet50V2", "keras")
    assert published.find("resnet18_v1").network == "resnet18"


def test_default_tags():
    wanted = {
        "ResNet50": "keras",
        "ResNet152V2": "keras",
        "resnet50_v1": "keras",
        "resnet50_v2": "keras",
        "resnet18": "tv_v1",
        "resnet50": "tv_v2",
        "resnext101_64x4d": "tv_v1",
        "resnet18d": "timm/ra2",
        "resnet50d": "timm/a1",
        "seresnet50": "timm/ra2",
        "resnet20": None,
    }
    assert {name: published.default_tag(name) for name in wanted} == wanted
    assert published.find("resnet50", "imagenet").tag == "tv_v2"
    assert published.find("resnet50").top1 == 80.858
    assert published.tags("resnet20") == ()


def test_an_unknown_tag_is_one_line_with_the_known_ones():
    with pytest.raises(
        UserError, match=r"'tv_v3' of resnet50 .*mean 'tv_v[12]'.*imagenet \(which "
    ):
        published.find("resnet50", "tv_v3")
    with pytest.raises(UserError, match=r"'timm/a1' of resnet18d .*timm/ra2, timm/ra4_e3600_r224"):
        published.find("resnet18d", "timm/a1")
    with pytest.raises(UserError, match="mean 'timm/a1'"):
        published.find("resnet50", "a1")


def test_a_network_without_weights_is_one_line_with_those_that_have_some():
    with pytest.raises(UserError, match=r"'resnet56' has no published weights.*ResNet50.*seresnet"):
        published.find("resnet56", "imagenet")


def test_a_file_is_known_by_its_name():
    entry = published.find("resnet50", "tv_v1")
    assert published.find_file("resnet50-0676ba61.pth") is entry
    assert published.find_file(entry.filename) is entry
    assert published.find_file("timm_a1-resnet50.safetensors") == published.find(
        "resnet50", "timm/a1"
    )
    assert published.find_file("model.safetensors") is None


def test_imagenet_classes_are_a_thousand_in_the_usual_order():
    names = imagenet_classes()
    assert len(names) == len(set(names)) == 1000
    spots = {0: "tench", 207: "golden retriever", 281: "tabby", 999: "toilet tissue"}
    assert {i: names[i] for i in spots} == spots
    assert (names[134], names[517]) == ("crane bird", "construction crane")
    assert (names[638], names[639]) == ("maillot", "tank suit")
    assert all(name == name.strip() and name for name in names)


def test_a_repository_of_the_hub_is_known_by_its_name():
    found = published.find_repository("timm/resnet50.a1_in1k")
    assert (found.network, found.tag) == ("resnet50", "timm/a1")
    assert published.find_repository("timm/resnet50.a1") is None
    assert published.find_repository("me/net") is None
