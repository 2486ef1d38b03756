"""Files of torch's, written an opcode and a byte at a time: whole, damaged and hostile."""

import pickle
import struct
import zipfile
import zlib

import numpy as np

from flax_resnet.weights.readers import torch_archive

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


TWO = {"0": np.arange(6, dtype=np.float32).reshape(2, 3), "1": np.array([1.5, -2], np.float16)}
TWO_PICKLED = state(w=whole("0", TWO["0"]), b=whole("1", TWO["1"], "HalfStorage"))


def content(data):
    return lambda path: path.write_bytes(data)


def zipped(*members, **options):
    def write(path):
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members:
                archive.writestr(name, data, **options)

    return write


KINDS = [".safetensors", "torch.save", ".weights.h5"]


# Pickles: {name: (opcodes, words)}; each is put in a ZIP and in a legacy file.

ORDERED, PARAMETER = named("collections.OrderedDict"), named("torch.nn.parameter.Parameter")
SYSTEM, COMMAND = named("os.system"), text("echo > marker")
PLACE = (text("0"), text("cpu"), b"K\x02")
# Each would make a file marker in the working directory, were it run, or is like those that would.
ATTACKS = {
    "reduce": SYSTEM + many(COMMAND) + b"R",
    "eval": named("builtins.eval") + many(text("open('marker', 'w')")) + b"R",
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
    **{name: (in_state_dict(a), ["state_dict()"]) for name, a in ATTACKS.items()},
    **{name: (in_state_dict(body), []) for name, body in HARMLESS.items()},
    **{
        name: (b"\x80\x02" + body, words)
        for name, (body, words) in {
            "memo": (b"]r\xff\xff\xff\xffj\xff\xff\xff\xffa.", ["a list"]),
            "deep lists": (b"]" * DEPTH + b"a" * (DEPTH - 1) + b".", ["a list"]),
            "deep tuples": (b")" + b"\x85" * DEPTH + b".", ["a tuple"]),
            "deep key": (b"})" + b"\x85" * DEPTH + b"K\x01s.", ["but nothing"]),
            "itself": (b"]q\x00h\x00a.", ["a list"]),
            "dict in itself": (b"}q\x00" + text("state_dict") + b"h\x00s.", ["no tensors"]),
            "lists": (b"]" * LIMIT + b".", ["a list"]),
            "dicts": (b"}\x94" * (LIMIT // 2) + b".", ["but nothing"]),
            "memo of one": (b"]" + b"\x94" * (LIMIT - 1) + b".", ["a list"]),
            "objects": (named("a.b") + b"q\x00" + b"h\x00)R" * (LIMIT // 4 - 9) + b".", ["a a.b"]),
            "sets": (b"\x8f" * LIMIT + b".", []),
            "items of a set": (b"\x8f" + text("state_dict") + FOUR + b"s.", ["damaged"]),
            "marks": (b"(" * LIMIT + b".", []),
            "long text": (b"X\xff\xff\xff\x7fabc.", ["damaged"]),
            "long bytes": (b"\x8e" + b"\xff" * 7 + b"\x0fabc.", ["damaged"]),
            "long number": (b"\x8b\xff\xff\xff\x7fabc.", ["damaged"]),
            "digits": (b"I" + b"9" * 100_000 + b"\n.", ["opcode"]),
            "wide key": (b"}\x8a\x20" + b"\x7f" * 32 + b"Ns.", ["but nothing"]),
            "of Python 2": (ORDERED + b"]\x85R.", ["but nothing"]),
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
    _words = {0: KINDS, 3: ["os.system"]}.get(_part, ["damaged"])
    TORCH[f"attack for {_bad.decode()}"] = (content(b"".join(_head)), _words)
