"""Import rules: the table of allowed imports, and the check of a tree against it.

A room is a folder of the package or a top-level file. `trainer` and `rollout` contain rooms. Imports inside functions
and under TYPE_CHECKING count too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "collab_megatron"

# the ground floor: data contract, errors, files and records, text, signals; and the config sections, which leaf
# functions take as arguments
EVERYWHERE = (
    *("types", "errors", "figures", "files", "json_lines", "log", "signals", "run_order", "text", "concurrency"),
    "config.sections",
)

# Room -> rooms that it may import. The row of an inner room replaces that of the room around it.
ROOMS: Mapping[str, tuple[str, ...]] = {
    "types": (),
    "errors": (),
    "figures": (),
    "files": (),
    "json_lines": (),
    "log": (),
    "signals": (),
    "run_order": (),
    "text": (),
    "concurrency": (),
    "limiter": (),
    "commands": (),
    "config": (),
    "model": (),
    "data": (),
    "wire": ("config", "model"),
    "engine": ("limiter",),
    "rollout": ("config", "data", "engine", "limiter", "model", "wire"),
    "rollout.journal": (),
    "rollout.llm": ("config", "limiter", "rollout.journal"),
    "rollout.sandbox": (),
    "rollout.rewards": ("config", "rollout.llm", "rollout.sandbox"),
    "data_engine": (
        *("config", "data"),
        *("rollout.conversation", "rollout.first_turns", "rollout.journal", "rollout.llm", "rollout.rewards"),
    ),
    "trainer.batching": (),
    "trainer.loss": ("trainer.batching",),
    "trainer.local": ("trainer.batching",),
    "trainer.convert": ("model",),
    "trainer.actor": ("model", "trainer.batching", "trainer.loss", "trainer.local", "trainer.convert"),
    "trainer.checkpoint": ("model", "wire", "trainer.actor", "trainer.convert", "trainer.local"),
    "trainer.sync": ("engine", "model", "wire", "trainer.actor", "trainer.batching", "trainer.convert"),
    "trainer.report": (),
    "launch": ("config", "data", "engine", "model", "wire"),
    "demo": ("launch.child_process", "launch.supervisor"),
    "doctor": ("config", "data", "launch", "model", "rollout.llm"),
    "watch": ("wire",),
    "view": ("rollout.record_files", "rollout.rewards"),
}

# additional imports of single files or rooms, with the reason
ADDED: Mapping[str, Mapping[str, str]] = {
    "demo.summary": {"rollout.llm.accounting": "reads the file of API calls that a run left"},
    "launch.cost": {"rollout.llm.prices": "the plan's dollars come from LiteLLM's price table"},
    "launch.epochs": {"rollout.replay": "a pass over a record has as many steps as were recorded"},
    "launch.plan": {"rollout.replay": "a type: what a replay trains on"},
    "launch.path_checks": {"rollout.journal.store": "can the journal be opened?"},
    "launch.preflight": {
        "data_engine": "can the problems of build_dataset be read?",
        "rollout.llm": "do the LLM services answer?",
        "rollout.rewards": "does the config name metrics that exist?",
    },
    "launch.record_checks": {"rollout.replay": "is there a record to train on?"},
    "trainer.convert": {"trainer.actor.grid": "a type: the exporter is given the rank grid"},
    "trainer.local.layers": {"trainer.actor.backend": "a type: which layers the backend has"},
    "trainer.sync.proof.probe": {"data.chat": "the probe prompt goes through the model's tokenizer"},
}

# entry points and the parts of their loops may import every room
FREE = ("trainer", "train_rl", "train_sft", "train_dpo", "evaluate", "rescore", "collect")

# external package -> rooms that may import it; all rooms may import packages without a row
OUTSIDE: Mapping[str, tuple[str, ...]] = {
    "litellm": ("rollout.llm",),
    "megatron": ("trainer.actor", "trainer.local", "trainer.checkpoint"),
    "transformer_engine": ("trainer.actor", "trainer.local"),
    "apex": ("trainer.actor",),
    "sglang": (),  # runs in its own process and is used over HTTP
}

# pure rooms, and the only external packages that they may import
ONLY: Mapping[str, tuple[str, ...]] = {
    "types": (),
    "errors": (),
    "figures": ("msgspec",),
    "files": (),
    "json_lines": (),
    "log": (),
    "signals": (),
    "run_order": (),
    "text": (),
    "concurrency": (),
    "config": ("pydantic", "yaml"),
    "model": ("httpx", "huggingface_hub"),
    "trainer.loss": ("torch",),
    "trainer.batching": ("torch",),
    "rollout.advantages": (),
    "rollout.rewards": (),
    "rollout.sandbox": (),
    "rollout.rewards.bleu_score": ("sacrebleu",),
    "rollout.live_page": ("aiohttp", "orjson", "prometheus_client"),
    "rollout.rewards.math_worker": ("math_verify",),
    "demo": ("aiohttp", "rich"),
    "doctor": ("httpx", "packaging"),
    "view": ("tokenizers",),
    "demo.tokenizer": ("tokenizers", "transformers"),
    "demo.tiny_model": ("torch", "tokenizers", "transformers"),
}
NOT_DISTRIBUTED = ("types", "config", "model", "rollout", "trainer.loss", "trainer.batching")


@dataclass(frozen=True)
class Import:
    """One import statement's name, as `package.module.name`."""

    file: Path
    line: int
    importer: str  # `driver.group`, without the package's name
    name: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.name}"


def imports_of(root: Path) -> Iterator[Import]:
    """Every import statement of the package in `root`."""
    for file in sorted((root / PACKAGE).rglob("*.py")):
        parts = file.relative_to(root / PACKAGE).with_suffix("").parts
        importer = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:  # relative imports: not used here, but resolved
                    inside = parts[: len(parts) - node.level]
                    base = ".".join(part for part in (PACKAGE, *inside, node.module) if part)
                names = [f"{base}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in names:
                yield Import(file, node.lineno, importer, name)


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a dotted name is one of the prefixes or inside one."""
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def violations(root: Path, standard_library: frozenset[str]) -> list[str]:
    """Every import that the tables forbid, as a sentence."""
    found = []
    for statement in imports_of(root):
        top, _, rest = statement.name.partition(".")
        importer = statement.importer
        if top == PACKAGE:
            if not _room_allows(importer, rest):
                found.append(f"{statement}: {room_of(importer)} may not import that room")
            continue
        if top in OUTSIDE and not within(importer, OUTSIDE[top]):
            found.append(f"{statement}: only {', '.join(OUTSIDE[top]) or 'no room'} may")
        if within(statement.name, ("torch.distributed",)) and within(importer, NOT_DISTRIBUTED):
            found.append(f"{statement}: this room stays free of torch.distributed")
        pure = [names for room, names in ONLY.items() if within(importer, (room,))]
        if pure and top not in standard_library and not any(top in names for names in pure):
            found.append(f"{statement}: this room stays free of {top}")
    return found


def unused_entries(root: Path) -> list[str]:
    """Entries of ROOMS and ADDED that no import needs."""
    edges = [(item.importer, item.name) for item in imports_of(root)]
    allowed = [(room, target, room_of) for room, targets in ROOMS.items() for target in targets]
    added = [(room, target, _itself) for room, targets in ADDED.items() for target in targets]
    return [
        f"{room} -> {target}"
        for room, target, owner in (*allowed, *added)
        if not any(
            within(owner(importer), (room,)) and within(name, (f"{PACKAGE}.{target}",)) for importer, name in edges
        )
    ]


def _itself(importer: str) -> str:
    return importer


def room_of(importer: str) -> str:
    """The innermost room of `importer`; "" for the package itself."""
    parts = importer.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((name for name in names if name in ROOMS or name in FREE), parts[0])


def _room_allows(importer: str, target: str) -> bool:
    """`target` is the imported name without the package: `engine.client.EngineClient`, or `__version__`."""
    room = room_of(importer)
    if not room or room in FREE or within(target, (room, *EVERYWHERE, "__version__")):
        return True
    added = tuple(name for prefix, names in ADDED.items() if within(importer, (prefix,)) for name in names)
    return within(target, (*ROOMS.get(room, ()), *added))
