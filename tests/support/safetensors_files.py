"""Damaged and hostile files of safetensors, a header at a time."""

import json
import struct

from torch_files import content

from flax_resnet.weights.readers.tensors import MAX_HEADER


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
