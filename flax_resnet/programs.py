"""What a compiled program sends between devices, and what it holds, read from the program itself.

Nothing is run or timed. What a step sends follows from the network, the shardings and XLA's passes;
the tests assert it for a CPU's.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import jax

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<= ]*)\]")
_CALLS = re.compile(r"\b(?:body|condition|to_apply|calls|\w+_computations?)=(\{[^}]*\}|%?[\w.-]+)")
_NAME = re.compile(r"[\w.-]+")
_HEAD = re.compile(r"(?:ENTRY )?%?([\w.-]+) (?:\(.*\) -> .*)?\{$")
_SET = re.compile(r"(?:ROOT )?%?([\w.-]+) = ")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of one device.

    Attributes:
      dtype: XLA's name of it: "f32", "bf16", "s32", "pred".
      shape: of the part that the device has.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes, those of fewer than 8 bits packed."""
        width = re.search(r"\d+", self.dtype)
        bits = int(width[0]) if width else 8  # pred
        return -(-self.size * bits // 8)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One operation between devices; a fused one carries several arrays.

    Attributes:
      kind: one of KINDS; one that starts and ends apart is of the same kind.
      operands: what each device gives.
      results: what each device gets.
      looped: it is in a loop, and done in every turn of it.
      op_name: where in the traced function the first of what was fused comes from, or "".
    """

    kind: str
    operands: tuple[Array, ...]
    results: tuple[Array, ...]
    looped: bool = False
    op_name: str = ""

    @property
    def bytes(self) -> int:
        """Bytes of the whole arrays: what each device gives, or gets where that is more."""
        return max(sum(x.bytes for x in xs) for xs in (self.operands, self.results))

    @property
    def whole(self) -> tuple[Array, ...]:
        """Each array at its larger side: gathered, or not yet scattered."""
        pairs = zip(self.operands, self.results, strict=True)
        return tuple(max(pair, key=lambda array: array.size) for pair in pairs)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that a program takes on one device.

    Attributes:
      arguments: of its inputs.
      outputs: of its outputs, those in an argument's place too.
      aliased: of outputs that take a donated argument's place.
      temporaries: of what it needs meanwhile.
      code: of the program itself.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int


def memory(compiled: jax.stages.Compiled) -> Memory | None:
    """What a program takes on each device, or None where the backend does not say."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    return Memory(
        arguments=found.argument_size_in_bytes,
        outputs=found.output_size_in_bytes,
        aliased=found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        code=found.generated_code_size_in_bytes,
    )


@dataclasses.dataclass(frozen=True)
class Cost:
    """What XLA counts that a program does on one device; a loop's body once.

    Attributes:
      flops: operations on floats.
      bytes: read and written, by each of its parts.
    """

    flops: float
    bytes: float


def cost(compiled: jax.stages.Compiled) -> Cost | None:
    """What a program costs on each device, or None where the backend does not say."""
    found = compiled.cost_analysis() or {}
    if "flops" not in found or "bytes accessed" not in found:
        return None
    return Cost(found["flops"], found["bytes accessed"])


def collectives(compiled: jax.stages.Compiled | str) -> list[Collective]:
    """The operations between devices of a compiled program, in the order of its text.

    Args:
      compiled: as ``jax.jit(f).lower(...).compile()`` gives it, or its text.
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text() or ""
    instructions = list(_instructions(text))
    types = {each.name: each.type for each in instructions}
    looped = _looped(instructions)
    found = []
    for each in instructions:
        kind = each.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        got = _arrays(each.type)
        given = tuple(x for name in each.operands for x in _arrays(types.get(name, "")))
        if kind != each.opcode and len(got) >= 2 * len(given):
            # What starts one holds what was given before what is got, and contexts after it.
            got = got[len(given) : 2 * len(given)]
        source = _OP_NAME.search(each.rest)
        op_name = source[1] if source else ""
        found.append(Collective(kind, given, got, each.computation in looped, op_name))
    return found


def totals(found: Iterable[Collective]) -> dict[str, tuple[int, int]]:
    """{kind: (how many, their bytes)}; one in a loop counts once."""
    counts: dict[str, tuple[int, int]] = {}
    for each in found:
        number, size = counts.get(each.kind, (0, 0))
        counts[each.kind] = (number + 1, size + each.bytes)
    return counts


def carried(found: Iterable[Collective], tree: Any) -> dict[str, float]:
    """The share of the bytes of some arrays that each kind of collective carries.

    An array is taken for carried where an operation has one of its dtype and as many elements
    (XLA may have changed its axes), each such counted once: 1.0 for "all-reduce" says that there
    is an all-reduced array for every one of ``tree``, whatever more there is.

    Args:
      found: of ``collectives``.
      tree: arrays or shapes, whole.
    """
    wanted = collections.Counter(_key(leaf) for leaf in jax.tree.leaves(tree))
    total = sum(size * wide * count for (size, wide), count in wanted.items())
    sent: dict[str, collections.Counter[tuple[int, int]]] = {}
    for each in found:
        keys = ((x.size, x.bytes // max(1, x.size)) for x in each.whole)
        sent.setdefault(each.kind, collections.Counter()).update(keys)
    both = {kind: wanted & counts for kind, counts in sent.items()}
    return {
        kind: sum(size * wide * count for (size, wide), count in counts.items()) / max(1, total)
        for kind, counts in both.items()
        if counts
    }


def _key(leaf: Any) -> tuple[int, int]:
    return math.prod(leaf.shape), leaf.dtype.itemsize


def device_bytes(tree: Any) -> int:
    """Bytes of a tree's arrays on one device: of what is split, a part."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


@dataclasses.dataclass(frozen=True)
class _Instruction:
    """A line of a program: ``name = type opcode(operands), rest`` in a computation."""

    computation: str
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str


def _instructions(text: str) -> Iterator[_Instruction]:
    computation = ""
    for raw in text.splitlines():
        line = re.sub(r"/\*.*?\*/", "", raw).strip()
        head = _HEAD.match(line)
        if head:
            computation = head[1]
        start = _SET.match(line)
        if not start:
            continue
        split = _type_end(line, start.end())
        opening = line.find("(", split)
        if opening < 0:
            continue
        closing = _closing(line, opening)
        # An operand is "%name", "name", or "f32[8]{0} %name" in longer texts.
        inside = line[opening + 1 : closing]
        names = re.findall(r"%([\w.-]+)", inside) or re.findall(r"[\w.-]+", inside)
        yield _Instruction(
            computation,
            start[1],
            line[start.end() : split],
            line[split:opening].strip(),
            tuple(names),
            line[closing + 1 :],
        )


def _type_end(line: str, start: int) -> int:
    """Where the type that starts there ends: a tuple's has spaces within its parentheses."""
    if line[start : start + 1] == "(":
        return _closing(line, start) + 1
    space = line.find(" ", start)
    return len(line) if space < 0 else space


def _closing(line: str, opening: int) -> int:
    depth = 0
    for i in range(opening, len(line)):
        depth += (line[i] == "(") - (line[i] == ")")
        if depth == 0:
            return i
    return len(line)


def _arrays(kind: str) -> tuple[Array, ...]:
    return tuple(
        Array(dtype, tuple(int(size.strip("<= ")) for size in sizes.split(",") if size.strip()))
        for dtype, sizes in _ARRAY.findall(kind)
        if dtype not in ("token", "opaque")
    )


def _looped(instructions: Iterable[_Instruction]) -> set[str]:
    """Computations that loops run, called ones too."""
    calls: dict[str, set[str]] = {}
    reached: set[str] = set()
    for each in instructions:
        called = {name for group in _CALLS.findall(each.rest) for name in _NAME.findall(group)}
        calls.setdefault(each.computation, set()).update(called)
        if each.opcode == "while":
            reached |= called
    waiting = list(reached)
    while waiting:
        new = calls.get(waiting.pop(), set()) - reached
        reached |= new
        waiting.extend(new)
    return reached
