"""Generates the two lists in docs/structure.md: the rooms with what each may import, and the files with a phrase each.

Rooms come from tests/structure/import_rules.py, phrases from the first sentence of each file. `--write` replaces both
lists; tests/structure/test_docs.py fails while they are out of date.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # run as a file, Python finds only tools/

from tests.structure import import_rules  # noqa: E402

DOCUMENT = REPOSITORY / "docs" / "structure.md"
WIDTH = 120
COLUMN = 36  # where the phrases begin
PHRASE = WIDTH - COLUMN
FOLDERS = ("collab_megatron", "conf", "slurm", "tools")
SUFFIXES = {".py", ".yaml", ".sbatch", ".sh", ".js"}
GENERATED = {"build", "bundle", "node_modules"}  # folders, unless they are packages
TESTS = "mirrors the rooms; trainer/parallel/ on gloo, slurm/ on a real Slurm, end_to_end/ whole runs"


def phrase(path: Path) -> str:
    """The first sentence of a module's docstring, or of a script's first comment."""
    text = path.read_text()
    if path.suffix == ".py":
        first = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0]
    elif path.suffix == ".js":
        comment = itertools.takewhile(lambda line: line.startswith("// "), text.splitlines())
        first = " ".join(line.removeprefix("// ") for line in comment)
    else:
        comments = [line.lstrip("# ") for line in text.splitlines() if line.startswith("# ")]
        first = comments[0] if comments else ""
    return " ".join(first.split()).split(". ")[0].rstrip(".:")


def rooms() -> str:
    """A Markdown table: each folder of the package, its job, and the rooms that it may import."""
    lines = ["| room | job | may import |", "|---|---|---|"]
    for init in sorted((REPOSITORY / import_rules.PACKAGE).glob("*/**/__init__.py")):
        room = init.parent.relative_to(REPOSITORY / import_rules.PACKAGE).as_posix()
        name = room.replace("/", ".")
        if name not in import_rules.ROOMS and name not in import_rules.FREE:
            continue  # part of the room around it
        allowed = "every room" if name in import_rules.FREE else ", ".join(import_rules.ROOMS[name]) or "ground files"
        lines.append(f"| `{room}/` | {phrase(init)} | {allowed} |")
    ground = ", ".join(f"`{name}`" for name in import_rules.EVERYWHERE)
    return "\n".join(lines) + f"\n\nGround files, which every room may import: {ground}.\n"


def files() -> str:
    """The project's tree with a phrase for every file, as a code block."""
    shown: list[str] = []
    for name in FOLDERS:
        shown.append(f"{name}/")
        shown.extend(_lines(REPOSITORY / name, 1))
    shown.append(f"{'tests/':{COLUMN}s}{TESTS}")
    return "\n".join(("```", *shown, "```")) + "\n"


def _lines(folder: Path, depth: int) -> Iterator[str]:
    entries = sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name))
    for path in entries:
        indent = "  " * depth
        if path.is_dir():
            built = path.name in GENERATED and not (path / "__init__.py").exists()
            generated = path.name.endswith(".egg-info") or built
            if generated or path.name.startswith((".", "__")):
                continue
            init = path / "__init__.py"
            label = f"{indent}{path.name}/"
            yield _clip(f"{label:{COLUMN}s}{_short(phrase(init))}" if init.exists() else label)
            yield from _lines(path, depth + 1)
        elif path.suffix in SUFFIXES and path.name != "__init__.py":
            yield _clip(f"{indent}{path.name:{COLUMN - len(indent)}s}{_short(phrase(path))}")


def _short(sentence: str) -> str:
    """The sentence, or the part of it before a pause that fits its line."""
    for stop in (":", ";", ","):
        if len(sentence) > PHRASE and stop in sentence[:PHRASE]:
            sentence = sentence[: sentence.rindex(stop, 0, PHRASE + 1)]
    return sentence


def _clip(line: str) -> str:
    return line.rstrip() if len(line) <= WIDTH else line[: WIDTH - 1].rstrip() + "…"


def updated(text: str) -> str:
    """The document with both lists as they are now."""
    for name, content in (("rooms", rooms()), ("files", files())):
        begin, end = f"<!-- {name}: generated -->\n", f"<!-- {name}: end -->\n"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = before + begin + content + end + after
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace both lists in docs/structure.md")
    if parser.parse_args().write:
        DOCUMENT.write_text(updated(DOCUMENT.read_text()))
    else:
        print(rooms(), files(), sep="\n", end="")


if __name__ == "__main__":
    main()
