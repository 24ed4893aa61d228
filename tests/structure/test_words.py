"""Words that engineers do not write today do not occur in code, comments, messages and documents."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PLACES = ("collab_megatron", "tests", "tools", "docs", "conf", "slurm", "README.md", "CHANGELOG.md", "CONTRIBUTING.md")
SUFFIXES = {".py", ".md", ".yaml", ".sh", ".sbatch"}  # no prompts: a new word would change what models answer
BETTER = {
    "anew": "again",
    "beside": "next to, besides, in parallel with",
    "dealt out": "assigned, distributed",
    "defect": "bug",
    "defects": "bugs",
    "hitherto": "until now",
    "mend": "fix",
    "mended": "fixed",
    "mending": "fixing",
    "mends": "fixes",
    "of now": "current",
    "thereof": "of it",
    "till": "until",
    "told of": "reported, informed",
    "whence": "from where",
    "wherefrom": "from where",
    "whereto": "to where",
    "whoever": "the name of who does it",
}
GAP = r"\s+(?:#\s+)?"  # two words of a comment may be on two lines
WORD = re.compile(rf"\b({'|'.join(BETTER)})\b".replace(" ", GAP), re.IGNORECASE)


def texts(root: Path) -> Iterator[tuple[Path, str]]:
    for place in PLACES:
        for file in sorted((root / place).rglob("*")) if (root / place).is_dir() else [root / place]:
            if (
                file.suffix in SUFFIXES
                and file.is_file()
                and "build" not in file.parts
                and file != Path(__file__).resolve()
            ):
                yield file, file.read_text()


def old_words(root: Path) -> list[str]:
    """Each occurrence, with a better word."""
    return [
        f"{file.relative_to(root)}:{text.count(chr(10), 0, found.start()) + 1}: {' '.join(found.group().split())!r}: "
        f"write {BETTER[' '.join(found.group().replace('#', ' ').split()).lower()]}"
        for file, text in texts(root)
        for found in WORD.finditer(text)
    ]


def test_no_text_has_an_old_word() -> None:
    assert old_words(REPOSITORY) == []


@pytest.mark.parametrize("word", [*BETTER, "Anew", "dealt\n# out"])
def test_each_old_word_is_found(tmp_path: Path, word: str) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "demo.yaml").write_text(f"seed: 1\n# it is {word} here\n")
    (found,) = old_words(tmp_path)
    assert found.startswith("conf/demo.yaml:2: ")


def test_words_that_contain_one_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("still until besides recommended EXIT_DEFECT renewed\n")
    assert old_words(tmp_path) == []
