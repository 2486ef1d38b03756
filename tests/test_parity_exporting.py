"""Exported safetensors in torch: loaded strictly, to the same outputs."""

import dataclasses

import numpy as np
import pytest
from exporting_helpers import CIFAR, PHOTO, named, opened, own_logits
from parity_helpers import assert_close, channels_first, torch
from safetensors.torch import load_file
from test_parity_families import R50, Spec, TorchNet

import flax_resnet
from flax_resnet.augment import normalize
from flax_resnet.errors import UserError
from flax_resnet.exporting import to_torch

NETS = {
    "basic": (named("resnet18", stage_sizes=(1, 1)), PHOTO),
    "v1, output stride 8": (
        named("resnet50_v1", stage_sizes=(1, 2, 2), output_stride=8),
        PHOTO,
    ),
    "ResNeXt": (named("resnext50_32x4d", stage_sizes=(2, 1), num_filters=16), PHOTO),
    "option A": (named("resnet20", stage_sizes=(2, 2, 1)), CIFAR),
    "plain": (named("plain20", stage_sizes=(1, 1)), CIFAR),
    "biases": (named("resnet50", stage_sizes=(1, 1), conv_bias="all"), PHOTO),
}


@pytest.mark.parametrize("name", NETS)
def test_torch_computes_the_file(name, tmp_path):
    exported = flax_resnet.export(opened(*NETS[name]), tmp_path / "a.safetensors")
    assert exported.by == f"torch {torch.__version__}"
    assert exported.difference.largest < 1e-5


def test_a_file_that_differs_is_refused(monkeypatch, tmp_path):
    source = opened(*NETS["basic"])
    write = to_torch.convert.convert

    def another(opened_, path):
        variables = {**opened_.variables, "params": {**opened_.variables["params"]}}
        head = variables["params"]["head"]
        variables["params"]["head"] = {**head, "bias": head["bias"] + 1}
        return write(dataclasses.replace(opened_, variables=variables), path)

    monkeypatch.setattr(to_torch.convert, "convert", another)
    with pytest.raises(UserError, match=r"the export is not the network.*\(torch "):
        flax_resnet.export(source, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "spec"),
    [
        ({"num_filters": 8, "num_classes": 10}, Spec(True, R50, filters=8, classes=10)),
        pytest.param({}, Spec(True, R50), marks=pytest.mark.slow),
    ],
)
def test_torchvisions_network_takes_the_file(rng, tmp_path, fields, spec):
    """Of its names, and of every one of them: the reference has torchvision's modules."""
    source = opened(flax_resnet.create("resnet50", **fields), PHOTO, class_names=None)
    flax_resnet.export(source, tmp_path / "a.safetensors")
    with torch.device("meta"):
        model = TorchNet(spec)
    state = load_file(tmp_path / "a.safetensors")
    counters = [name for name in model.state_dict() if name.endswith("num_batches_tracked")]
    model.load_state_dict({**state, **dict.fromkeys(counters, torch.tensor(0))}, assign=True)
    images = rng.integers(0, 256, (2, *PHOTO.shape), dtype=np.uint8)
    with torch.no_grad():
        x = channels_first(normalize(images, PHOTO.statistics()))
        outputs = model.eval()(x)
    got = list(outputs.values())[-1].numpy()
    assert_close(got, own_logits(source, images), rtol=1e-5)
