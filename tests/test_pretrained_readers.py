"""Weight files of every kind, whole, damaged and hostile: tensors or a UserError, never code."""

import collections
import importlib.util
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import textwrap
import time
import tracemalloc
import warnings
import zipfile
import zlib

import ml_dtypes
import numpy as np
import pytest

from flax_resnet.errors import UserError
from flax_resnet.pretrained import hdf5, stored_zip, torch_archive, torch_pickle
from flax_resnet.pretrained.tensors import TensorFile, read_tensors

h5py = pytest.importorskip("h5py")
safetensors_numpy = pytest.importorskip("safetensors.numpy")

BFLOAT16 = ml_dtypes.bfloat16
MAGIC = 0x1950A86A20F9469CFC6C


# Pickles written by hand, an opcode at a time.


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value):
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def named(module, name):
    return f"c{module}\n{name}\n".encode()


def many(values):
    return b"(" + b"".join(values) + b"t"


def storage(key, kind, count, extra=b""):
    return (
        b"(" + text("storage") + named("torch", kind) + text(key) + text("cpu") + number(count)
    ) + (extra + b"tQ")


def ordered(items=()):
    pairs = b"".join(text(key) + value for key, value in items)
    return named("collections", "OrderedDict") + b")R(" + pairs + b"u"


def tensor(run, size, stride, offset=0):
    rest = number(offset) + many(map(number, size)) + many(map(number, stride)) + b"\x89"
    return named("torch._utils", "_rebuild_tensor_v2") + b"(" + run + rest + ordered() + b"tR"


def whole(key, array, kind="FloatStorage"):
    stride = [s // array.itemsize for s in array.strides]
    return tensor(storage(key, kind, array.size), array.shape, stride)


def state(items, build=True):
    versions = b"}" + text("_metadata") + ordered() + b"sb" if build else b""
    return b"\x80\x02" + ordered(items.items()) + versions + b"."


def write_zip(path, pickled, storages=(), prefix="net", **extra):
    members = {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n", **extra}
    members |= {f"data/{key}": bytes(data) for key, data in dict(storages).items()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(f"{prefix}/{name}"), data)
    return path


def write_legacy(path, pickled, storages=(), little=True, magic=MAGIC):
    system = {"protocol_version": 1001, "little_endian": little, "type_sizes": {"int": 4}}
    head = b"".join(pickle.dumps(x, protocol=2) for x in (magic, 1001, system))
    tail = pickle.dumps(sorted(dict(storages)), protocol=2)
    for _, array in sorted(dict(storages).items()):
        tail += struct.pack("<q", array.size) + array.tobytes()
    path.write_bytes(head + pickled + tail)
    return path


def two_tensors():
    """({key: array}, their pickle)."""
    w = np.arange(6, dtype=np.float32).reshape(2, 3)
    b = np.array([1.5, -2], np.float16)
    return {"0": w, "1": b}, state({"w": whole("0", w), "b": whole("1", b, "HalfStorage")})


WRITERS = {
    "zip": lambda path, pickled, storages=(): write_zip(path, pickled, storages),
    "legacy": write_legacy,
}
both = pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)


def write_keras_h5(path, layers, root=None, pieces=1, variable=False):
    """The legacy layout; ``layers`` is {layer: {weight name: array}}."""
    with h5py.File(path, "w") as file:
        group = file.create_group(root) if root else file

        def put(where, name, values):
            values = [str(v) if variable else v.encode() for v in values]
            if pieces == 1:
                where.attrs[name] = values
            else:
                for i, piece in enumerate(np.array_split(np.array(values), pieces)):
                    where.attrs[f"{name}{i}"] = piece

        put(group, "layer_names", layers)
        for layer, weights in layers.items():
            inner = group.create_group(layer)
            put(inner, "weight_names", weights)
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


def refuse(path, *words, seconds=1.5, peak=16 * 2**20):
    """One clear line about the file, soon, and without much memory."""
    tracemalloc.start()
    start = time.process_time()  # other work on the machine does not count
    try:
        with pytest.raises(UserError) as caught:
            read_tensors(path)
        took, used = time.process_time() - start, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    for word in words:
        assert word in message
    assert message.isprintable()
    assert took < seconds
    assert used < peak
    return message


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
    safetensors_numpy.save_file(tensors | counter, path, metadata={"arch": "resnet18"})
    found = read_tensors(path)
    assert found.format == "safetensors"
    assert found.metadata == {"arch": "resnet18"}
    same(found.tensors, tensors)


@both
def test_torch_by_hand(tmp_path, writer):
    storages, pickled = two_tensors()
    found = read_tensors(writer(tmp_path / "net.pth", pickled, storages))
    assert found.format == "torch"
    assert found.metadata == {}
    same(found.tensors, {"w": storages["0"], "b": storages["1"]})


@both
def test_torch_views_of_one_storage(tmp_path, writer):
    data = np.arange(12, dtype=np.float32)
    run = storage("7", "FloatStorage", 12)
    views = {
        "plain": tensor(run, (3, 4), (4, 1)),
        "transposed": tensor(run, (4, 3), (1, 4)),
        "part": tensor(run, (2, 2), (4, 2), offset=3),
        "scalar": tensor(run, (), (), offset=11),
        "odd": tensor(run, (1, 2), (2**62, 1)),
        "bn.num_batches_tracked": tensor(storage("8", "LongStorage", 1), (), ()),
    }
    path = writer(tmp_path / "net.pt", state(views), {"7": data, "8": np.array([3])})
    square = data.reshape(3, 4)
    expected = {
        "plain": square,
        "transposed": square.T,
        "part": np.array([[3, 5], [7, 9]], np.float32),
        "scalar": np.array(11, np.float32),
        "odd": data[None, :2],
    }
    same(read_tensors(path).tensors, expected)


@both
def test_torch_checkpoint_around_a_state_dict(tmp_path, writer):
    storages, pickled = two_tensors()
    inner = pickled[2:-1]
    moment = whole("0", storages["0"])
    optimizer = b"}" + text("state") + b"}" + number(0) + b"}" + text("m") + moment + b"sss"
    checkpoint = (
        (b"\x80\x02}(" + text("epoch") + number(3) + text("best") + b"G" + struct.pack(">d", 9.5))
        + (text("model") + text("resnet18") + text("state_dict") + inner)
        + (text("optimizer") + optimizer + text("rest") + b"](NK\x01\x88eu.")
    )
    found = read_tensors(writer(tmp_path / "net.pth", checkpoint, storages))
    same(found.tensors, {"w": storages["0"], "b": storages["1"]})


def test_torch_parameters_of_2016(tmp_path):
    w = np.ones(2, np.float32)
    old = named("torch._utils", "_rebuild_tensor") + b"(" + storage("0", "FloatStorage", 2)
    old += b"K\0" + many([b"K\2"]) + many([b"K\1"]) + b"tR"
    flags = b"(\x88\x89" + ordered() + b"tb"
    pickled = state({"w": named("torch.nn.parameter", "Parameter") + old + b"\x85\x81" + flags})
    same(read_tensors(write_legacy(tmp_path / "n", pickled, {"0": w})).tensors, {"w": w})


def test_torch_parameters_and_python_2_texts(tmp_path):
    w = np.ones(2, np.float32)
    parameter = named("torch._utils", "_rebuild_parameter") + b"(" + whole("0", w) + b"\x88"
    pair = b"](U\x01w" + parameter + ordered() + b"tRe"
    pickled = b"\x80\x02" + named("collections", "OrderedDict") + b"](" + pair + b"e\x85R."
    same(read_tensors(write_zip(tmp_path / "n", pickled, {"0": w})).tensors, {"w": w})


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_itself(tmp_path, zipped):
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
        torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    expected = {k: v.detach().float().numpy() for k, v in values.items() if "tracked" not in k}
    dtypes = {"half": np.float16, "brain": BFLOAT16, "double": np.float64}
    expected = {k: v.astype(dtypes.get(k, np.float32)) for k, v in expected.items()}
    same(read_tensors(path).tensors, expected)


LAYERS = {
    "input": {},
    "conv1/conv": {"conv1/conv/kernel:0": np.ones((3, 3, 2, 4), np.float32)},
    "bn": {f"bn/{n}:0": np.arange(4, dtype=np.float32) + i for i, n in enumerate("gbmv")},
    "fc": {"w": np.ones((4, 2), np.float16), "b": np.ones((), np.float64)},
}


@pytest.mark.parametrize("root", [None, "model_weights"])
@pytest.mark.parametrize(("pieces", "variable"), [(1, False), (1, True), (2, False)])
def test_keras_legacy(tmp_path, root, pieces, variable):
    path = write_keras_h5(tmp_path / "w", LAYERS, root, pieces, variable)
    found = read_tensors(path)
    assert found.format == "keras_h5"
    arrays = {layer: enumerate(weights.values()) for layer, weights in LAYERS.items()}
    expected = {f"{layer}/{i}": array for layer, ws in arrays.items() for i, array in ws}
    same(found.tensors, expected)


def test_keras_3(tmp_path):
    layers = {
        "conv2d": [np.ones((3, 3, 1, 2), np.float32), np.zeros(2, np.float32)],
        "conv2d_1": [np.arange(3).astype(BFLOAT16)],
        "functional/layers/dense": [np.ones((2, 3), ">f4"), np.ones((), np.float16)],
        "flatten": [],
    }
    path = write_keras3(tmp_path / "w.weights.h5", layers)
    with h5py.File(path, "a") as file:
        file["layers/dropout/seed_generator/vars/0"] = np.zeros(2, np.uint32)
    found = read_tensors(path)
    assert found.format == "keras_weights"
    expected = {f"{layer}/{i}": a for layer, arrays in layers.items() for i, a in enumerate(arrays)}
    expected = {k: a.astype(a.dtype.newbyteorder("=")) for k, a in expected.items()}
    same(found.tensors, expected)


@pytest.mark.slow
def test_keras_itself(tmp_path):
    script = """
        import sys, keras
        image = keras.Input((8, 8, 3))
        x = keras.layers.Conv2D(4, 3, name="first")(image)
        x = keras.layers.BatchNormalization(name="norm")(x)
        x = keras.layers.Dropout(0.5)(keras.layers.Flatten()(x))
        model = keras.Model(image, keras.layers.Dense(2, name="head")(x))
        model.compile("adam", "mse")
        for name in ("a.weights.h5", "a.h5", "a.keras"):
            (model.save_weights if "weights" in name else model.save)(f"{sys.argv[1]}/{name}")
    """
    if not all(map(importlib.util.find_spec, ("keras", "torch"))):  # import: its own backend
        pytest.skip("needs keras and torch")
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), tmp_path],
        env={**os.environ, "KERAS_BACKEND": "torch"},
        check=True,
        capture_output=True,
    )
    new = read_tensors(tmp_path / "a.weights.h5").tensors
    old = read_tensors(tmp_path / "a.h5").tensors
    names = {"conv2d": "first", "batch_normalization": "norm", "dense": "head"}
    same(old, {f"{names[k.split('/')[0]]}/{k.split('/')[1]}": v for k, v in new.items()})
    assert len(new) == 8
    refuse(tmp_path / "a.keras", "save_weights")


def test_large_files_are_read_quickly(tmp_path):
    big = np.arange(10_000_000, dtype=np.float32).reshape(2500, 4000)
    path = write_keras3(tmp_path / "w", {"dense": [big]})
    start = time.perf_counter()
    found = read_tensors(path).tensors["dense/0"]
    assert time.perf_counter() - start < 3
    np.testing.assert_array_equal(found, big)


# Files that are something else.


def test_other_files(tmp_path):
    path = tmp_path / "x"
    refuse(path, "no such file")
    refuse(tmp_path, "regular file")
    path.touch()
    refuse(path, "empty")
    for content in (b"\x80", b"hello, world, this is text", b"\x93NUMPY\x01\0" * 9, b"PK\x05\x06"):
        path.write_bytes(content)
        refuse(path, ".safetensors", "torch.save", ".weights.h5")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        refuse(tmp_path / "pipe", "regular file")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    refuse(path, "data.pkl")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", "{}")
        archive.writestr("model.weights.h5", b"0" * 1000)
    refuse(path, "load_model", ".save_weights(", ".weights.h5")


def test_torchscript_is_refused(tmp_path):
    storages, pickled = two_tensors()
    refuse(write_zip(tmp_path / "x", pickled, storages, **{"constants.pkl": b""}), "TorchScript")
    refuse(write_zip(tmp_path / "x", pickled, storages, **{"code/a.py": b""}), "TorchScript")
    refuse(write_zip(tmp_path / "x", pickled, storages, byteorder=b"big"), "little-endian")


def test_wrong_tensors(tmp_path):
    path = tmp_path / "x"
    for array in (np.arange(3), np.ones(3, bool), np.ones(3, np.uint8)):
        safetensors_numpy.save_file({"a": array}, path)
        refuse(path, str(array.dtype), "'a'")
    safetensors_numpy.save_file({"a\x1b[2J": np.ones(1)}, path)
    refuse(path, r"'a\x1b[2J'")
    safetensors_numpy.save_file({"num_batches_tracked": np.array(1)}, path)
    refuse(path, "no weights")
    safetensors_numpy.save_file({"a": np.ones((2, 0), np.float32)}, path)
    refuse(path, "no elements")
    ints = state({"a": whole("0", np.arange(3), "LongStorage")})
    refuse(write_zip(path, ints, {"0": np.arange(3)}), "int64", "'a'")


# Damaged and hostile safetensors.


def write_safetensors(path, header, data=b"", length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_damaged_safetensors(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors_numpy.save_file({"a": np.ones(100, np.float32)}, path)
    good = path.read_bytes()
    for cut in (9, 30, len(good) - 1):
        path.write_bytes(good[:cut])
        refuse(path, "damaged")
    path.write_bytes(good + b"0")
    refuse(path, "damaged")
    cases = {
        "longer": {"header": {"a": entry([1], 0, 4)}, "length": 2**63},
        "claims": {"header": {"a": entry([2**40], 0, 2**42)}, "data": bytes(8)},
        "overflows": {"header": {"a": entry([2**62, 2**62], 0, 8)}, "data": bytes(8)},
        "negative": {"header": {"a": entry([-2], 0, 8)}, "data": bytes(8)},
        "overlaps": {"header": {"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, "data": bytes(12)},
        "nests": {"header": b'{"a":' + b"[" * 100_000},
        "no_json": {"header": b"{" + b"\xff" * 50},
    }
    for case in cases.values():
        refuse(write_safetensors(path, **case), "damaged")
    twice = b'{"a":%b,"a":%b}' % ((json.dumps(entry([2], 0, 8)).encode(),) * 2)
    refuse(write_safetensors(path, twice, bytes(8)), "twice")
    refuse(write_safetensors(path, {"a": entry([8], 0, 8, "F8_E4M3")}, bytes(8)), "F8_E4M3")
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 17 * 2**20) + b"{")
        file.truncate(2**30)
    refuse(path, "header")


# Hostile pickles.


def attacks(marker):
    """{name: pickle that would create the marker, were it run}."""
    command = f"echo > {marker}"
    system = named("os", "system") + b"(" + text(command) + b"tR"
    call = {
        "reduce": system,
        "posix": system.replace(b"cos\n", b"cposix\n"),
        "eval": named("builtins", "eval") + b"(" + text(f"open({str(marker)!r}, 'w')") + b"tR",
        "getattr": named("builtins", "getattr") + b"(" + text("x") + text("join") + b"tR",
        "stack global": b"\x8c\x02os\x8c\x06system\x93(" + text(command) + b"tR",
        "inst": b"(" + text(command) + b"ios\nsystem\n",
        "obj": b"(" + named("os", "system") + text(command) + b"o",
        "newobj": named("subprocess", "Popen") + b"(" + text(command) + b"t\x81",
        "newobj known": named("collections", "OrderedDict") + b")\x81",
        "newobj parameter": named("torch.nn.parameter", "Parameter") + b")\x81",
        "call parameter": named("torch.nn.parameter", "Parameter") + b")R",
        "newobj ex": named("subprocess", "Popen") + b"(" + text(command) + b"t}\x92",
        "build": b")" + b"}" + text("__setstate__") + named("os", "system") + b"sb",
        "build tensor": tensor(storage("0", "FloatStorage", 2), (2,), (1,)) + b"}b",
        "build slots": ordered() + b"N}" + text("update") + number(1) + b"s\x86b",
        "load": named("torch.storage", "_load_from_bytes") + b"(" + text(command) + b"tR",
        "dtype call": named("torch", "float32") + b"(" + text(command) + b"tR",
        "storage call": named("torch", "FloatStorage") + b"(" + number(2**40) + b"tR",
        "ext1": b"\x82\x01",
        "ext4": b"\x84\x01\0\0\0",
        "persid": b"Pos.system\n",
        "binpersid": text(command) + b"Q",
        "persistent call": b"(" + text("storage") + system + text("0") + text("cpu") + b"K\x02tQ",
        "persistent type": b"("
        + text("storage")
        + named("collections", "OrderedDict")
        + (text("0") + text("cpu") + b"K\x02tQ"),
        "module view": storage("0", "FloatStorage", 2, extra=many([text("1"), b"K\0", b"K\1"])),
        "buffer": b"\x97",
        "dup key": b"}" + many([many([])]) + b"K\x01s",
    }
    return {name: b"\x80\x02}" + text("w") + body + b"s." for name, body in call.items()}


@pytest.mark.parametrize("name", attacks("x"))
@both
def test_no_pickle_runs(tmp_path, writer, name):
    marker = tmp_path / "marker"
    path = writer(tmp_path / "a b.pth", attacks(marker)[name], {})
    message = refuse(path, "weights_only=True", "python -c", "save_file")
    if name in ("reduce", "stack global"):
        assert "os.system" in message
    assert not marker.exists()


@pytest.mark.parametrize("part", range(3))
def test_no_pickle_of_a_legacy_head_runs(tmp_path, part):
    marker = tmp_path / "marker"
    bad = attacks(marker)["reduce"]
    parts = [pickle.dumps(x, protocol=2) for x in (MAGIC, 1001, {"little_endian": True}, {}, [])]
    path = tmp_path / "x"
    if part == 0:
        path.write_bytes(bad)
        refuse(path, "expected")
        return
    parts[part if part == 1 else 4] = bad
    path.write_bytes(b"".join(parts))
    refuse(path, "os.system")
    assert not marker.exists()


@both
def test_pickles_that_ask_for_too_much(tmp_path, writer):
    path, limit, depth = tmp_path / "x", torch_pickle.MAX_OPCODES, 30_000
    pairs, copy = b"K\x01K\x02\x86" * 1000, named("collections", "OrderedDict") + b"h\x00\x85Ra"
    bodies = {
        "memo": b"]r\xff\xff\xff\xffj\xff\xff\xff\xffa.",
        "memo far": b"]r\xff\xff\xff\xff.",
        "deep lists": b"]" * depth + b"a" * (depth - 1) + b".",
        "deep tuples": b")" + b"\x85" * depth + b".",
        "deep key": b"})" + b"\x85" * depth + b"K\x01s.",
        "itself": b"]q\x00h\x00a.",
        "dict in itself": b"}q\x00" + text("state_dict") + b"h\x00s.",
        "marks": b"(" * depth + b".",
        "opcodes": b"N" * (limit + 5) + b".",
        "long text": b"X\xff\xff\xff\x7fabc.",
        "longer text": b"\x8d" + b"\xff" * 7 + b"\x7fabc.",
        "long bytes": b"\x8e" + b"\xff" * 7 + b"\x0fabc.",
        "long number": b"\x8b\xff\xff\xff\x7fabc.",
        "digits": b"I" + b"9" * 100_000 + b"\n.",
        "wide key": b"}\x8a\x20" + b"\x7f" * 32 + b"Ns.",
        "copies": b"]](" + pairs + b"eq\x00a" + copy * 1000 + b".",
        "no stop": b"}",
        "unknown opcode": b"\xff.",
        "underflow": b"\x87.",
        "no mark": b"t.",
        "no memo": b"h\x05.",
        "two left": b"NN.",
        "odd items": b"}(" + text("a") + b"u.",
        "append to a dict": b"}Na.",
        "empty": b"",
    }
    for body in bodies.values():
        refuse(writer(path, b"\x80\x02" + body, {}), seconds=3, peak=160 * 2**20)


@both
def test_views_outside_their_storage(tmp_path, writer):
    path, data = tmp_path / "x", np.arange(4, dtype=np.float32)
    run = storage("0", "FloatStorage", 4)
    outside = {
        "long": tensor(run, (5,), (1,)),
        "offset": tensor(run, (2,), (1,), offset=3),
        "stride": tensor(run, (2, 2), (3, 1)),
        "negative stride": tensor(run, (2,), (-1,), offset=2),
        "negative offset": tensor(run, (2,), (1,), offset=-1),
        "negative size": tensor(run, (-2,), (1,)),
        "expanded": tensor(run, (2**40,), (0,)),
        "expanded twice": tensor(run, (2**31, 2**31, 2**31), (0, 0, 0)),
        "wrapping": tensor(run, (2**32, 2), (2**62, 1)),
        "beyond 64 bits": tensor(run, (2**70,), (0,)),
        "rank": tensor(run, (1,) * 30, (1,) * 30),
        "unequal": tensor(run, (1, 1), (1,)),
        "empty": tensor(run, (0, 2**62), (1, 1)),
        "long storage": tensor(storage("0", "FloatStorage", 2**50), (4,), (1,)),
        "negative storage": tensor(storage("0", "FloatStorage", -4), (4,), (1,)),
        "other storage": tensor(storage("1", "FloatStorage", 4), (4,), (1,)),
        "up": tensor(storage("../byteorder", "FloatStorage", 4), (4,), (1,)),
    }
    for pickled in outside.values():
        refuse(writer(path, state({"w": pickled}), {"0": data}))
    twice = {"a": whole("0", data), "b": tensor(storage("0", "IntStorage", 4), (4,), (1,))}
    refuse(writer(path, state(twice), {"0": data}), "two types")
    turned = tensor(storage("0", "FloatStorage", 10**4), (100, 100), (1, 100))
    tied = {str(i): turned for i in range(200)}
    refuse(writer(path, state(tied), {"0": np.ones(10**4, np.float32)}), "share storages")


@both
def test_pickles_without_a_state_dict(tmp_path, writer):
    path = tmp_path / "x"
    run = whole("0", np.ones(2, np.float32))
    refuse(writer(path, b"\x80\x02" + run + b".", {"0": np.ones(2, np.float32)}), "one tensor")
    refuse(writer(path, b"\x80\x02].", {}), "a list")
    refuse(writer(path, b"\x80\x02}" + text("epoch") + b"K\x03s.", {}), "'epoch'", "state_dict")
    refuse(writer(path, b"\x80\x02}K\x03" + run + b"s.", {"0": np.ones(2, np.float32)}), "named 3")


def test_damaged_legacy_files(tmp_path):
    path = tmp_path / "x"
    storages, pickled = two_tensors()
    good = write_legacy(path, pickled, storages).read_bytes()
    for cut in (20, 60, 200, len(good) - 30, len(good) - 1):
        path.write_bytes(good[:cut])
        refuse(path, "damaged")
    refuse(write_legacy(path, pickled, storages, little=False), "little-endian")
    refuse(write_legacy(path, pickled, storages | {"9": np.ones(2)}), "'9'")
    path.write_bytes(good.replace(struct.pack("<q", 6), struct.pack("<q", 2**60)))
    refuse(path, "'0'")


# Hostile ZIP archives.


def central(name, size, offset, method=0, crc=0, flags=0, stored=None):
    stored = size if stored is None else stored
    head = struct.pack("<4s6H3L", b"PK\x01\x02", 20, 20, flags, method, 0, 0, crc, stored, size)
    return head + struct.pack("<5H2L", len(name), 0, 0, 0, 0, 0, offset) + name


def local(name, data, method=0):
    head = struct.pack("<4s5H", b"PK\x03\x04", 20, 0, method, 0, 0)
    return head + struct.pack("<3L2H", zlib.crc32(data), len(data), len(data), len(name), 0) + name


def ended(body, directory, count):
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, len(directory), len(body), 0)
    return body + directory + end


def test_zip_bombs(tmp_path):
    path = tmp_path / "x.pth"
    pickled = two_tensors()[1]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("net/data.pkl", pickled)
        archive.writestr("net/data/0", bytes(50_000_000))
    refuse(path, "compressed")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/data.pkl", pickled)
        archive.writestr("net/data/0", bytes(50_000_000), zipfile.ZIP_DEFLATED)
    refuse(path)
    data = bytes(100_000)
    body = local(b"net/data.pkl", data) + data
    members = [central(b"net/data.pkl", len(data), 0, crc=zlib.crc32(data))]
    members += [central(b"net/data/%d" % i, len(data), 0) for i in range(50)]
    path.write_bytes(ended(body, b"".join(members), len(members)))
    refuse(path, "overlaps")
    path.write_bytes(ended(body, members[0] + central(b"net/data/0", 2**31, 0), 2))
    refuse(path, "overlaps")


def test_zip_directories_that_lie(tmp_path):
    path, limit = tmp_path / "x.pth", stored_zip.MAX_MEMBERS
    storages, pickled = two_tensors()
    good = write_zip(path, pickled, storages).read_bytes()
    for cut in (10, 100, len(good) - 1):
        path.write_bytes(good[:cut])
        refuse(path, "damaged")
    path.write_bytes(good + b"0")
    refuse(path, "damaged")
    path.write_bytes(good.replace(storages["0"].tobytes(), storages["0"][::-1].tobytes()))
    refuse(path, "checksum")
    body = local(b"n/data.pkl", b"") + b"0" * 50
    one = central(b"n/data.pkl", 0, 0)
    for directory, count in (
        (one * 2, 2),
        (one, 2),
        (one * 5, 1),
        (one[:-3], 1),
        (b"0" * 100, 1),
        (central(b"n/data.pkl", 0, 2**31), 1),
        (central(b"n/data.pkl", 9, 0, flags=1), 1),
        (central(b"n/data.pkl", 9, 0, stored=8), 1),
        (central(b"n/data.pkl", 0xFFFFFFFF, 0), 1),
        (central(b"\xff/data.pkl", 0, 0), 1),
    ):
        path.write_bytes(ended(body, directory, count))
        refuse(path)
    huge = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 2**60, 2**60, 2**62, 2**62)
    for end, directory in ((len(body), b""), (len(body) + len(one) * (limit + 1), one)):
        record = huge
        if directory:
            counts = (limit + 1, limit + 1, len(one) * (limit + 1), len(body))
            record = huge[:24] + struct.pack("<4Q", *counts)
        locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1)
        path.write_bytes(body + directory * (limit + 1) + record + locator + ended(b"", b"", 0))
        refuse(path)


# Hostile HDF5.


def hostile_h5(path, make):
    write_keras3(path, {"conv": [np.ones(4, np.float32)]})
    with h5py.File(path, "a") as file:
        make(file, file["layers/conv/vars"])
    return path


def huge_shape(file, group):
    group.create_dataset("1", (2**20, 2**20), np.float32)


def compressed(file, group):
    group.create_dataset("1", data=np.zeros(10**7, np.float32), compression="gzip")


def external_storage(file, group):
    group.create_dataset("1", (2,), np.float32, external=[("/etc/passwd", 0, 8)])


def virtual(file, group):
    layout = h5py.VirtualLayout((4,), np.float32)
    layout[:] = h5py.VirtualSource(file.filename, "layers/conv/vars/0", (4,))
    group.create_virtual_dataset("1", layout)


def put(name, value):
    def make(file, group):
        group[name] = value(file) if callable(value) else value

    return make


def odd_float(file, group):
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_fields(31, 23, 8, 0, 20)
    h5py.h5d.create(group.id, b"1", kind, h5py.h5s.create_simple((2,)))


def deep(file, group):
    for _ in range(100):
        group = group.create_group("a")


HOSTILE = {
    "huge": (huge_shape, "bytes"),
    "compressed": (compressed, "compressed"),
    "chunks": (lambda f, g: g.create_dataset("1", (8,), "f4", chunks=(4,)), "chunks"),
    "external storage": (external_storage, "another file"),
    "virtual": (virtual, "another file"),
    "soft link": (put("1", h5py.SoftLink("/layers/conv/vars/0")), "link"),
    "external link": (put("1", h5py.ExternalLink("/etc/passwd", "/")), "link"),
    "cycle": (put("a", lambda file: file["layers"]), "itself"),
    "deep": (deep, "itself"),
    "integers": (put("1", np.arange(3)), "integers"),
    "text": (put("1", "hello"), "texts"),
    "fixed text": (put("1", np.bytes_(b"hello")), "texts"),
    "reference": (put("1", lambda file: np.array([file.ref], h5py.ref_dtype)), "numbers"),
    "pairs": (put("1", np.zeros(2, [("a", "f4"), ("b", "f4")])), "numbers"),
    "complex": (put("1", np.zeros(2, np.complex64)), "numbers"),
    "opaque": (put("1", np.zeros(2, "V2")), "numbers"),
    "odd floats": (odd_float, "floats"),
    "null": (put("1", h5py.Empty("f4")), "no elements"),
    "no elements": (put("1", np.zeros((0, 3), np.float32)), "no elements"),
    "rank": (put("1", np.zeros((1,) * 12, np.float32)), "dimensions"),
    "datatype": (put("1", np.dtype("f4")), "neither"),
    "name": (put("kernel", np.zeros(2, np.float32)), "kernel"),
    "own weights": (lambda f, g: f["vars"].create_dataset("0", data=1.0), "outside its layers"),
    "linked twice": (
        lambda f, g: [put(str(i), np.zeros(9999) if i == 1 else g["1"])(f, g) for i in (1, 2)],
        "bytes",
    ),
    "layers gone": (lambda f, g: f.move("layers", "other"), "layer_names"),
    "layers a link": (
        lambda f, g: (f.move("layers", "x"), put("layers", h5py.SoftLink("/x"))(f, f)),
        "link",
    ),
    "names no texts": (lambda f, g: f.attrs.update(layer_names=[1, 2]), "names"),
    "names no list": (lambda f, g: f.attrs.update(layer_names="a"), "names"),
    "layer missing": (lambda f, g: f.attrs.update(layer_names=[b"gone"]), "gone"),
    "layer above": (lambda f, g: f.attrs.update(layer_names=[b"../x"]), "missing"),
    "layer a dataset": (lambda f, g: f.attrs.update(layer_names=[b"optimizer/vars/0"]), "dataset"),
    "no weights": (lambda f, g: f.attrs.update(layer_names=[b"optimizer"]), "no layer"),
    "weight a group": (
        lambda f, g: (
            f.attrs.update(layer_names=[b"layers"]),
            f["layers"].attrs.update(weight_names=[b"conv"]),
        ),
        "group",
    ),
    "layer twice": (
        lambda f, g: (
            f.attrs.update(layer_names=[b"layers", b"layers"]),
            f["layers"].attrs.update(weight_names=[b"conv/vars/0"]),
        ),
        "twice",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_h5(tmp_path, name):
    make, word = HOSTILE[name]
    refuse(hostile_h5(tmp_path / "x.h5", make), word)


def test_h5_child_that_misbehaves(tmp_path, monkeypatch):
    path = write_keras3(tmp_path / "x", {"conv": [np.ones(4, np.float32)]})

    def answer(value, data=b""):
        encoded = value if isinstance(value, bytes) else json.dumps(value).encode()
        return struct.pack("<Q", len(encoded)) + encoded + data

    def tensors(*items):
        return {"layout": "keras_h5", "tensors": items}

    answers = [
        b"",
        b"\xff" * 100,
        answer(b"[" * 100_000),
        answer(3),
        answer({}),
        answer({"layout": "pickle", "tensors": []}),
        answer(tensors(["a", "float32", [2**40]])),
        answer(tensors(["a", "object", [1]])),
        answer(tensors(["a", "float32", [-1]])),
        answer(tensors(["a", "float32", [2]]), b"1234"),
        answer(tensors(["a", "float32"])),
    ]
    for data in answers:
        with pytest.raises((UserError, EOFError)) as caught:
            hdf5._receive(path, path.stat().st_size, io.BytesIO(data))
        assert caught.type is EOFError
    with pytest.raises(UserError, match=r"x is not read: bad"):
        hdf5._receive(path, 9, io.BytesIO(answer({"problem": "bad"})))
    with pytest.raises(UserError, match="reinstall h5py"):
        hdf5._receive(path, 9, io.BytesIO(answer({"unusable": "no library"})))
    script = tmp_path / "child.py"
    monkeypatch.setattr(hdf5, "_CHILD", script)
    monkeypatch.setattr(hdf5, "_GRACE_SECONDS", 0.5)
    for body in ("import os; os.abort()", "while True: pass", "raise OSError"):
        script.write_text(body)
        refuse(path, "gave up")
    monkeypatch.setattr(hdf5.importlib.util, "find_spec", lambda _: None)
    refuse(path, "pip install h5py")


def test_h5_child_is_limited(tmp_path, monkeypatch):
    pytest.importorskip("resource")
    path = write_keras3(tmp_path / "x", {"conv": [np.ones(4, np.float32)]})
    child = hdf5._CHILD
    script = tmp_path / "child.py"
    monkeypatch.setattr(hdf5, "_CHILD", script)
    head = f"import sys; sys.path.insert(0, {str(child.parent)!r}); import _h5_child as c;"
    for body in ("c._limit(1000); x = b'1' * 2**30", "c._limit(1000)\nwhile True: pass"):
        script.write_text(f"{head} {body}\nsys.stdout.buffer.write(b'9' * 100)")
        refuse(path, "gave up")


# Thousands of damaged files.

INFLATED = [b"\xff" * 4, b"\xff" * 8, b"\xff\xff\xff\x7f", b"\0\0\0\x40", b"\0" * 4, b"\1\0\0\0"]


def mutate(data, rng):
    """Flips, cuts, insertions, copies and swollen lengths, mostly where the file is not zero."""
    data = bytearray(data)
    nonzero = np.flatnonzero(np.frombuffer(bytes(data), np.uint8))
    kind = rng.integers(6)
    for _ in range(rng.integers(1, 6)):
        at, other = (int(i) for i in rng.choice(nonzero, 2))
        if kind == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[at] = int(rng.integers(256))
        elif kind == 2:
            value = INFLATED[rng.integers(len(INFLATED))]
            at -= at % 4 if rng.integers(2) else 0
            data[at : at + len(value)] = value
        elif kind == 3:
            data[at:at] = rng.bytes(int(rng.integers(1, 9)))
        elif kind == 4:
            data[at : at + 8] = data[other : other + 8]
        else:
            return bytes(data[: rng.integers(len(data))])
    return bytes(data)


def fuzz(path, cases, write):
    """Counts what becomes of the files that ``write(rng)`` makes; bounds time and memory."""
    counts = collections.Counter()
    slowest, longest = 0.0, ""
    tracemalloc.start()
    try:
        for seed in range(cases):
            path.write_bytes(write(np.random.default_rng(seed)))
            start = time.process_time()
            try:
                assert isinstance(read_tensors(path), TensorFile)
                counts["read"] += 1
            except UserError as error:
                counts["refused"] += 1
                longest = max(longest, str(error), key=len)
            slowest = max(slowest, time.process_time() - start)
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()
    assert slowest < 1
    assert len(longest) < 2000
    assert counts["refused"] > cases / 10
    return counts


def fuzz_in_process(tmp_path, cases):
    path = tmp_path / "x"
    storages, pickled = two_tensors()
    tensors = {"w": storages["0"], "b": storages["1"].astype(BFLOAT16), "c": np.ones(3)}
    safetensors_numpy.save_file(tensors, path, metadata={"a": "b"})
    good = path.read_bytes()
    zipped = write_zip(path, pickled, storages).read_bytes()
    old = write_legacy(path, pickled, storages).read_bytes()

    def rezipped(rng):
        return write_zip(tmp_path / "y", mutate(pickled, rng), storages).read_bytes()

    counts = [
        fuzz(path, cases, lambda rng: mutate(good, rng)),
        fuzz(path, cases, lambda rng: mutate(zipped, rng)),
        fuzz(path, cases, rezipped),
        fuzz(path, cases, lambda rng: mutate(old, rng)),
    ]
    assert all(count["read"] for count in counts)


H5_DRIVER = """
import collections, json, os, resource, runpy, signal, sys
import h5py
child, seeds, first, last = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
functions = runpy.run_path(child)
names = sorted(os.listdir(seeds))
counts = collections.Counter()
at = first
while at < last:
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reader)
        resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for i in range(at, last):
            path = os.path.join(seeds, names[i])
            signal.setitimer(signal.ITIMER_PROF, 0.3)
            try:
                size = os.path.getsize(path)
                with h5py.File(path, "r", locking=False) as file:
                    for _, dtype, shape, dataset in functions["survey"](file.id, size)[1]:
                        assert functions["read"](dataset, dtype, shape).nbytes <= size
                outcome = "read"
            except Exception as error:
                outcome = type(error).__name__
            signal.setitimer(signal.ITIMER_PROF, 0)
            os.write(writer, (outcome + "\\n").encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as lines:
        for outcome in lines:
            counts[outcome.strip()] += 1
            at += 1
    _, status = os.waitpid(pid, 0)
    if status:
        counts[f"signal {status & 127}"] += 1
        at += 1
print(json.dumps(counts))
"""


def fuzz_h5(tmp_path, cases):
    """What the child's own functions make of damaged files, crashes of the library included."""
    pytest.importorskip("resource")
    old = write_keras_h5(tmp_path / "a", LAYERS, "model_weights", variable=True).read_bytes()
    new = write_keras3(tmp_path / "b", {"conv": [np.ones((2, 3), "f4")], "d": [np.ones(3)]})
    seeds = tmp_path / "seeds"
    seeds.mkdir()
    for i in range(cases):
        data = mutate((old, new.read_bytes())[i % 2], np.random.default_rng(i))
        (seeds / f"{i:05}").write_bytes(data)
    command = [sys.executable, "-c", H5_DRIVER, hdf5._CHILD, seeds, "0", str(cases)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    counts = json.loads(done.stdout)
    print(counts)
    assert sum(counts.values()) == cases
    expected = {"read", "Problem", "OSError", "RuntimeError", "KeyError", "ValueError"}
    expected |= {"UnicodeDecodeError", "UnicodeEncodeError", "TypeError", "MemoryError"}
    assert {name for name in counts if not name.startswith("signal")} <= expected
    assert counts["read"] > cases / 20
    assert counts["Problem"] > 0
    return seeds


def test_fuzz(tmp_path):
    fuzz_in_process(tmp_path, 250)


def test_fuzz_h5(tmp_path):
    seeds = fuzz_h5(tmp_path, 200)
    for path in sorted(seeds.iterdir())[:25]:
        try:
            assert isinstance(read_tensors(path), TensorFile)
        except UserError as error:
            assert str(path) in str(error)  # noqa: PT017


@pytest.mark.slow
def test_fuzz_at_length(tmp_path):
    fuzz_in_process(tmp_path, 3000)


@pytest.mark.slow
def test_fuzz_h5_at_length(tmp_path):
    fuzz_h5(tmp_path, 6000)


def test_the_limits_leave_room_for_real_networks():
    """A ResNet-1202 with a momentum beside each weight, about 35 opcodes a tensor."""
    assert torch_pickle.MAX_OPCODES > 35 * 1202 * 6
    assert stored_zip.MAX_MEMBERS > 1202 * 6
    assert torch_archive.MAX_COPIES >= 2
