"""Prints the project's tree with a phrase for every file, from the files' own first lines.

`--write` puts it into README.md; a structure test holds README.md against it.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
OPEN, CLOSE = "## The tree\n\n```\n", "```\n"
WIDTH = 120
COLUMN = 36  # where the phrases begin
PHRASE = WIDTH - COLUMN
FOLDERS = ("collab_megatron", "conf", "slurm", "tools")
SUFFIXES = {".py", ".yaml", ".sbatch", ".sh"}


def phrase(path: Path) -> str:
    """The first sentence of a module's docstring, or of a script's first comment."""
    text = path.read_text()
    if path.suffix == ".py":
        first = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0]
    else:
        comments = [line.lstrip("# ") for line in text.splitlines() if line.startswith("# ")]
        first = comments[0] if comments else ""
    sentence = " ".join(first.split()).split(". ")[0].rstrip(".:")
    for stop in (":", ";", ","):  # too long for its line: the part before a pause
        if len(sentence) > PHRASE and stop in sentence:
            sentence = sentence[: sentence.rindex(stop, 0, PHRASE + 1)] if stop in sentence[:PHRASE] else sentence
    return sentence


def lines(folder: Path, depth: int) -> Iterator[str]:
    entries = sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name))
    for path in entries:
        indent = "  " * depth
        if path.is_dir():
            built = path.name == "build" and not (path / "__init__.py").exists()
            generated = path.name.endswith(".egg-info") or built
            if generated or path.name.startswith((".", "__")):
                continue
            init = path / "__init__.py"
            label = f"{indent}{path.name}/"
            yield clip(f"{label:{COLUMN}s}{phrase(init)}" if init.exists() else label)
            yield from lines(path, depth + 1)
        elif path.suffix in SUFFIXES and path.name != "__init__.py":
            yield clip(f"{indent}{path.name:{COLUMN - len(indent)}s}{phrase(path)}")


def clip(line: str) -> str:
    return line.rstrip() if len(line) <= WIDTH else line[: WIDTH - 1].rstrip() + "…"


def tree() -> str:
    """The whole text, without fences."""
    shown: list[str] = []
    for name in FOLDERS:
        shown.append(f"{name}/")
        shown.extend(lines(REPOSITORY / name, 1))
    shown.append(f"{'tests/':{COLUMN}s}mirrors the rooms; parallel/ on gloo, slurm/ a real Slurm, end_to_end/ the road")
    return "\n".join(shown) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the tree in README.md")
    args = parser.parse_args()
    if not args.write:
        print(tree(), end="")
        return
    readme = REPOSITORY / "README.md"
    text = readme.read_text()
    start = text.index(OPEN) + len(OPEN)
    end = text.index(CLOSE, start)
    readme.write_text(text[:start] + tree() + text[end:])


if __name__ == "__main__":
    main()
