"""Weight files of every kind, whole, damaged and hostile: tensors or a UserError, never code."""

import contextlib
import json
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
import zlib

import h5py
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from flax_resnet.errors import UserError
from flax_resnet.weights.readers import torch_archive
from flax_resnet.weights.readers.tensors import MAX_HEADER, read_tensors

BFLOAT16 = ml_dtypes.bfloat16
MAGIC = torch_archive.LEGACY_MAGIC
ONES = np.ones(4, np.float32)


# Pickles written by hand, an opcode at a time.


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value):
    data = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def named(dotted):
    return "c{}\n{}\n".format(*dotted.rsplit(".", 1)).encode()


def many(*values):
    return b"(" + b"".join(values) + b"t"


def storage(key, kind, count, *extra):
    place = (text("storage"), named(f"torch.{kind}"), text(key), text("cpu"), number(count))
    return many(*place, *extra) + b"Q"


def tensor(run, size, stride, offset=0):
    view = (number(offset), many(*map(number, size)), many(*map(number, stride)))
    flags = (b"\x89", named("collections.OrderedDict") + b")R")
    return named("torch._utils._rebuild_tensor_v2") + many(run, *view, *flags) + b"R"


def whole(key, array, kind="FloatStorage"):
    stride = [step // array.itemsize for step in array.strides]
    return tensor(storage(key, kind, array.size), array.shape, stride)


def state(**tensors):
    items = b"".join(text(key) + value for key, value in tensors.items())
    versions = b"}" + text("_metadata") + named("collections.OrderedDict") + b")Rsb"
    return b"\x80\x02" + named("collections.OrderedDict") + b")R(" + items + b"u" + versions + b"."


def write_zip(path, pickled, storages=(), **extra):
    members = {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n", **extra}
    members |= {f"data/{key}": bytes(data) for key, data in dict(storages).items()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(f"net/{name}"), data)
    return path


def write_legacy(path, pickled, storages=(), little=True):
    head = [pickle.dumps(x, protocol=2) for x in (MAGIC, 1001, {"little_endian": little})]
    tail = pickle.dumps(sorted(dict(storages)), protocol=2)
    for _, array in sorted(dict(storages).items()):
        tail += struct.pack("<q", array.size) + array.tobytes()
    path.write_bytes(b"".join(head) + pickled + tail)
    return path


both = pytest.mark.parametrize("writer", [write_zip, write_legacy])
TWO = {"0": np.arange(6, dtype=np.float32).reshape(2, 3), "1": np.array([1.5, -2], np.float16)}
TWO_PICKLED = state(w=whole("0", TWO["0"]), b=whole("1", TWO["1"], "HalfStorage"))


def write_keras_h5(path, layers, root="/", names="layer_names"):
    """The legacy layout; ``layers`` is {layer: {weight name: array}}."""
    with h5py.File(path, "w") as file:
        group = file.require_group(root)
        group.attrs[names] = [layer.encode() for layer in layers]
        for layer, weights in layers.items():
            inner = group.create_group(layer)
            for name, array in weights.items():
                inner[name] = array
    return path


def write_keras3(path, layers):
    """Keras 3's layout; ``layers`` is {path of the layer: [arrays]}."""
    with h5py.File(path, "w") as file:
        file.create_group("vars")
        file["optimizer/vars/0"] = np.int32(7)
        for layer, arrays in layers.items():
            group = file.create_group(f"layers/{layer}/vars")
            for i, array in enumerate(arrays):
                dataset = group.create_dataset(str(i), data=array)
                if array.dtype == BFLOAT16:
                    dataset.attrs["dtype"] = "bfloat16"
    return path


def same(found, expected):
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        assert found[key].dtype == array.dtype
        assert found[key].shape == array.shape
        np.testing.assert_array_equal(found[key], array)


# Whole files.


def test_safetensors(tmp_path):
    tensors = {
        "half": np.ones((2, 3), np.float16),
        "brain": np.arange(4).astype(BFLOAT16),
        "one": np.array(3, np.float32),
        "double": np.arange(3.0),
    }
    path = tmp_path / "no_suffix"
    counter = {"bn.num_batches_tracked": np.array(5)}
    safetensors.numpy.save_file(tensors | counter, path, metadata={"arch": "resnet18"})
    found = read_tensors(path)
    assert (found.format, found.metadata) == ("safetensors", {"arch": "resnet18"})
    same(found.tensors, tensors)


@both
def test_torch_views_of_one_storage(tmp_path, writer):
    data = np.arange(120, dtype=np.float32)
    run = storage("7", "FloatStorage", 120)
    views = {
        "plain": tensor(run, (3, 4), (4, 1)),
        "transposed": tensor(run, (4, 3), (1, 4)),
        "part": tensor(run, (2, 2), (4, 2), offset=3),
        "scalar": tensor(run, (), (), offset=11),
        "odd": tensor(run, (1, 2), (2**62, 1)),
        "expanded": tensor(run, (3,), (0,), offset=5),
        "num_batches_tracked": tensor(storage("8", "LongStorage", 1), (), ()),
    }
    found = read_tensors(writer(tmp_path / "n", state(**views), {"7": data, "8": np.array([3])}))
    assert (found.format, found.metadata) == ("torch", {})
    square = data[:12].reshape(3, 4)
    part = np.array([[3, 5], [7, 9]], np.float32)
    expected = {"plain": square, "transposed": square.T, "part": part}
    expected |= {"odd": data[None, :2], "expanded": np.full(3, 5, np.float32)}
    same(found.tensors, {**expected, "scalar": data[11].reshape(())})


def test_torch_parameters(tmp_path):
    """Of 2016, made by their class, and of today."""
    run, ordered = storage("0", "FloatStorage", 4), named("collections.OrderedDict") + b")R"
    old = named("torch._utils._rebuild_tensor") + many(run, b"K\0", many(b"K\4"), many(b"K\1"))
    old = named("torch.nn.parameter.Parameter") + old + b"R\x85\x81"
    old += many(b"\x88", b"\x89", ordered) + b"b"
    new = named("torch._utils._rebuild_parameter") + many(whole("0", ONES), b"\x88", ordered) + b"R"
    path = write_legacy(tmp_path / "n", state(w=old, v=new, d=named("torch.float16")), {"0": ONES})
    same(read_tensors(path).tensors, {"w": ONES, "v": ONES})


@pytest.mark.parametrize("options", [{"pickle_protocol": 2}, {"pickle_protocol": 4},
                                     {"_use_new_zipfile_serialization": False}])  # fmt: skip
def test_torch_itself(tmp_path, options):
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
        values = dict(net.state_dict())
        values |= {
            "tied": values["0.weight"],
            "turned": values["0.weight"].permute(2, 3, 1, 0),
            "half": torch.arange(3).to(torch.float16),
            "brain": torch.arange(3).to(torch.bfloat16),
            "double": torch.ones(2, dtype=torch.float64),
            "parameter": net[0].weight,
        }
        path = tmp_path / "net.pth"
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        net(torch.ones(2, 3, 5, 5)).sum().backward()
        optimizer.step()
        checkpoint = {"epoch": 1, "optimizer": optimizer.state_dict(), "state_dict": values}
        torch.save(checkpoint, path, **options)
    expected = {k: v.detach().float().numpy() for k, v in values.items() if "tracked" not in k}
    dtypes = {"half": np.float16, "brain": BFLOAT16, "double": np.float64}
    expected = {k: v.astype(dtypes.get(k, np.float32)) for k, v in expected.items()}
    same(read_tensors(path).tensors, expected)


LAYERS = {
    "input": {},
    "conv1": {"conv1/kernel:0": np.ones((3, 3, 2, 4), np.float32)},
    "bn": {
        f"bn/{name}:0": np.arange(4, dtype=np.float32) + i
        for i, name in enumerate(("gamma", "beta", "moving_mean", "moving_variance"))
    },
    "bn_old": {"bn_old_running_std_1:0": ONES},
    "fc": {"fc_W": np.ones((4, 2), np.float16), "fc_b": np.ones((), np.float64)},
}


@pytest.mark.parametrize("root", ["/", "model_weights"])
@pytest.mark.parametrize("names", ["layer_names", "layer_names0"])
def test_keras_legacy(tmp_path, root, names):
    found = read_tensors(write_keras_h5(tmp_path / "w", LAYERS, root, names))
    assert found.format == "keras_h5"
    arrays = {layer: enumerate(weights.values()) for layer, weights in LAYERS.items()}
    want = {f"{layer}/{i}": array for layer, ws in arrays.items() for i, array in ws}
    want["bn_old/3"] = want.pop("bn_old/0")
    same(found.tensors, want)


KERAS_3 = {
    "conv2d": [np.ones((3, 3, 1, 2), np.float32), np.zeros(2, np.float32)],
    "conv2d_1": [np.arange(3).astype(BFLOAT16)],
    "functional/layers/dense": [np.ones((2, 3), ">f4"), np.ones((), np.float16)],
    "flatten": [],
}


def test_keras_3(tmp_path):
    path = write_keras3(tmp_path / "w.weights.h5", KERAS_3)
    with h5py.File(path, "a") as file:
        file["layers/dropout/seed_generator/vars/0"] = np.zeros(2, np.uint32)
    found = read_tensors(path)
    assert found.format == "keras_weights"
    expected = {f"{k}/{i}": a for k, arrays in KERAS_3.items() for i, a in enumerate(arrays)}
    same(found.tensors, {k: a.astype(a.dtype.newbyteorder("=")) for k, a in expected.items()})


# Files that are no weights: {name: (a function that writes one at a path, words of the message)}.


def content(data):
    return lambda path: path.write_bytes(data)


def zipped(*members, **options):
    def write(path):
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members:
                archive.writestr(name, data, **options)

    return write


def tensors_of(**tensors):
    return lambda path: safetensors.numpy.save_file(tensors, path)


KINDS = [".safetensors", "torch.save", ".weights.h5"]
OTHERS = {
    "missing": (lambda path: None, ["no such file"]),
    "directory": (lambda path: path.mkdir(), ["regular file"]),
    "pipe": (os.mkfifo, ["regular file"]),
    "empty": (content(b""), KINDS),
    "short": (content(b"\x80"), KINDS),
    "prose": (content(b"hello, world, this is text"), KINDS),
    "no ZIP": (content(b"PK\x05\x06"), KINDS),
    "another ZIP": (zipped(("readme.txt", "hello")), ["no state dict"]),
    "whole Keras model": (zipped(("model.weights.h5", "0"), compress_type=8), ["save_weights()"]),
    "TorchScript": (lambda path: write_zip(path, b"", **{"constants.pkl": b""}), ["TorchScript"]),
    "big-endian": (lambda path: write_zip(path, b"", byteorder=b"big"), ["little-endian"]),
    "old big-endian": (lambda path: write_legacy(path, b"", little=False), ["little-endian"]),
    "integers": (tensors_of(a=np.arange(3)), ["int64", "'a'"]),
    "terminal codes": (tensors_of(**{"a\x1b[2J": np.ones(1)}), [r"'a\x1b[2J'"]),
    "counters alone": (tensors_of(num_batches_tracked=np.array(1)), ["no weights"]),
    "no elements": (tensors_of(a=np.ones((2, 0), np.float32)), ["elements"]),
    "nine axes": (tensors_of(a=np.ones((1,) * 9, np.float32)), ["than 8 axes"]),
}


def header(entries, data=b"", length=None):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return content(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def sparse_header(path):
    with path.open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER + 1) + b"{")
        file.truncate(2**30)


SAFETENSORS = {
    "longer": header({"a": entry([1], 0, 4)}, length=2**63),
    "cut": header({"a": entry([4], 0, 16)}, bytes(15)),
    "more": header({"a": entry([4], 0, 16)}, bytes(17)),
    "claims": header({"a": entry([2**40], 0, 2**42)}, bytes(8)),
    "overflows": header({"a": entry([2**62, 2**62], 0, 8)}, bytes(8)),
    "negative": header({"a": entry([-2], 0, 8)}, bytes(8)),
    "overlaps": header({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)),
    "nests": header(b'{"a":' + b"[" * 100_000),
    "no JSON": header(b"{" + b"\xff" * 50),
    "rank": header({"a": entry([1] * 70, 0, 4)}, bytes(4)),
    "8 bits": header({"a": entry([8], 0, 8, "F8_E4M3")}, bytes(8)),
}


# Pickles: {name: (opcodes, words)}; each is put in a ZIP and in a legacy file.

ORDERED, PARAMETER = named("collections.OrderedDict"), named("torch.nn.parameter.Parameter")
SYSTEM, COMMAND = named("os.system"), text("echo > marker")
PLACE = (text("0"), text("cpu"), b"K\x02")
# Each would make a file marker in the working directory, were it run, or is like those that would.
ATTACKS = {
    "reduce": SYSTEM + many(COMMAND) + b"R",
    "posix": named("posix.system") + many(COMMAND) + b"R",
    "eval": named("builtins.eval") + many(text("open('marker', 'w')")) + b"R",
    "getattr": named("builtins.getattr") + many(text("x"), text("join")) + b"R",
    "stack global": b"\x8c\x02os\x8c\x06system\x93" + many(COMMAND) + b"R",
    "inst": b"(" + COMMAND + b"ios\nsystem\n",
    "obj": b"(" + SYSTEM + COMMAND + b"o",
    "newobj": named("subprocess.Popen") + many(COMMAND) + b"\x81",
    "newobj ex": named("subprocess.Popen") + many(COMMAND) + b"}\x92",
    "build": b")}" + text("__setstate__") + SYSTEM + b"sb",
    "build a function": ORDERED + b"}" + text("__defaults__") + b"Nsb",
    "build a list": b"]}b",
    "load": named("torch.storage._load_from_bytes") + many(COMMAND) + b"R",
    "dtype call": named("torch.float32") + many(COMMAND) + b"R",
    "storage call": named("torch.FloatStorage") + many(number(2**40)) + b"R",
    "call a text": COMMAND + b")R",
    "ext1": b"\x82\x01",
    "ext4": b"\x84\x01\0\0\0",
    "persid": b"Pos.system\n",
    "binpersid": COMMAND + b"Q",
    "persistent call": many(text("storage"), SYSTEM + many(COMMAND) + b"R", *PLACE) + b"Q",
    "persistent type": many(text("storage"), ORDERED, *PLACE) + b"Q",
    "module view": storage("0", "FloatStorage", 2, many(text("1"), b"K\0", b"K\1")),
    "buffer": b"\x97",
}
HARMLESS = {
    "newobj known": ORDERED + b")\x81",
    "newobj parameter": PARAMETER + b")\x81",
    "build tensor": tensor(storage("0", "FloatStorage", 2), (2,), (1,)) + b"}b",
    "build slots": ORDERED + b")RN}" + text("update") + number(1) + b"s\x86b",
}


def in_state_dict(body):
    return b"\x80\x02}" + text("w") + body + b"s."


def shared(count):
    """That many tensors that are one storage of 40,000 bytes."""
    turned = tensor(storage("big", "FloatStorage", 10**4), (100, 100), (1, 100))
    return state(**{f"t{i}": turned for i in range(count)})


LIMIT, DEPTH, RUN = torch_archive.MAX_PICKLE - 9, 30_000, storage("0", "FloatStorage", 4)
FOUR = whole("0", ONES)
PICKLES = {
    **{name: (in_state_dict(a), ["weights_only=True", "save_file"]) for name, a in ATTACKS.items()},
    **{name: (in_state_dict(body), []) for name, body in HARMLESS.items()},
    **{
        name: (b"\x80\x02" + body, words)
        for name, (body, words) in {
            "memo": (b"]r\xff\xff\xff\xffj\xff\xff\xff\xffa.", ["a list"]),
            "deep lists": (b"]" * DEPTH + b"a" * (DEPTH - 1) + b".", ["a list"]),
            "deep tuples": (b")" + b"\x85" * DEPTH + b".", ["a tuple"]),
            "deep key": (b"})" + b"\x85" * DEPTH + b"K\x01s.", ["as a key"]),
            "itself": (b"]q\x00h\x00a.", ["a list"]),
            "dict in itself": (b"}q\x00" + text("state_dict") + b"h\x00s.", ["no tensors"]),
            "lists": (b"]" * LIMIT + b".", ["a list"]),
            "dicts": (b"}\x94" * (LIMIT // 2) + b".", ["but nothing"]),
            "memo of one": (b"]" + b"\x94" * (LIMIT - 1) + b".", ["a list"]),
            "marks": (b"(" * LIMIT + b".", []),
            "long text": (b"X\xff\xff\xff\x7fabc.", ["damaged"]),
            "longer text": (b"\x8d" + b"\xff" * 7 + b"\x7fabc.", ["damaged"]),
            "long bytes": (b"\x8e" + b"\xff" * 7 + b"\x0fabc.", ["damaged"]),
            "long number": (b"\x8b\xff\xff\xff\x7fabc.", ["damaged"]),
            "digits": (b"I" + b"9" * 100_000 + b"\n.", ["opcode"]),
            "wide key": (b"}\x8a\x20" + b"\x7f" * 32 + b"Ns.", ["as a key"]),
            "of Python 2": (ORDERED + b"]\x85R.", ["weights_only"]),
            "no stop": (b"}", ["damaged"]),
            "unknown opcode": (b"\xff.", ["opcode"]),
            "underflow": (b"\x87.", ["damaged"]),
            "no mark": (b"t.", ["damaged"]),
            "no memo": (b"h\x05.", ["damaged"]),
            "odd items": (b"}(" + text("a") + b"u.", ["damaged"]),
            "append to a dict": (b"}Na.", ["damaged"]),
            "empty": (b"", ["damaged"]),
            "one tensor": (FOUR + b".", ["a Tensor"]),
            "no names": (b"}" + text("epoch") + b"K\x03s.", ["'epoch'", "state_dict"]),
        }.items()
    },
    **{
        f"view: {name}": (state(w=view), words)
        for name, (view, words) in {
            "long": (tensor(RUN, (5,), (1,)), ["beyond its storage"]),
            "offset": (tensor(RUN, (2,), (1,), offset=3), ["beyond"]),
            "stride": (tensor(RUN, (2, 2), (3, 1)), ["beyond"]),
            "negative stride": (tensor(RUN, (2,), (-1,), offset=2), ["no count"]),
            "negative offset": (tensor(RUN, (2,), (1,), offset=-1), ["no count"]),
            "negative size": (tensor(RUN, (-2,), (1,)), ["no count"]),
            "expanded": (tensor(RUN, (2**40,), (0,)), ["larger than the file"]),
            "expanded twice": (tensor(RUN, (2**31,) * 3, (0,) * 3), ["larger than the file"]),
            "wrapping": (tensor(RUN, (2**32, 2), (2**62, 1)), ["larger than the file"]),
            "beyond 64 bits": (tensor(RUN, (2**70,), (0,)), ["no count"]),
            "rank": (tensor(RUN, (1,) * 30, (1,) * 30), ["than 8 axes"]),
            "unequal": (tensor(RUN, (1, 1), (1,)), ["damaged"]),
            "empty": (tensor(RUN, (0,), (1,)), ["elements"]),
            "storage": (tensor(storage("0", "FloatStorage", 2**50), (4,), (1,)), ["not as long"]),
            "negative": (tensor(storage("0", "FloatStorage", -4), (4,), (1,)), ["damaged"]),
            "missing": (tensor(storage("1", "FloatStorage", 4), (4,), (1,)), ["damaged"]),
            "up": (tensor(storage("../byteorder", "FloatStorage", 4), (4,), (1,)), ["damaged"]),
        }.items()
    },
    "two types": (state(a=FOUR, b=whole("0", ONES, "IntStorage")), ["two types"]),
    "shared": (shared(200), ["share storages"]),
}


def pickles(writer, kind, most):
    """The table of ``PICKLES`` in files that ``writer`` writes, of those below ``most`` bytes."""
    storages = {"0": ONES, "big": np.ones(10**4, np.float32)}
    return {
        f"{kind}: {name}": (
            lambda path, body=body: writer(
                path, body, {key: array for key, array in storages.items() if text(key) in body}
            ),
            words,
        )
        for name, (body, words) in PICKLES.items()
        if len(body) < most
    }


# Damaged files of torch's, and ZIP directories that lie.


def damaged(writer, change):
    def write(path):
        path.write_bytes(change(writer(path, TWO_PICKLED, TWO).read_bytes()))

    return write


def central(name, size, offset, crc=0):
    head = struct.pack("<4s6H3L", b"PK\x01\x02", 20, 20, 0, 0, 0, 0, crc, size, size)
    return head + struct.pack("<5H2L", len(name), 0, 0, 0, 0, 0, offset) + name


def local(name, data):
    head = struct.pack("<4s5H3L", b"PK\x03\x04", 20, 0, 0, 0, 0, zlib.crc32(data), *[len(data)] * 2)
    return head + struct.pack("<2H", len(name), 0) + name + data


def directory(*members, body=local(b"n/data.pkl", TWO_PICKLED)):
    """A ZIP with this directory behind one pickle."""
    listed, count = b"".join(members), len(members) % 2**16
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(listed), len(body), 0)
    return content(body + listed + end)


PICKLE = (b"n/data.pkl", len(TWO_PICKLED), 0, zlib.crc32(TWO_PICKLED))
SWAPPED = (TWO["0"].tobytes(), TWO["0"][::-1].tobytes())
LONGER = tuple(struct.pack("<q", n) for n in (6, 2**60))
PACKED = zipped(("net/data.pkl", TWO_PICKLED), ("net/data/0", bytes(10**7)), compress_type=8)
TORCH = {
    **{f"ZIP cut at {n}": (damaged(write_zip, lambda d, n=n: d[:n]), []) for n in (10, 100, -1)},
    **{
        f"old file cut at {n}": (damaged(write_legacy, lambda d, n=n: d[:n]), [])
        for n in (20, 60, 200, -30, -1)
    },
    "checksum": (damaged(write_zip, lambda d: d.replace(*SWAPPED)), ["damaged", "CRC"]),
    "length": (damaged(write_legacy, lambda d: d.replace(*LONGER)), ["storage 0"]),
    "storage of no tensor": (lambda p: write_legacy(p, TWO_PICKLED, TWO | {"9": ONES}), ["'9'"]),
    "compressed": (PACKED, ["compressed"]),
    "pickle too large": (zipped(("net/data.pkl", bytes(torch_archive.MAX_PICKLE + 1))), ["pickle"]),
    "overlap": (
        directory(central(*PICKLE), *(central(b"n/data/%d" % i, 10**4, 0) for i in range(50))),
        ["overlap"],
    ),
    "huge directory": (
        lambda path: directory(*[central(*PICKLE)] * 10**6)(path),
        ["a directory of"],
    ),
}
for _part, _bad in enumerate((b"reduce", b"1001", b"system", b"root", b"keys")):
    _head = [pickle.dumps(x, protocol=2) for x in (MAGIC, 1001, {"little_endian": True}, {}, [])]
    _head[_part] = in_state_dict(ATTACKS["reduce"])
    _words = ["os.system"] if _part else KINDS
    TORCH[f"attack for {_bad.decode()}"] = (content(b"".join(_head)), _words)


# HDF5: functions that change a good file of Keras 3 with one layer, given it and its variables.


def put(value, name="1"):
    return lambda file, group: group.__setitem__(name, value(file) if callable(value) else value)


def one(**options):
    return lambda file, group: group.create_dataset("1", **options)


def virtual(file, group):
    layout = h5py.VirtualLayout((4,), np.float32)
    layout[:] = h5py.VirtualSource(file.filename, "layers/conv/vars/0", (4,))
    group.create_virtual_dataset("1", layout)


def deep(file, group):
    for _ in range(100):
        group = group.create_group("a")


def before_keras_3(path, value=ONES):
    def make(file, group):
        file.attrs["layer_names"] = [b"conv"]
        del file["layers"], file["optimizer"]
        for place in path.split():
            file[place] = value

    return make


def linked(file, group):
    group["1"] = np.zeros(9999)
    group["2"] = group["1"]


def link_of_layers(file, group):
    file.move("layers", "x")
    file["layers"] = h5py.SoftLink("/x")


EXTERNAL = h5py.ExternalLink("/etc/passwd", "/")
PASSWD = [("/etc/passwd", 0, 8)]
HDF5 = {
    "huge": (one(shape=(2**20, 2**20), dtype="f4"), "bytes"),
    "compressed": (one(data=np.zeros(10**7), compression="gzip"), "compressed"),
    "chunks": (one(shape=(8,), dtype="f4", chunks=(4,)), "chunks"),
    "external storage": (one(shape=(2,), dtype="f4", external=PASSWD), "another file"),
    "virtual": (virtual, "another file"),
    "soft link": (put(h5py.SoftLink("/layers/conv/vars/0")), "link"),
    "external link": (put(EXTERNAL), "link"),
    "cycle": (put(lambda file: file["layers"], "a"), "itself"),
    "deep": (deep, "itself"),
    "integers": (put(np.arange(3)), "int64"),
    "text": (put("hello"), "expected floats"),
    "fixed text": (put(np.bytes_(b"hello")), "expected floats"),
    "reference": (put(lambda file: np.array([file.ref], h5py.ref_dtype)), "expected"),
    "pairs": (put(np.zeros(2, [("a", "f4"), ("b", "f4")])), "expected floats"),
    "complex": (put(np.zeros(2, np.complex64)), "complex64"),
    "opaque": (put(np.zeros(2, "V2")), "expected floats"),
    "null": (put(h5py.Empty("f4")), "is not read"),
    "no elements": (put(np.zeros((0, 3), np.float32)), "bytes"),
    "rank": (put(np.zeros((1,) * 12, np.float32)), "over 8 axes"),
    "datatype": (put(np.dtype("f4")), "neither"),
    "name": (put(np.zeros(2, np.float32), "kernel"), "kernel"),
    "own weights": (lambda f, g: f["vars"].create_dataset("0", data=1.0), "outside its layers"),
    "linked twice": (linked, "bytes"),
    "layers gone": (lambda f, g: f.move("layers", "other"), "layer_names"),
    "layers a link": (link_of_layers, "link"),
    "no weights": (before_keras_3(""), "no layer"),
    "unknown weight": (before_keras_3("conv/alpha:0"), "no weight of a"),
    "weight twice": (before_keras_3("conv/kernel:0 conv/W"), "twice"),
    "weight a link": (before_keras_3("conv/W", EXTERNAL), "link"),
    "layer a dataset": (before_keras_3("kernel"), "no weight of a"),
}


def hostile_h5(make):
    def write(path):
        write_keras3(path, {"conv": [ONES]})
        with h5py.File(path, "a") as file:
            make(file, file["layers/conv/vars"])

    return write


BAD = {
    **OTHERS,
    **{f"safetensors: {name}": (write, ["damaged"]) for name, write in SAFETENSORS.items()},
    "huge header": (sparse_header, ["header"]),
    **pickles(write_zip, "zip", 10**7),
    **pickles(write_legacy, "legacy", 10**5),
    **{f"torch: {name}": case for name, case in TORCH.items()},
    **{f"HDF5: {name}": (hostile_h5(make), [word]) for name, (make, word) in HDF5.items()},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_and_nothing_in_them_runs(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write, words = BAD[name]
    path = tmp_path / "a b.pth"
    write(path)
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as caught:
            read_tensors(path)
        size = path.stat().st_size if path.is_file() else 0
        assert tracemalloc.get_traced_memory()[1] < 2 * size + 200e6
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 2000
    assert [word for word in (str(path), *words) if word not in message] == []
    assert not (tmp_path / "marker").exists()


# A thousand random mutations of a file of each kind.

INFLATED = [b"\xff" * 4, b"\xff" * 8, b"\xff\xff\xff\x7f", b"\0\0\0\x40", b"\0" * 4, b"\1\0\0\0"]


def mutate(data, rng):
    """Flips, cuts, insertions, copies and swollen lengths, mostly where the file is not zero."""
    data = bytearray(data)
    nonzero = np.flatnonzero(np.frombuffer(bytes(data), np.uint8))
    kind = rng.integers(5)
    for _ in range(rng.integers(1, 6)):
        at, other = (int(i) for i in rng.choice(nonzero, 2))
        if kind == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            value = INFLATED[rng.integers(len(INFLATED))]
            at -= at % 4 if rng.integers(2) else 0
            data[at : at + len(value)] = value
        elif kind == 2:
            data[at:at] = rng.bytes(int(rng.integers(1, 9)))
        elif kind == 3:
            data[at : at + 8] = data[other : other + 8]
        else:
            return bytes(data[: rng.integers(len(data))])
    return bytes(data)


def mutated(directory):
    """{kind: functions of an rng that give a mutated file, taken in turn}."""
    path = directory / "good"
    zipped, old = (w(path, TWO_PICKLED, TWO).read_bytes() for w in (write_zip, write_legacy))
    attack = in_state_dict(ATTACKS["reduce"] + b"s" + text("v") + FOUR)
    arrays = {"w": TWO["0"], "b": TWO["1"].astype(BFLOAT16), "c": np.ones(3)}
    inside = [
        lambda rng, pickled=pickled: write_zip(path, mutate(pickled, rng), TWO).read_bytes()
        for pickled in (TWO_PICKLED, attack)
    ]
    keras = write_keras_h5(path, LAYERS, "model_weights").read_bytes()
    keras3 = write_keras3(path, KERAS_3).read_bytes()
    outside = lambda data: lambda rng: mutate(data, rng)  # noqa: E731
    return {
        "safetensors": [outside(safetensors.numpy.save(arrays, {"a": "b"}))],
        "torch": [outside(zipped), outside(old), *inside],
        "Keras": [outside(keras), outside(keras3)],
    }


def read_them_all(directory, cases):
    """Reads so many mutated files of each kind and all of ``BAD``; prints counts and memory."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit  # noqa: E731
    os.chdir(directory)
    path, counts, start = pathlib.Path("x"), {}, peak()
    for kind, writers in mutated(directory).items():
        counts[kind] = {"read": 0, "refused": 0}
        for seed in range(cases):
            path.write_bytes(writers[seed % len(writers)](np.random.default_rng(seed)))
            try:
                tensors = read_tensors(path).tensors
            except UserError as error:
                counts[kind]["refused"] += str(error).isprintable() and len(str(error)) < 2000
            else:
                size = sum(array.nbytes for array in tensors.values())
                counts[kind]["read"] += 0 < size <= path.stat().st_size
    sizes = [0]
    for number, (name, (write, _)) in enumerate(BAD.items()):
        path = pathlib.Path(str(number))
        write(path)
        with contextlib.suppress(UserError):
            read_tensors(path)
        sizes.append(0 if name in ("missing", "huge header") else path.stat().st_size)
    print(json.dumps([counts, peak() - start, 200e6 + 2 * max(sizes)]))


@pytest.mark.parametrize("cases", [30, pytest.param(1000, marks=pytest.mark.slow)])
def test_mutated_files_are_read_or_refused_in_bounded_memory(tmp_path, cases):
    pytest.importorskip("resource")
    call = f"test_pretrained_readers.read_them_all(pathlib.Path({str(tmp_path)!r}), {cases})"
    command = [sys.executable, "-c", f"import pathlib, test_pretrained_readers; {call}"]
    here = pathlib.Path(__file__).parent
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    counts, grown, allowed = json.loads(done.stdout)
    assert grown < allowed
    for outcomes in counts.values():
        assert outcomes["read"] > cases / 200 - 1  # of 30 none may be
        assert outcomes["refused"] > cases / 10
        assert sum(outcomes.values()) == cases
    assert not (tmp_path / "marker").exists()


def test_the_limits_leave_room_for_real_networks(tmp_path):
    """A ResNet-1202."""
    names = [f"layer1.{i}.conv1.weight" for i in range(1202 * 6)]
    pickled = state(**dict.fromkeys(names, whole("0", ONES[:1])))
    assert len(pickled) < torch_archive.MAX_PICKLE
    path = write_zip(tmp_path / "x", pickled, {"0": ONES[:1]})
    assert len(read_tensors(path).tensors) == len(names)
    safetensors.numpy.save_file(dict.fromkeys(names, ONES), path)
    assert len(read_tensors(path).tensors) == len(names)
