"""The documents name files, tests, commands, flags and config keys that exist; the generated lists are up to date."""

from __future__ import annotations

import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from collab_megatron.config import BuildDatasetConfig, DPOConfig, EvaluateConfig, RLConfig, SFTConfig
from collab_megatron.config.explain import REMOVED

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENTS = (
    *sorted((REPOSITORY / "docs").glob("*.md")),
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    REPOSITORY / "requirements" / "README.md",
    REPOSITORY / "tools" / "cpu_support" / "README.md",
    REPOSITORY / "tools" / "viewer" / "README.md",
)
HISTORY = ("CHANGELOG.md", "config.md")  # they name removed keys
LONGEST_README = 200
CONFIGS = (RLConfig, SFTConfig, DPOConfig, EvaluateConfig, BuildDatasetConfig)
SECTIONS = frozenset(name for config in CONFIGS for name in config.model_fields)
OTHER_FILES = re.compile(r"\.(py|yaml|md|sh|json|jsonl|sqlite|log|txt|sbatch|zst)$")  # `journal.sqlite` is no key


def in_documents(pattern: str) -> Iterator[tuple[Path, str]]:
    """Every match in every document."""
    for path in DOCUMENTS:
        for found in re.findall(pattern, path.read_text()):
            yield path, found


def test_links_lead_to_files() -> None:
    links = [(path, link.partition("#")[0]) for path, link in in_documents(r"\]\(([^)\s]+)\)") if "://" not in link]
    assert len(links) > 20
    assert [f"{path.name}: {link}" for path, link in links if link and not (path.parent / link).exists()] == []


def test_the_readme_is_short_and_leads_to_every_document() -> None:
    text = (REPOSITORY / "README.md").read_text()
    assert len(text.splitlines()) <= LONGEST_README
    assert [path.name for path in (REPOSITORY / "docs").glob("*.md") if f"](docs/{path.name})" not in text] == []


def test_named_files_exist() -> None:
    names = list(in_documents(r"(?<![\w/.-])((?:collab_megatron|tools|tests|slurm|requirements)/[\w/.-]*\w)"))
    names += in_documents(r"(?<![\w/.-])(conf/demo_\w+\.yaml)")
    assert len(names) > 100
    assert sorted({f"{path.name}: {name}" for path, name in names if not (REPOSITORY / name).exists()}) == []


def test_named_tests_exist() -> None:
    tests = sorted(set(in_documents(r"(tests/[\w/]+\.py::\w+)")))
    assert len(tests) > 30
    missing = []
    for path, test in tests:
        file, _, name = test.partition("::")
        if f"def {name}(" not in (REPOSITORY / file).read_text():
            missing.append(f"{path.name}: {test}")
    assert missing == []


def test_commands_name_modules_targets_and_flags_that_exist() -> None:
    modules = set(in_documents(r"-m (collab_megatron[\w.]*)"))
    files = {name: REPOSITORY / name.replace(".", "/") for _, name in modules}
    runnable = {
        name for name, file in files.items() if file.with_suffix(".py").exists() or (file / "__main__.py").exists()
    }
    assert set(files) - runnable == set()
    assert [name for _, name in in_documents(r"`(collab_megatron(?:\.\w+)+)`") if not _is_defined(name)] == []
    makefile = (REPOSITORY / "Makefile").read_text()
    assert {
        target
        for _, target in in_documents(r"(?:`|\n)make ([a-z-]+)(?=`| +#| ARGS|\n)")
        if f"\n{target}:" not in makefile
    } == set()
    sources = "".join(
        file.read_text() for room in ("collab_megatron", "tools") for file in (REPOSITORY / room).rglob("*.py")
    )
    commands = list(in_documents(r"((?:python|\.venv/bin/python) (?:-m|tools/)[^\n`#]*)"))
    flags = {flag for _, command in commands for flag in re.findall(r"--[a-z][a-z-]*", command)}
    assert len(flags) > 10
    assert {flag for flag in flags if f'"{flag}"' not in sources} == set()


def _is_defined(dotted: str) -> bool:
    """Whether a module, or a name in one, is there."""
    module, _, name = dotted.rpartition(".")
    whole, parent = (REPOSITORY / part.replace(".", "/") for part in (dotted, module))
    if whole.is_dir() or whole.with_suffix(".py").is_file():
        return True
    source = parent / "__init__.py" if parent.is_dir() else parent.with_suffix(".py")
    return source.is_file() and name in source.read_text()


def test_named_config_keys_exist() -> None:
    dotted = set(in_documents(r"`((?:[a-z_]+\.)[a-z_*.]*[a-z_])(?:[:=][^`]*)?`"))
    keys = {(path, key) for path, key in dotted if key.split(".")[0] in SECTIONS and not OTHER_FILES.search(key)}
    assert len(keys) > 60
    wrong = [(path.name, key) for path, key in sorted(keys) if not any(_has(kind, key) for kind in CONFIGS)]
    assert [f"{name}: {key}" for name, key in wrong if not (name in HISTORY and key in REMOVED)] == []


def _has(kind: object, key: str) -> bool:
    """Whether a config type, or a section inside an annotation such as `JudgeSection | None`, has the dotted key."""
    if typing.get_origin(kind) is dict:
        return True
    if typing.get_args(kind):
        return any(_has(part, key) for part in typing.get_args(kind))
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return False
    first, _, rest = key.partition(".")
    fields = [field for name, field in kind.model_fields.items() if first in (name, "*")]
    return any(not rest or _has(field.annotation, rest) for field in fields)


@pytest.fixture(scope="module")
def generated() -> str:
    tool = [sys.executable, "tools/structure_doc.py"]
    return subprocess.run(tool, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout


def test_the_lists_of_rooms_and_files_are_up_to_date(generated: str) -> None:
    text = (REPOSITORY / "docs" / "structure.md").read_text()
    rooms, files = re.findall(r"<!-- \w+: generated -->\n(.*?)<!-- \w+: end -->", text, re.DOTALL)
    assert len(files.splitlines()) > 100
    assert generated == f"{rooms}\n{files}", "run python tools/structure_doc.py --write"


def test_every_file_has_a_phrase(generated: str) -> None:
    assert [line for line in generated.splitlines() if re.fullmatch(r"\s*[\w.]+\.(py|yaml|sh|sbatch)", line)] == []
