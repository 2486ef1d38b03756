"""Reads TensorBoard event files without TensorBoard: records are framed as TFRecord."""

import struct

from tensorboardX.proto.event_pb2 import Event


def read_scalars(directory):
    """{(tag, step): value} of every scalar in a directory's event files."""
    scalars = {}
    for path in sorted(directory.glob("events.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            for value in event.summary.value:
                scalars[value.tag, event.step] = value.simple_value
    return scalars
