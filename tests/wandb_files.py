"""Reads the files of W&B's offline runs: records framed as in LevelDB's log, after seven bytes."""

import json
import struct

HEADER, BLOCK = 7, 32768
WHOLE, FIRST, LAST = 1, 2, 4


def frames(data):
    """The records of a file, as bytes."""
    at, parts = HEADER, []
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # nothing fits the end of a block
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if kind in (WHOLE, FIRST):
            parts = []
        parts.append(data[at + HEADER : at + HEADER + length])
        at += HEADER + length
        if kind in (WHOLE, LAST):
            yield b"".join(parts)


def _values(items):
    return {(x.key or "/".join(x.nested_key)): json.loads(x.value_json) for x in items}


def read_runs(directory):
    """What the offline runs in a directory hold, in order.

    Returns:
      {"ids": [(id, group, name)], "rows": [{name: value}], "config": {}, "summary": {},
      "codes": [exit code]}.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    found = {"ids": [], "rows": [], "config": {}, "summary": {}, "codes": []}
    for path in sorted(directory.glob("offline-run-*/run-*.wandb")):
        for frame in frames(path.read_bytes()):
            record = Record.FromString(frame)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                run = record.run
                found["ids"].append((run.run_id, run.run_group, run.display_name))
                found["config"] |= _values(run.config.update)
            elif kind == "history":
                found["rows"].append(_values(record.history.item))
            elif kind == "summary":
                found["summary"] |= _values(record.summary.update)
            elif kind == "exit":
                found["codes"].append(record.exit.exit_code)
    return found
