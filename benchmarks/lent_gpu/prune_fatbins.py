"""Zero the GPU code of other architectures in a shared library, so that it compresses to what one GPU needs.

prune_fatbins.py LIBRARY OUT 90: of vLLM 0.32's `_C_stable_libtorch` 9 MB remain (xz -1) of 56, of FlashAttention 3 16
of 43. Kernels of the kept architecture stay where they are; the loader never looks at the others.
"""

import struct
import sys
from pathlib import Path

MAGIC = struct.pack("<I", 0xBA55ED50)
CUBIN = 2
HEADER = struct.Struct("<HHQ")
"""Version, header size, size of what follows, behind the magic number."""
ENTRY = struct.Struct("<HHIQ")
"""Kind, attributes, header size, payload size."""
ARCHITECTURE_AT = 28


def prune(code: bytearray, kept: int) -> dict[tuple[int, int], int]:
    """Bytes found by (kind, architecture); all but cubins of `kept` are zero afterwards."""
    found: dict[tuple[int, int], int] = {}
    begin = code.find(MAGIC)
    while begin >= 0:
        version, header, length = HEADER.unpack_from(code, begin + len(MAGIC))
        if (version, header) != (1, 16):  # the number occurs elsewhere too
            begin = code.find(MAGIC, begin + 1)
            continue
        entry, end = begin + header, begin + header + length
        while entry < end:
            kind, _, entry_header, size = ENTRY.unpack_from(code, entry)
            (architecture,) = struct.unpack_from("<I", code, entry + ARCHITECTURE_AT)
            found[kind, architecture] = found.get((kind, architecture), 0) + size
            if (kind, architecture) != (CUBIN, kept):
                code[entry + entry_header : entry + entry_header + size] = bytes(size)
            entry += entry_header + size
        begin = code.find(MAGIC, end)
    return found


if __name__ == "__main__":
    library, out, kept = sys.argv[1:]
    code = bytearray(Path(library).read_bytes())
    print(prune(code, int(kept)))
    Path(out).write_bytes(code)
