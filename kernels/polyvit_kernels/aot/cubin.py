"""What a compiled kernel uses, read from its machine code: registers, spills and whether loops repeat them, tensor-core instructions."""

import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from triton import knobs

OPCODES = {0x187: "STL", 0x183: "LDL", 0x03C: "HMMA", 0x1F0: "HGMMA", 0x1EA: "UTCHMMA"}
"""The low nine bits of the instructions that are counted, the same from Ampere to Blackwell: store to and load from the stack, and the
products of 16-bit matrices of mma.sync, of Hopper's wgmma and of Blackwell's tcgen05. NVIDIA names them (nvdisasm) but does not document
their bits; the tests compare the two. A disassembly, which only a kernel that spills needs, takes as long as the compilation."""

_INSTRUCTION_BYTES = 16
_LABEL = re.compile(r"^(\.L\w+):")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([\w.]+)(.*)")
_TARGET = re.compile(r"\((\.L\w+)\)|(?<=[\s,\"])(\.L\w+)")
_JUMPS = ("BRA", "BRX", "JMP", "JMX", "EXIT", "RET", "WARPSYNC.COLLECTIVE")
_WAITS = ("SYNCS", "USETMAXREG")


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Per thread: `registers` and bytes of `stack`. In the code: how many instructions store to and load from it, how many of these are
    in inner loops (`count_inner_spills`), and how many multiply matrices."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    inner_spills: int
    tensor: Mapping[str, int]


def read(cubin: bytes) -> Usage:
    """What the one kernel in a cubin uses."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        resources = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        counts = count_instructions(cubin)
        stores, loads = counts.pop("STL", 0), counts.pop("LDL", 0)
        inner = count_inner_spills(_disassemble(file.name)) if stores or loads else 0
    ((registers, stack, local),) = re.findall(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", resources)
    return Usage(
        registers=int(registers),
        stack=int(stack) + int(local),
        spill_stores=stores,
        spill_loads=loads,
        inner_spills=inner,
        tensor=dict(counts),
    )


def count_instructions(cubin: bytes) -> Counter[str]:
    """How many there are of each of `OPCODES`."""
    words = (word for code in _iterate_code(cubin) for (word,) in struct.iter_unpack("<Q8x", code))
    return Counter(OPCODES[word & 0x1FF] for word in words if word & 0x1FF in OPCODES)


def _iterate_code(cubin: bytes) -> Iterator[bytes]:
    """The executable sections of an ELF file of 64 bits."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count = struct.unpack_from("<HH", cubin, 0x3A)
    for index in range(count):
        _, _, flags, _, offset, length = struct.unpack_from("<IIQQQQ", cubin, table + index * size)
        if flags & 0x4:
            yield cubin[offset : offset + length - length % _INSTRUCTION_BYTES]


def _disassemble(path: str) -> str:
    return subprocess.run([knobs.nvidia.nvdisasm.path, "-ndf", "-c", path], capture_output=True, text=True, check=True).stdout


@dataclass
class _BasicBlock:
    """Instructions of which all are executed when the first one is."""

    opcodes: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    falls_through: bool = True


def count_inner_spills(assembly: str) -> int:
    """How many loads from the stack and stores to it are in inner loops: those in which no other loop lies.

    A loop that only waits, for a barrier or for registers, is none: it may lie in an inner loop, and what it repeats costs nothing. What
    lies in outer loops alone is not counted: a persistent kernel's loop over tiles, or that in which warps wait for their partition.
    """
    blocks, labels = _split_blocks(assembly)
    successors = {
        index: {labels[name] for name in block.targets} | ({index + 1} if block.falls_through and index + 1 < len(blocks) else set())
        for index, block in enumerate(blocks)
    }
    return sum(
        opcode.startswith(("STL", "LDL"))
        for loop in _find_inner_loops(successors, blocks)
        for index in loop
        for opcode in blocks[index].opcodes
    )


def _split_blocks(assembly: str) -> tuple[list[_BasicBlock], dict[str, int]]:
    """The blocks in their order, and which one each label names."""
    blocks, labels = [_BasicBlock()], {}
    for line in assembly.splitlines():
        if label := _LABEL.match(line):
            if blocks[-1].opcodes:
                blocks.append(_BasicBlock())
            labels[label[1]] = len(blocks) - 1
        elif instruction := _INSTRUCTION.match(line):
            predicate, opcode, operands = instruction.groups()
            blocks[-1].opcodes.append(opcode)
            if opcode.startswith(_JUMPS):
                blocks[-1].targets = [first or second for first, second in _TARGET.findall(operands)]
                blocks[-1].falls_through = bool(predicate) or opcode.startswith("WARPSYNC") or ".DIV" in opcode
                blocks.append(_BasicBlock())
    return blocks, labels


def _find_inner_loops(successors: Mapping[int, Collection[int]], blocks: list[_BasicBlock]) -> Iterator[set[int]]:
    """The blocks of each loop that holds no other: a loop without its first block is looked through again."""
    for loop in _find_cycles(successors):
        inside = loop - {min(loop)}
        inner = list(_find_inner_loops({index: [next for next in successors[index] if next in inside] for index in inside}, blocks))
        if inner:
            yield from inner
        elif len(loop) > 1 or not any(opcode.startswith(_WAITS) for index in loop for opcode in blocks[index].opcodes):
            yield loop


def _find_cycles(successors: Mapping[int, Collection[int]]) -> Iterator[set[int]]:
    """Strongly connected components with an edge inside."""
    reached = {index: _find_reachable(successors, index) for index in successors}
    left = {index for index in successors if index in reached[index]}
    while left:
        first = min(left)
        component = {index for index in reached[first] if first in reached[index]}
        yield component
        left -= component


def _find_reachable(successors: Mapping[int, Collection[int]], start: int) -> set[int]:
    """The blocks that control flow leads to from `start`, in one step or more."""
    reached: set[int] = set()
    edges = list(successors[start])
    while edges:
        index = edges.pop()
        if index not in reached:
            reached.add(index)
            edges += successors[index]
    return reached
