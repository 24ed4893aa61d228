"""Removes files from a wheel, and their lines from its RECORD: tools/pack_offline.sh leaves out what is not loaded.

python tools/gpu/trim_wheel.py FILE.whl PATTERN   (a regular expression; files whose path it is found in go)

Standard library only: the machine that packs needs no environment of this project.
"""

from __future__ import annotations

import os
import re
import sys
import zipfile
from pathlib import Path


def trim(wheel: Path, pattern: str) -> int:
    """Replace `wheel`; returns the number of files that were removed. Raises ValueError if the pattern finds none."""
    unwanted = re.compile(pattern)
    aside = wheel.with_name(wheel.name + ".tmp")
    with zipfile.ZipFile(wheel) as before:
        kept = [info for info in before.infolist() if not unwanted.search(info.filename)]
        removed = len(before.infolist()) - len(kept)
        if not removed:
            raise ValueError(f"{wheel.name} has no file that {pattern!r} is found in: its layout has changed")
        with zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED) as after:
            for info in kept:
                data = before.read(info)
                if info.filename.endswith(".dist-info/RECORD"):
                    lines = data.decode().splitlines(keepends=True)
                    data = "".join(line for line in lines if not unwanted.search(line.split(",")[0])).encode()
                after.writestr(info, data, zipfile.ZIP_DEFLATED)
    os.replace(aside, wheel)
    return removed


def main() -> None:
    wheel, pattern = Path(sys.argv[1]), sys.argv[2]
    size = wheel.stat().st_size
    try:
        removed = trim(wheel, pattern)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"{wheel.name}: {removed} files left out, {size / 1e6:.1f} MB -> {wheel.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
