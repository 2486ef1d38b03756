"""Files of Keras's: whole ones of each layout, and hostile ones."""

import h5py
import ml_dtypes
import numpy as np
from torch_files import ONES

BFLOAT16 = ml_dtypes.bfloat16


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


KERAS_3 = {
    "conv2d": [np.ones((3, 3, 1, 2), np.float32), np.zeros(2, np.float32)],
    "conv2d_1": [np.arange(3).astype(BFLOAT16)],
    "functional/layers/dense": [np.ones((2, 3), ">f4"), np.ones((), np.float16)],
    "flatten": [],
}


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
    "reference": (put(lambda file: np.array([file.ref], h5py.ref_dtype)), "expected"),
    "pairs": (put(np.zeros(2, [("a", "f4"), ("b", "f4")])), "expected floats"),
    "complex": (put(np.zeros(2, np.complex64)), "complex64"),
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
