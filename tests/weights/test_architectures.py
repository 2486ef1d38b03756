"""Networks that are like a ResNet and compute something else are refused by what differs."""

import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from weights_helpers import SMALL, saved, without_description

from flax_resnet.errors import UserError
from flax_resnet.models import create
from flax_resnet.weights import architectures
from flax_resnet.weights.reading import open_file

ONE = np.ones((8, 8, 1, 1), np.float32)


def with_tensor(name, shape=(8, 8, 1, 1)):
    return lambda t: {**t, name: np.ones(shape, np.float32)}


def renamed(pattern, new):
    return lambda t: {re.sub(pattern, new, name): tensor for name, tensor in t.items()}


OTHERS = {
    "ECA": (with_tensor("layer1.0.se.conv.weight", (1, 1, 3)), "efficient channel attention"),
    "SKNet": (renamed(r"(layer\d\.0\.conv2)", r"\1.paths.0.conv"), "selective kernels"),
    "ResNeSt": (renamed(r"(layer\d\.0\.conv2)", r"\1.conv"), "split attention"),
    "Res2Net": (renamed(r"(layer\d\.0)\.conv2", r"\1.convs.0"), "Res2Net"),
    "CBAM": (with_tensor("layer1.0.se.channel.fc1.weight"), "CBAM"),
    "GC": (with_tensor("layer1.0.se.conv_attn.weight"), "global context"),
    "legacy SE": (with_tensor("layer1.0.se_module.fc1.weight"), "Caffe's SE-ResNet"),
    "IBN": (renamed(r"(layer1\.0\.bn1)", r"\1.IN"), "instance normalisation"),
    "lpf": (with_tensor("layer2.0.conv3.0.filt"), "blur pooling"),
    "RS": (with_tensor("maxpool.0.weight"), "in place of the stem's max-pool"),
    "CLIP": (with_tensor("visual.attnpool.q_proj.weight"), "attention pooling"),
    "detectron2": (renamed(r"layer1\.0\.conv1", "res2.0.conv1"), "detectron2"),
    "ResNetV2": (renamed(r"layer1\.0\.", "stages.0.blocks.0."), "another family"),
    "group norm": (lambda t: {n: x for n, x in t.items() if "running" not in n},
                   "bn1.running_mean, bn1.running_var"),
    "t stem": (
        lambda t: {**t, **{f"conv1.{i}.weight": np.ones((n, 3, 3, 3), np.float32)
                           for i, n in ((0, 24), (3, 32), (6, 64))}},
        "conv1.0.weight (24, 3, 3, 3) for (32, 3, 3, 3)",
    ),
    "SE of timm's widths": (
        lambda t: {**t, "layer1.0.se.fc1.weight": np.ones((8, 32, 1, 1), np.float32),
                   "layer2.0.se.fc1.weight": np.ones((8, 64, 1, 1), np.float32)},
        "layer2.0.se.fc1.weight (8, 64, 1, 1) for (16, 64, 1, 1)",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    net = create("resnet50", stage_sizes=(1, 1), **SMALL)
    return without_description(saved(tmp_path_factory.mktemp("net"), net)[0])


@pytest.mark.parametrize("prefix", ["", "module.encoder."])
@pytest.mark.parametrize("name", OTHERS)
def test_other_blocks_are_refused_by_their_difference(tmp_path, plain, name, prefix):
    change, difference = OTHERS[name]
    path = tmp_path / "net.safetensors"
    save_file({prefix + n: np.copy(x) for n, x in change(load_file(plain)).items()}, path)
    with pytest.raises(UserError) as caught:
        open_file(path)
    assert difference in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    "name",
    ["resnetblur50-84f4748f.pth", "resnetaa50d.sw_in12k.pth", "ecaresnetaa50d.pth",
     "seresnextaa101d_32x8d.pth", "resnet50_lpf4-994b528f.pth", "resnetblur50/model.pth"],
)  # fmt: skip
def test_blur_pooling_is_known_by_name(tmp_path, plain, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(plain.read_bytes())
    with pytest.raises(UserError, match="blur pooling"):
        open_file(path)


@pytest.mark.parametrize("name", ["blurred_photos_resnet50", "resnext50_32x4d", "aa/resnet50"])
def test_other_names_are_no_blur_pooling(name):
    architectures.check_name(f"{name}.pth")


def test_blur_pooling_is_known_by_what_timm_saves(tmp_path, plain):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.tensor(x) for name, x in load_file(plain).items()}
    for arch in ("resnet50", "resnetblur50"):
        torch.save({"arch": arch, "state_dict": tensors}, tmp_path / "best.pth.tar")
        if arch == "resnet50":
            open_file(tmp_path / "best.pth.tar")
    with pytest.raises(UserError, match="by its name, resnetblur50: it has blur pooling"):
        open_file(tmp_path / "best.pth.tar")


def test_caffes_networks_stride_in_the_first_1x1(tmp_path, plain):
    path = tmp_path / "resnet50_caffe-788b5fa3.pth"
    path.write_bytes(plain.read_bytes())
    opened = open_file(path)
    assert (opened.module.stride_conv, opened.preprocessing, opened.assumed) == ("1x1", None, "")
