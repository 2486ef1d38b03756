"""ZIP archives as torch writes them: every member stored as it is, none compressed.

Without compression a member cannot be larger than the archive, and members that share bytes
are refused, so that all of them together are no larger either.
"""

from __future__ import annotations

import dataclasses
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

from flax_resnet.errors import UserError
from flax_resnet.pretrained.untrusted import damaged, shown, too_much

MAX_MEMBERS = 100_000
_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_MEMBER = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_IN_ZIP_64 = 0xFFFFFFFF
_ENCRYPTED = 0x0001 | 0x0040 | 0x2000


@dataclasses.dataclass(frozen=True)
class _Member:
    flags: int
    method: int
    checksum: int
    size: int
    start: int  # of its own header
    limit: int  # where the next member's header or the directory starts


class StoredZip:
    """The members of one archive, by name."""

    def __init__(self, path: Path, file: BinaryIO):
        """Reads the directory.

        Raises:
          UserError: it is damaged, holds too many members, one twice, or two that overlap.
        """
        self._path, self._file = path, file
        start, size, count = self._locate_directory()
        if count > MAX_MEMBERS:
            raise too_much(path, f"a ZIP of {count} members, at most {MAX_MEMBERS} are expected")
        file.seek(start)
        try:
            self._members = self._parse(file.read(size), count, start)
        except (struct.error, UnicodeDecodeError) as error:
            raise damaged(path, f"its ZIP directory cannot be read ({error})") from error

    def __contains__(self, name: str) -> bool:
        """True where a member has that name."""
        return name in self._members

    @property
    def names(self) -> list[str]:
        """Every member's name."""
        return list(self._members)

    def size(self, name: str) -> int:
        """Bytes of a member."""
        return self._members[name].size

    def read(self, name: str) -> bytes:
        """The bytes of a member.

        Raises:
          UserError: it is missing, compressed, encrypted, or not what its checksum says.
        """
        if name not in self._members:
            raise damaged(self._path, f"member {shown(name)} is missing")
        member, what = self._members[name], f"member {shown(name)}"
        if member.method:
            raise too_much(self._path, f"{what} is compressed, which torch never does")
        if member.flags & _ENCRYPTED:
            raise UserError(f"{self._path}: {what} is encrypted: decrypt the file first")
        self._file.seek(member.start)
        header = self._file.read(_LOCAL.size)
        if len(header) < _LOCAL.size or header[:4] != b"PK\x03\x04":
            raise damaged(self._path, f"{what} does not start where the ZIP directory says")
        *_, name_length, extra_length = _LOCAL.unpack(header)
        begin = member.start + _LOCAL.size + name_length + extra_length
        if begin + member.size > member.limit:
            raise damaged(self._path, f"{what} runs into the one behind it")
        self._file.seek(begin)
        data = self._file.read(member.size)
        if len(data) != member.size or zlib.crc32(data) != member.checksum:
            raise damaged(self._path, f"{what} does not match its checksum")
        return data

    def _locate_directory(self) -> tuple[int, int, int]:
        """(start, bytes, members) of the directory, which must end where the end record starts."""
        total = self._path.stat().st_size
        tail_size = min(total, _END_64.size + _LOCATOR.size + _END.size)
        self._file.seek(total - tail_size)
        tail = self._file.read(tail_size)
        if tail_size < _END.size or tail[-_END.size :][:4] != b"PK\x05\x06":
            raise damaged(self._path, "it starts as a ZIP and does not end as one")
        *_, count, size, start, comment = _END.unpack(tail[-_END.size :])
        end = total - _END.size
        locator = tail[-_END.size - _LOCATOR.size : -_END.size]
        if locator[:4] == b"PK\x06\x07":
            end -= _LOCATOR.size + _END_64.size
            record = tail[: _END_64.size]
            if end < 0 or record[:4] != b"PK\x06\x06" or _LOCATOR.unpack(locator)[2] != end:
                raise damaged(self._path, "the end of its ZIP64 directory is not where it belongs")
            *_, count, size, start = _END_64.unpack(record)
        if comment or start + size != end:
            raise damaged(self._path, "its ZIP directory is not at the end")
        return start, size, count

    def _parse(self, directory: bytes, count: int, start: int) -> dict[str, _Member]:
        found: list[tuple[str, _Member]] = []
        at = 0
        while at < len(directory):
            if len(found) == count:
                raise damaged(self._path, f"its ZIP directory holds more than {count} members")
            fields = _MEMBER.unpack_from(directory, at)
            if fields[0] != b"PK\x01\x02":
                raise damaged(self._path, "its ZIP directory holds something else than members")
            name_end = at + _MEMBER.size + fields[10]
            name = directory[at + _MEMBER.size : name_end].decode()
            extra = directory[name_end : name_end + fields[11]]
            stored, size, offset = _wide(extra, fields[8], fields[9], fields[16])
            if stored != size and not fields[4]:
                raise damaged(self._path, f"member {shown(name)} has two sizes")
            found.append((name, _Member(fields[3], fields[4], fields[7], size, offset, 0)))
            at = name_end + fields[11] + fields[12]
        if len(found) != count or at != len(directory):
            raise damaged(self._path, f"its ZIP directory holds {len(found)} of {count} members")
        return self._without_overlap(found, start)

    def _without_overlap(self, found: list[tuple[str, _Member]], end: int) -> dict[str, _Member]:
        members: dict[str, _Member] = {}
        for name, member in sorted(found, key=lambda pair: -pair[1].start):
            if name in members:
                raise damaged(self._path, f"member {shown(name)} is there twice")
            size = 0 if member.method else member.size
            if member.start + _LOCAL.size + size > end:
                raise damaged(self._path, f"member {shown(name)} overlaps what is behind it")
            members[name] = dataclasses.replace(member, limit=end)
            end = member.start
        return dict(reversed(members.items()))


def _wide(extra: bytes, stored: int, size: int, offset: int) -> tuple[int, int, int]:
    """The 64-bit values from the extra field, where the 32-bit ones say that they are there."""
    at, values = 0, b""
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            values = extra[at + 4 : at + 4 + length]
        at += 4 + length
    wide = []
    for value in (size, stored, offset):
        if value == _IN_ZIP_64:
            (value,), values = struct.unpack_from("<Q", values), values[8:]
        wide.append(value)
    return wide[1], wide[0], wide[2]
