"""Import of the user's own modules that register metrics: by an importable name, or by file.

config/config_file.py has replaced the name of a module next to the config file by its path, so that every process
finds it from any working directory. A file runs once per process. Its folder is appended to the search path, so that it
can import its neighbors.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from collab_megatron.errors import UserError


def import_metric_module(name: str) -> ModuleType:
    """Run the module once. Raises UserError if it cannot be found or imported."""
    if not is_file(name) and not all(part.isidentifier() for part in name.split(".")):
        raise UserError(
            f"reward.metric_modules: {name!r} is not a module: give a name that Python can import, such as my_metrics "
            "or package.metrics, or a .py file"
        )
    try:
        return _import_file(Path(name)) if is_file(name) else importlib.import_module(name)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a module of the user's may raise anything
        raise UserError(
            f"reward.metric_modules: {name} cannot be imported ({_where_it_failed(error)}); give a module that Python "
            "finds, or a file next to the config, and check that it can be imported on its own"
        ) from None


def _where_it_failed(error: BaseException) -> str:
    """The class of an exception, its text, and the line of the user's file that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = str(Path(__file__).parent)
    last = next((frame for frame in reversed(frames) if _is_users(frame.filename, ours)), None)
    where = "" if last is None or isinstance(error, SyntaxError) else f", line {last.lineno} of {last.filename}"
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"


def _is_users(file: str, ours: str) -> bool:
    return not file.startswith((ours, "<")) and "importlib" not in file


def module_sources(name: str) -> Iterator[Path]:
    """The module's own source files, for fingerprints; not those that it imports."""
    if is_file(name):
        origin = Path(name)
    else:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:
            return
        origin = Path(found.origin)
    yield from sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]


def is_file(name: str) -> bool:
    """Whether an entry of reward.metric_modules is a path, not a dotted name."""
    return name.endswith(".py")


def _import_file(path: Path) -> ModuleType:
    path = path.absolute()
    package = path.name == "__init__.py"
    stem = path.parent.name if package else path.stem
    name = f"{stem}_{hashlib.blake2b(str(path).encode(), digest_size=4).hexdigest()}"  # no clash with another `stem`
    if name in sys.modules:
        return sys.modules[name]
    folder = str(path.parent.parent if package else path.parent)
    if folder not in sys.path:
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(
        name, path, submodule_search_locations=[str(path.parent)] if package else None
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module while it runs
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
