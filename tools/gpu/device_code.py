"""Takes the code for other GPUs out of a CUDA library: zeros in its place, which compress to nothing.

transformer-engine's library of 344 MB has code for eight architectures; with sm_90's alone its wheel of 277 MB has 32.
The layout of a fatbin is not documented. It was read from libraries of CUDA 13: a header of 16 bytes with the length of
its entries; an entry has its kind at byte 0, the lengths of its own header and of its code at 4 and 8, and its
architecture at 28. Every fatbin stays where it is, because other sections point to it; it becomes shorter. cuobjdump
finds the same code for sm_90 as before, and no other.
"""

from __future__ import annotations

import struct

MAGIC = struct.pack("<I", 0xBA55ED50)
HEADER = struct.Struct("<IHHQ")  # magic, version, length of this header, length of the entries
LENGTH_AT = 8
ENTRY = struct.Struct("<HHIQ")  # kind, version, length of this header, length of the code
ARCHITECTURE_AT, SHORTEST_ENTRY = 28, 32
PTX, ELF = 1, 2


def keep_only(library: bytearray, architecture: int) -> int:
    """Remove the code for all others (90: sm_90) in place, PTX too; returns the bytes of code that are left.

    Raises ValueError where a fatbin has another layout than the one above, or none has code for `architecture`:
    such a library could not run. Without a fatbin nothing is changed, and the result is 0.
    """
    left, found, position = 0, False, library.find(MAGIC)
    while 0 <= position <= len(library) - HEADER.size:
        _, version, header, length = HEADER.unpack_from(library, position)
        start, end = position + header, position + header + length
        if version != 1 or header != HEADER.size or end > len(library):
            position = library.find(MAGIC, position + 1)  # four bytes of something else
            continue
        kept, entry = bytearray(), start
        while entry < end:
            kind, _, own, code = ENTRY.unpack_from(library, entry)
            if kind not in (PTX, ELF) or own < SHORTEST_ENTRY or entry + own + code > end:
                raise ValueError(f"the entry at byte {entry} of a fatbin has an unknown layout")
            (built_for,) = struct.unpack_from("<I", library, entry + ARCHITECTURE_AT)
            if kind == ELF and built_for == architecture:
                kept += library[entry : entry + own + code]
                left += code
            entry += own + code
        library[start:end] = kept + bytes(length - len(kept))
        struct.pack_into("<Q", library, position + LENGTH_AT, len(kept))
        found, position = True, library.find(MAGIC, end)
    if found and not left:
        raise ValueError(f"it has no code for sm_{architecture}")
    return left
