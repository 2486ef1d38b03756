"""Weight files of every kind, whole, damaged and hostile: tensors or a UserError, never code."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tracemalloc
import warnings

import h5py
import numpy as np
import pytest
import safetensors.numpy
from hdf5_files import BFLOAT16, HDF5, KERAS_3, LAYERS, hostile_h5, write_keras3, write_keras_h5
from safetensors_files import SAFETENSORS, sparse_header
from torch_files import (
    ATTACKS,
    FOUR,
    KINDS,
    ONES,
    TORCH,
    TWO,
    TWO_PICKLED,
    content,
    in_state_dict,
    many,
    named,
    pickles,
    state,
    storage,
    tensor,
    text,
    whole,
    write_legacy,
    write_zip,
    zipped,
)

from flax_resnet.errors import UserError
from flax_resnet.weights.readers import torch_archive
from flax_resnet.weights.readers.tensors import read_tensors


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


@pytest.mark.parametrize("writer", [write_zip, write_legacy])
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
        torch.save({"epoch": 1, "net": values}, tmp_path / "net.pth", **options)
    expected = {k: v.detach().float().numpy() for k, v in values.items() if "tracked" not in k}
    dtypes = {"half": np.float16, "brain": BFLOAT16, "double": np.float64}
    expected = {f"net.{k}": v.astype(dtypes.get(k, np.float32)) for k, v in expected.items()}
    same(read_tensors(tmp_path / "net.pth").tensors, expected)


@pytest.mark.parametrize("root", ["/", "model_weights"])
@pytest.mark.parametrize("names", ["layer_names", "layer_names0"])
def test_keras_legacy(tmp_path, root, names):
    found = read_tensors(write_keras_h5(tmp_path / "w", LAYERS, root, names))
    assert found.format == "keras_h5"
    arrays = {layer: enumerate(weights.values()) for layer, weights in LAYERS.items()}
    want = {f"{layer}/{i}": array for layer, ws in arrays.items() for i, array in ws}
    want["bn_old/3"] = want.pop("bn_old/0")
    same(found.tensors, want)


def test_keras_3(tmp_path):
    path = write_keras3(tmp_path / "w.weights.h5", KERAS_3)
    with h5py.File(path, "a") as file:
        file["layers/dropout/seed_generator/vars/0"] = np.zeros(2, np.uint32)
    found = read_tensors(path)
    assert found.format == "keras_weights"
    expected = {f"{k}/{i}": a for k, arrays in KERAS_3.items() for i, a in enumerate(arrays)}
    same(found.tensors, {k: a.astype(a.dtype.newbyteorder("=")) for k, a in expected.items()})


# Files that are no weights: {name: (a function that writes one at a path, words of the message)}.


def tensors_of(**tensors):
    return lambda path: safetensors.numpy.save_file(tensors, path)


OTHERS = {
    "missing": (lambda path: None, ["no such file"]),
    "directory": (lambda path: path.mkdir(), ["regular file"]),
    "pipe": (os.mkfifo, ["regular file"]),
    "empty": (content(b""), KINDS),
    "short": (content(b"\x80"), KINDS),
    "prose": (content(b"hello, world, this is text"), KINDS),
    "no ZIP": (content(b"PK\x05\x06"), KINDS),
    "another ZIP": (zipped(("readme.txt", "hello")), ["no state dict"]),
    "whole Keras model": (
        zipped(("config.json", "{}"), ("model.weights.h5", "0")),
        ["is not read"],
    ),
    "inflated": (
        zipped(("config.json", " " * 2**24), ("model.weights.h5", "0"), compress_type=8),
        ["config.json is over 8388608 bytes", "model.save_weights"],
    ),
    "TorchScript": (lambda path: write_zip(path, b"", **{"constants.pkl": b""}), ["TorchScript"]),
    "big-endian": (lambda path: write_zip(path, b"", byteorder=b"big"), ["little-endian"]),
    "old big-endian": (lambda path: write_legacy(path, b"", little=False), ["little-endian"]),
    "integers": (tensors_of(a=np.arange(3)), ["int64", "'a'"]),
    "terminal codes": (tensors_of(**{"a\x1b[2J": np.ones(1)}), [r"'a\x1b[2J'"]),
    "counters alone": (tensors_of(num_batches_tracked=np.array(1)), ["no weights"]),
    "no elements": (tensors_of(a=np.ones((2, 0), np.float32)), ["elements"]),
    "nine axes": (tensors_of(a=np.ones((1,) * 9, np.float32)), ["than 8 axes"]),
}


BAD = {
    **OTHERS,
    **{f"safetensors: {name}": (write, ["convert"]) for name, write in SAFETENSORS.items()},
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
    new, old = (w(path, TWO_PICKLED, TWO).read_bytes() for w in (write_zip, write_legacy))
    attack = in_state_dict(ATTACKS["reduce"] + b"s" + text("v") + FOUR)
    arrays = {"w": TWO["0"], "b": TWO["1"].astype(BFLOAT16), "c": np.ones(3)}
    inside = [
        lambda rng, pickled=pickled: write_zip(path, mutate(pickled, rng), TWO).read_bytes()
        for pickled in (TWO_PICKLED, attack)
    ]
    keras = write_keras_h5(path, LAYERS, "model_weights").read_bytes()
    keras3 = write_keras3(path, KERAS_3).read_bytes()

    def whole_model(rng):
        zipped(("config.json", "{}"), ("model.weights.h5", mutate(keras3, rng)))(path)
        return path.read_bytes()

    outside = lambda data: lambda rng: mutate(data, rng)  # noqa: E731
    return {
        "safetensors": [outside(safetensors.numpy.save(arrays, {"a": "b"}))],
        "torch": [outside(new), outside(old), *inside],
        "Keras": [outside(keras), outside(keras3), whole_model],
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
    call = f"test_readers.read_them_all(pathlib.Path({str(tmp_path)!r}), {cases})"
    command = [sys.executable, "-c", f"import pathlib, test_readers; {call}"]
    here = pathlib.Path(__file__).parent
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        command, cwd=here, env=environment, capture_output=True, text=True, timeout=300
    )
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
