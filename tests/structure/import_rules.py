"""Who may import whom: the table, and the AST walk that compares a tree with it.

A rule names a room (`driver`), a folder or a file in it (`data.build`, `demo.model`); the longest name that fits a file
adds to the rules of the shorter ones. Imports inside functions and under TYPE_CHECKING count like any other.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "collab_megatron"

# the data contract, the two errors, writing aside and renaming, text made fit for files and tokenizers, and the config
# sections that leaf functions take
EVERYWHERE = ("types", "errors", "files", "log", "slots", "text", "config.sections")

ROOMS: Mapping[str, tuple[str, ...]] = {
    "types": (),
    "errors": (),
    "files": (),
    "log": (),
    "text": (),
    "config": (),
    "data": (),
    "journal": (),
    "slots": ("journal.place",),
    "simulators": ("journal",),
    "rewards": ("simulators",),
    "engine": ("journal.place",),
    "driver": ("data", "journal", "simulators", "rewards", "engine", "algorithms.advantages"),
    "algorithms": (),
    "batching": (),
    "actor": ("algorithms", "batching"),
    "convert": (),
    "resharding": ("convert", "engine"),
    "checkpoint": (),
    "monitor": (),
    "cluster": ("config",),
    "demo": (),
}

# what the rooms above turned out to need of each other, each with its reason
ADDED: Mapping[str, Mapping[str, str]] = {
    "actor": {"convert": "a model is loaded from an HF folder and written as one"},
    "algorithms": {"batching.micro_batch": "the GRPO loss reads micro-batches"},
    "checkpoint": {
        "actor": "what is saved is the actor's model, optimizer and grid",
        "convert": "an HF folder can be written beside a checkpoint",
    },
    "cluster": {
        "checkpoint.folders": "preflight: is there something to resume from",
        "checkpoint.origin": "preflight: is it this run that would be resumed",
        "convert": "preflight: does the model fit the layout",
        "data": "preflight: can the data be read",
        "engine": "starts the server and waits until it answers",
        "monitor.flops": "the plan counts a step's operations",
        "rewards": "preflight: does the config name metrics that exist",
        "simulators": "preflight: do the LLM services answer",
    },
    "convert": {"actor.grid": "a type: the exporter is given the rank grid"},
    "data.build": {
        "cluster.processes": "its processes end with their parent",
        "config.entry": "build_dataset has a config of its own",
        "journal": "an interrupted build asks for nothing twice",
        "rewards": "the branches of a grown conversation are scored",
        "simulators": "conversations are grown with simulated users",
    },
    "demo": {"cluster.processes": "the demo's road starts child processes"},
    "demo.summary": {"simulators.usage": "reads the file of API calls that a run left"},
    "driver": {
        "checkpoint.folders": "the lineage reads the checkpoint that run.init_from names",
        "cluster.processes": "the driver ends with its parent",
        "config": "the driver's service is put together from the whole config",
        "convert.source": "the lineage reads the model's files",
        "monitor.busy": "engine and API time are measured where they are spent",
    },
    "monitor": {"convert.spec": "a type: operations are counted from the model's sizes"},
    "rewards": {"journal.calls": "a judge's call is recorded under the metric that asked"},
    "rewards.configured": {"config.entry": "names the roles of the judges"},
    "simulators.gateway": {"config.entry": "errors name a role's place in the config"},
    "resharding": {
        "actor": "the weights come from the actor, over its grid",
        "batching": "the probe prompt is a micro-batch",
        "data.chat": "the probe prompt is said in the model's tokens",
    },
}

# entry points and what their loops are made of may import every room
FREE = ("training", "train_rl", "train_sft", "train_dpo", "evaluate")

# who may import these from outside; a name that stands in no line may be imported by all
OUTSIDE: Mapping[str, tuple[str, ...]] = {
    "litellm": ("simulators",),
    "megatron": ("actor", "convert", "checkpoint", "resharding"),
    "transformer_engine": ("actor",),
    "apex": ("actor",),
    "sglang": (),  # a server in a process of its own, spoken to over HTTP
}

# rooms that stay pure: these are the only packages they import from outside the standard library
ONLY: Mapping[str, tuple[str, ...]] = {
    "types": (),
    "errors": (),
    "files": (),
    "log": (),
    "config": ("pydantic", "yaml"),
    "algorithms": ("torch",),
    "batching": ("torch",),
    "rewards": (),
    "demo": ("aiohttp", "rich"),
    "demo.tokenizer": ("tokenizers", "transformers"),
    "demo.model": ("torch", "tokenizers", "transformers"),
}
NOT_DISTRIBUTED = ("types", "config", "rewards", "algorithms", "batching")


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
    """Every import of the package that lies in `root`."""
    for file in sorted((root / PACKAGE).rglob("*.py")):
        parts = file.relative_to(root / PACKAGE).with_suffix("").parts
        importer = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:  # relative: never used here, resolved all the same
                    inside = parts[: len(parts) - node.level]
                    base = ".".join(part for part in (PACKAGE, *inside, node.module) if part)
                names = [f"{base}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in names:
                yield Import(file, node.lineno, importer, name)


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a dotted name is one of the prefixes or lies in it."""
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def violations(root: Path, standard_library: frozenset[str]) -> list[str]:
    """Every import of the tree that the tables forbid, in words."""
    found = []
    for statement in imports_of(root):
        top, _, rest = statement.name.partition(".")
        importer = statement.importer
        if top == PACKAGE:
            if not _room_allows(importer, rest):
                found.append(f"{statement}: {importer.split('.')[0]} may not import that room")
            continue
        if top in OUTSIDE and not within(importer, OUTSIDE[top]):
            found.append(f"{statement}: only {', '.join(OUTSIDE[top]) or 'nobody'} may")
        if within(statement.name, ("torch.distributed",)) and within(importer, NOT_DISTRIBUTED):
            found.append(f"{statement}: this room stays free of torch.distributed")
        pure = [names for room, names in ONLY.items() if within(importer, (room,))]
        if pure and top not in standard_library and not any(top in names for names in pure):
            found.append(f"{statement}: this room stays free of {top}")
    return found


def unused_additions(root: Path) -> list[str]:
    """Rows of ADDED that no import needs any more."""
    edges = [(item.importer, item.name) for item in imports_of(root)]
    return [
        f"{room} -> {target}"
        for room, targets in ADDED.items()
        for target in targets
        if not any(within(importer, (room,)) and within(name, (f"{PACKAGE}.{target}",)) for importer, name in edges)
    ]


def _room_allows(importer: str, target: str) -> bool:
    """`target` is what comes after the package's name: `engine.client.EngineClient`, or `__version__`."""
    room = importer.split(".")[0]
    if not room or room in FREE or within(target, (room, *EVERYWHERE, "__version__")):
        return True
    added = tuple(name for prefix, names in ADDED.items() if within(importer, (prefix,)) for name in names)
    return within(target, (*ROOMS.get(room, ()), *added))
