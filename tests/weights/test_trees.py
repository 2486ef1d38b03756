"""The network in a checkpoint as trainers write it: found, or one line says how to say which."""

import argparse
import collections
import dataclasses
import datetime
import enum
import functools
import os
import pathlib
import random
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
from helpers import assert_trees_equal
from safetensors.numpy import load_file, save_file
from torch_files import ATTACKS, in_state_dict, number, text, whole, write_zip
from weights_helpers import saved

import flax_resnet
from flax_resnet.errors import Note, UserError
from flax_resnet.models import create
from flax_resnet.weights.reading import open_file, read_weights

NET = {"stage_sizes": (1, 1), "num_filters": 4, "num_classes": 5}


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Settings:
    rate: float = 0.1


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """(torchvision's names and arrays of a small network, its variables)."""
    path, variables = saved(tmp_path_factory.mktemp("net"), create("resnet18", **NET))
    return load_file(path), variables


def below(prefix, tensors, by=1.0):
    return {prefix + name: by * array for name, array in tensors.items()}


def read(path, words=()):
    """(the network, its variables); the one note has these words, or there is none."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module, variables = read_weights(path)
    notes = [str(w.message) for w in caught if issubclass(w.category, Note)]
    assert [word for word in words if word not in "".join(notes)] == [], notes
    assert len(notes) == bool(words), notes
    return module, variables


def without(tensors, start):
    return {name: array for name, array in tensors.items() if not name.startswith(start)}


def renamed(tensors, pattern, new):
    return {re.sub(pattern, new, name): array for name, array in tensors.items()}


ONE, FOUR_BY_8 = np.ones(1, np.float32), np.ones((4, 8), np.float32)
CHILDREN = (r"^conv1", "0"), (r"^bn1", "1"), (r"^layer1", "4"), (r"^layer2", "5")


def children(tensors):
    return functools.reduce(lambda t, pair: renamed(t, *pair), CHILDREN, tensors)


# {name: (change of the tensors, words of the note, whether the head is read)}
PREFIXES = {
    "encoder": (lambda t: below("module.encoder.", t) | {"n_averaged": np.array(3)}, [], True),
    "FSDP": (lambda t: renamed(t, r"^layer1\.0\.", "layer1._fsdp_wrapped_module.0."), [], True),
    "criterion": (
        lambda t: below("model.", t) | {"criterion.weight": ONE},
        ["under 'model'", "left out: criterion.weight"], True,
    ),
    "buffers": (lambda t: t | {"mean": ONE, "std": ONE}, ["left out: mean, std"], True),
    "mmpretrain": (
        lambda t: below("backbone.", without(t, "fc.")) | below("head.", {
            k: t[k] for k in ("fc.weight", "fc.bias")}), [], True,
    ),
    "classifier": (
        lambda t: below("net.trunk.", without(t, "fc."))
        | {"net.classifier.1.weight": t["fc.weight"], "net.classifier.1.bias": t["fc.bias"]},
        [], True,
    ),
    "children": (lambda t: renamed(children(t), r"^fc", "9"), [], True),
    "fastai": (
        lambda t: below("0.", children(without(t, "fc."))) | {"1.2.weight": ONE, "1.2.bias": ONE},
        ["under '0'", "left out: 1 (2 tensors)"], False,
    ),
    "SimCLR": (
        lambda t: below("backbone.", without(t, "fc.")) | {"projector.0.weight": FOUR_BY_8},
        ["left out: projector.0.weight"], False,
    ),
    "DINO": (
        lambda t: below("backbone.", without(t, "fc."))
        | {"head.mlp.0.weight": FOUR_BY_8, "head.last_layer.weight_v": FOUR_BY_8},
        ["left out: head (2 tensors)"], False,
    ),
    "shadow": (
        lambda t: below("net.", t) | below("ema.shadow.", {
            k: x for k, x in t.items() if "running" not in k}),
        ["under 'net'; left out: ema (20 tensors)"], True,
    ),
    "dropout": (lambda t: renamed(t, r"^fc\.", "fc.1."), [], True),
    "no bias": (lambda t: without(t, "fc.bias"), [], True),
}  # fmt: skip


@pytest.mark.parametrize("name", PREFIXES)
def test_the_network_is_found_below_any_prefix(tmp_path, net, name):
    change, words, head = PREFIXES[name]
    save_file(change(net[0]), tmp_path / "net.safetensors")
    module, found = read(tmp_path / "net.safetensors", words)
    want = dict(net[1]["params"])
    if name == "no bias":
        want["head"] = {**want["head"], "bias": np.zeros(5, np.float32)}
    if not head:
        del want["head"]
    assert module.include_top == head
    assert_trees_equal(found, {**net[1], "params": want})


def bias(path):
    return read_weights(path)[1]["params"]["head"]["bias"]


# {name: (prefixes, each with what the tensors are multiplied by; the default, or None to ask)}
SEVERAL = {
    "timm": ({"state_dict": 1, "state_dict_ema": 2}, "state_dict_ema"),
    "torchvision": ({"model": 1, "model_ema.module": 2}, "model_ema"),
    "at the top": ({"": 1, "ema": 2}, "ema"),
    "MoCo": ({"state_dict.module.encoder_q": 1, "state_dict.module.encoder_k": 2}, None),
    "DINO": ({"student.module.backbone": 1, "teacher.backbone": 2}, None),
    "three": ({"model": 1, "model_ema": 2, "best": 3}, None),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_of_several_networks_the_average_is_read_or_the_caller_is_asked(tmp_path, net, name):
    """What the message names is read by it."""
    places, default = SEVERAL[name]
    tensors, path = {}, tmp_path / "a b.safetensors"
    for place, by in places.items():
        tensors |= below(f"{place}." if place else "", net[0], by)
    save_file(tensors, path)
    if default is None:
        with pytest.raises(UserError, match=f"holds {len(places)} networks: say which") as raised:
            read_weights(path)
        message = str(raised.value)
    else:
        with pytest.warns(Note, match=f"averaged weights were read, '{default}") as noted:
            np.testing.assert_array_equal(bias(path), 2 * net[0]["fc.bias"])
        message = str(noted[0].message)
    told = re.findall(rf"{re.escape(str(path))}#[\w.]*", message)
    assert len(told) == len(places) - (default is not None)
    for address in told:
        prefix = next(p for p in places if address.partition("#")[2] == p)
        with pytest.warns(Note, match="left out: "):
            np.testing.assert_array_equal(bias(address), places[prefix] * net[0]["fc.bias"])
        assert flax_resnet.weights.is_path(address)
    with pytest.raises(UserError, match="0 of the networks here are named 'other'"):
        read_weights(f"{path}#other")


def test_a_name_that_is_not_needed_is_refused_and_a_mark_in_a_path_is_read(tmp_path, net):
    save_file(net[0], tmp_path / "run#1.safetensors")
    assert_trees_equal(read(tmp_path / "run#1.safetensors")[1], net[1])
    path, _ = saved(tmp_path, create("resnet18", **NET))
    with pytest.raises(UserError, match="holds one network: give the path without #model"):
        read_weights(f"{path}#model")


def dense(net, *layers):
    """The network with dense layers of these names and widths in place of its head."""
    tensors, width = without(net[0], "fc."), net[0]["fc.weight"].shape[1]
    for name, units in layers:
        tensors[f"{name}.weight"] = np.full((units, width), 0.5, np.float32)
        tensors[f"{name}.bias"] = np.arange(units, dtype=np.float32)
        width = units
    return tensors


@pytest.mark.parametrize("names", [("fc.0", "fc.3", "fc.10"), ("head.a", "head.b", "head.c")])
def test_several_dense_layers_are_hidden_units(tmp_path, net, names):
    path = tmp_path / "net.safetensors"
    save_file(dense(net, *zip(names, (6, 7, 3), strict=True)), path)
    module, variables = read(path, ["fc.", "are read as dense layers with ReLU between"])
    assert (module.hidden_units, module.num_classes) == ((6, 7), 3)
    assert variables["params"]["hidden2"]["kernel"].shape == (6, 7)
    np.testing.assert_array_equal(variables["params"]["head"]["bias"], [0, 1, 2])


@pytest.mark.parametrize(
    "extra",
    [
        {"fc.1.weight": np.ones((3, 3), np.float32)},  # with nothing between
        {"fc.1.weight": ONE, "fc.1.running_mean": ONE},
        {"fc.2.weight": np.ones((3, 4), np.float32)},
        {"fc.weight_g": ONE},
    ],
)
def test_a_head_of_another_kind_is_named_and_can_be_left(tmp_path, net, extra):
    path = tmp_path / "net.safetensors"
    save_file(dense(net, ("fc.0", 3)) | extra, path)
    with pytest.raises(UserError, match=re.escape(f"fc.0.weight, {min(extra)}")):
        read_weights(path)
    module, variables = read_weights(path, include_top=False)
    assert not module.include_top
    assert "head" not in variables["params"]


@pytest.mark.parametrize(
    "name", ["fc2.weight", "layer3x.weight", "layer1.0.conv1.bias", "attention.conv.weight"]
)
def test_what_may_be_a_part_of_the_network_is_no_extra(tmp_path, net, name):
    path = tmp_path / "net.safetensors"
    save_file(net[0] | {name: np.ones((4, 4, 1, 1), np.float32)}, path)
    with pytest.raises(UserError, match=re.escape(name)) as raised:
        read_weights(path)
    assert str(raised.value).startswith(f"{path}: ")


# --- what lies beside the tensors in a pickle ---------------------------------------------------


def test_an_attack_beside_a_network_is_an_inert_value(tmp_path, monkeypatch, net):
    """Whatever a pickle calls there, the network is read and nothing has run."""
    monkeypatch.chdir(tmp_path)
    storages = {str(i): x for i, x in enumerate(net[0].values())}
    items = b"".join(
        text(k) + whole(i, x) for i, (k, x) in zip(storages, net[0].items(), strict=True)
    )
    read_names = set()
    for name, attack in ATTACKS.items():
        body = attack + b"s" + text("net") + b"}(" + items + b"u"
        write_zip(tmp_path / "net.pth", in_state_dict(body), storages)
        try:
            assert_trees_equal(read(tmp_path / "net.pth")[1], net[1])
            read_names.add(name)
        except UserError as error:
            assert "copy it again" in str(error)  # noqa: PT017
    assert {"reduce", "eval", "stack global", "newobj", "newobj ex", "load"} <= read_names
    assert not (tmp_path / "marker").exists()


def test_a_tensor_of_an_unknown_class_is_refused_by_name(tmp_path, net):
    storages = {str(i): x for i, x in enumerate(net[0].values())}
    items = [text(k) + whole(str(i), x) for i, (k, x) in enumerate(net[0].items())]
    items[0] = text(next(iter(net[0]))) + b"cmy.kinds\nSparse\n" + number(3) + b"\x85R"
    body = b"\x80\x02}(" + b"".join(items) + b"u."
    write_zip(tmp_path / "net.pth", body, storages)
    with pytest.raises(UserError, match=r"missing.*'bn1.bias' is my\.kinds\.Sparse"):
        read_weights(tmp_path / "net.pth")


def bookkeeping(torch):
    """What trainers keep beside a network's tensors."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    return {
        "args": argparse.Namespace(lr=0.1, path=pathlib.Path("x")),
        "best": np.float64(71.2), "steps": np.int64(3), "curve": np.arange(5),
        "keys": {np.int64(1): 2},
        "when": datetime.datetime(2020, 1, 1), "colour": Colour.RED, "settings": Settings(),
        "set": {1, 2}, "frozen": frozenset("ab"), "counter": collections.Counter("aab"),
        "kind": torch.float16, "device": torch.device("cpu"), "size": torch.Size([1, 2]),
        "python": random.Random(0).getstate(), "numpy": np.random.RandomState(0).get_state(),
        "torch": torch.get_rng_state(), "optimizer": optimizer.state_dict(),
        "function": os.path.join, "pairs": {(1, 2): 3, None: 4, 1.5: 5}, "bytes": b"ab", "c": 1j,
        "ints": torch.arange(6), "range": range(3), "slots": collections.deque([1, 2]),
    }  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"pickle_protocol": 4},
                                     {"_use_new_zipfile_serialization": False}])  # fmt: skip
@pytest.mark.parametrize("kind", [dict, collections.OrderedDict])
def test_bookkeeping_of_trainers_lies_beside_a_network(tmp_path, net, kind, options):
    torch = pytest.importorskip("torch")
    tensors = kind((name, torch.from_numpy(x)) for name, x in net[0].items())
    tensors["conv1.weight"] = torch.nn.Parameter(tensors["conv1.weight"])
    tensors["fc.bias"].note = "a tensor with an attribute"
    tensors["fc.weight"] = tensors["fc.weight"].T.contiguous().T
    path = tmp_path / "checkpoint.pth.tar"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({"epoch": 3, **bookkeeping(torch), "state_dict": tensors}, path, **options)
    assert_trees_equal(read(path, ["under 'state_dict'", "optimizer (3 tensors)"])[1], net[1])


def test_a_pickled_module_is_refused_with_a_line_that_works(tmp_path, monkeypatch, net):
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    module = torch.nn.Sequential(collections.OrderedDict(conv=torch.nn.Conv2d(3, 4, 3)))
    for root in (module, {"epoch": 3, "model": module}):
        torch.save(root, "whole.pt")
        with pytest.raises(UserError, match=r"torch\.nn\.modules\.container\.Sequential") as raised:
            read_weights("whole.pt")
        assert "\n" not in str(raised.value)
    advice = re.search("`(.*)`", str(raised.value))[1]
    module.state_dict = lambda: {name: torch.from_numpy(x) for name, x in net[0].items()}
    exec(advice, {"torch": torch, "net": module})
    assert_trees_equal(read("net.pth")[1], net[1])


@pytest.mark.slow
def test_the_command_line_says_what_was_read(tmp_path, net):
    """One line, and the line that it prints converts the other network."""
    source, dest = tmp_path / "timm.safetensors", tmp_path / "out.safetensors"
    save_file(below("state_dict.", net[0]) | below("state_dict_ema.", net[0], 2), source)
    address, notes, biases = str(source), [], []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-m", "flax_resnet", "convert", address, dest, "--overwrite"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        biases.append(open_file(dest).variables["params"]["head"]["bias"])
        notes += [line for line in done.stderr.splitlines() if "prepared" not in line]
        address = re.search(rf"{source}#\w+", notes[0])[0]
    assert len(notes) == 2
    assert notes[0].startswith(f"note: {source}: the averaged weights were read")
    np.testing.assert_array_equal(biases, [2 * net[0]["fc.bias"], net[0]["fc.bias"]])
