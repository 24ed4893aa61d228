"""Makes a wheel smaller for tools/pack_offline.sh: without files that are not loaded, without code for other GPUs.

python tools/gpu/trim_wheel.py FILE.whl [--without PATTERN] [--architecture 90]

PATTERN: a regular expression; files whose path it is found in go, and their lines in RECORD with them. Standard library
only: the machine that packs needs no environment of this project.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import os
import re
import sys
import zipfile
from pathlib import Path

if __package__:
    from tools.gpu.device_code import keep_only
else:  # run as a file
    from device_code import keep_only  # type: ignore[no-redef,import-not-found]

RECORD = ".dist-info/RECORD"


def trim(wheel: Path, without: str | None = None, architecture: int | None = None) -> int:
    """Replace `wheel`; returns the number of files that were removed.

    Raises ValueError if the pattern finds none, or a library has no code for the architecture.
    """
    unwanted = re.compile(without) if without else None
    aside = wheel.with_name(wheel.name + ".tmp")
    changed: dict[str, str] = {}  # path -> its new line of RECORD
    with zipfile.ZipFile(wheel) as before:
        kept = [info for info in before.infolist() if not (unwanted and unwanted.search(info.filename))]
        removed = len(before.infolist()) - len(kept)
        if unwanted and not removed:
            raise ValueError(f"{wheel.name} has no file that {without!r} is found in: its layout has changed")
        kept.sort(key=lambda info: info.filename.endswith(RECORD))  # last, when all changes are known
        with zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED) as after:
            for info in kept:
                data = before.read(info)
                if architecture is not None and info.filename.endswith(".so"):
                    library = bytearray(data)
                    try:
                        keep_only(library, architecture)
                    except ValueError as error:
                        aside.unlink()
                        raise ValueError(f"{info.filename} of {wheel.name}: {error}") from None
                    if library != data:
                        data = bytes(library)
                        changed[info.filename] = line_of(info.filename, data)
                if info.filename.endswith(RECORD):
                    data = record(data.decode(), {info.filename for info in kept}, changed).encode()
                after.writestr(info, data, zipfile.ZIP_DEFLATED)
    os.replace(aside, wheel)
    return removed


def line_of(path: str, data: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return f"{path},sha256={digest},{len(data)}\n"


def record(text: str, kept: set[str], changed: dict[str, str]) -> str:
    """The lines of the files that are kept, with the sums of those that were changed."""
    lines = ((next(csv.reader([line]))[0], line) for line in text.splitlines(keepends=True))
    return "".join(changed.get(path, line) for path, line in lines if path in kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--without", metavar="PATTERN")
    parser.add_argument("--architecture", type=int, metavar="90")
    args = parser.parse_args()
    size = args.wheel.stat().st_size
    try:
        removed = trim(args.wheel, args.without, args.architecture)
    except ValueError as error:
        sys.exit(f"error: {error}")
    now = args.wheel.stat().st_size
    print(f"{args.wheel.name}: {removed} files left out, {size / 1e6:.1f} MB -> {now / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
