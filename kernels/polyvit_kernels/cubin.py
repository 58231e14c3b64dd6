"""What a compiled kernel uses, read from its image: registers, spills, tensor-core instructions."""

import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from triton import knobs

OPCODES = {0x187: "STL", 0x183: "LDL", 0x03C: "HMMA", 0x1F0: "HGMMA", 0x1EA: "UTCHMMA"}
"""The low nine bits of the instructions that are counted, the same from Ampere to Blackwell: store to and load from the stack, and the
products of 16-bit matrices of mma.sync, of Hopper's wgmma and of Blackwell's tcgen05. NVIDIA names them (nvdisasm) but does not document
their bits; the tests compare the two. A disassembly would take as long as the compilation."""

_INSTRUCTION_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Per thread: `registers` and bytes of `stack`. In the code: how many instructions store to and load from it, and multiply matrices."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    tensor: Mapping[str, int]


def read(image: bytes) -> Usage:
    """What the one kernel in a cubin uses."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        resources = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ((registers, stack, local),) = re.findall(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", resources)
    counts = instructions(image)
    stores, loads = counts.pop("STL", 0), counts.pop("LDL", 0)
    return Usage(registers=int(registers), stack=int(stack) + int(local), spill_stores=stores, spill_loads=loads, tensor=dict(counts))


def instructions(image: bytes) -> Counter[str]:
    """How many there are of each of `OPCODES`."""
    words = (word for code in _code(image) for (word,) in struct.iter_unpack("<Q8x", code))
    return Counter(OPCODES[word & 0x1FF] for word in words if word & 0x1FF in OPCODES)


def _code(image: bytes) -> Iterator[bytes]:
    """The executable sections of an ELF file of 64 bits."""
    (table,) = struct.unpack_from("<Q", image, 0x28)
    size, count = struct.unpack_from("<HH", image, 0x3A)
    for place in range(count):
        _, _, flags, _, offset, length = struct.unpack_from("<IIQQQQ", image, table + place * size)
        if flags & 0x4:
            yield image[offset : offset + length - length % _INSTRUCTION_BYTES]
