"""Looks at this machine, and at a config if one is named: ok, warn or fail in a line each, with the way out.

    python -m collab_megatron.doctor                                    machine and environment
    python -m collab_megatron.doctor conf/mine.yaml [section.key=value ...]
    python -m collab_megatron.doctor conf/mine.yaml --no-calls          without a token through every LLM role

Nothing is started and no weight is fetched. Exit code: 0 without a failure (warnings do not count), 1 with one, 2 for a
config that cannot be read. Keys are looked for and never shown.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from collab_megatron.doctor import environment, machine, of_config
from collab_megatron.doctor.findings import Check, Finding, exit_code, findings_of, summary
from collab_megatron.errors import run_cli


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="?", help="a YAML file (see conf/), or the run.dir of a run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--kind", choices=tuple(of_config.KINDS), help="of the config; default: what its keys fit")
    parser.add_argument("--no-calls", action="store_true", help="ask no LLM")
    args = parser.parse_intermixed_args(argv)
    config = None if args.config is None else of_config.load_any(args.config, args.overrides, args.kind)
    found: list[Finding] = []
    for name, check in checks(config, calls=not args.no_calls):
        for finding in findings_of(name, check):
            print(finding, flush=True)
            found.append(finding)
    print(summary(found), flush=True)
    sys.exit(exit_code(found))


def checks(config: of_config.AnyConfig | None, *, calls: bool) -> Iterator[tuple[str, Check]]:
    """All checks in order, quick ones first."""
    yield "python", environment.check_python
    yield "packages", environment.check_packages
    yield "gpu", environment.check_gpus
    yield "disk", partial(machine.check_disk, Path() if config is None else config.run.dir)
    yield "shared memory", machine.check_shared_memory
    yield "open files", machine.check_open_files
    yield "ports", machine.check_ports
    keys = {} if config is None else of_config.keys_of(config)
    yield "keys", partial(machine.check_keys, os.environ, keys)
    hub = config is not None and of_config.needs_hub(config)
    yield "hub", partial(machine.check_hub, os.environ, needed=hub)
    yield "torch", environment.check_torch
    yield "trainer", environment.check_backend
    if config is not None:
        yield "chat template", partial(of_config.check_template, config)
        yield "engines", partial(of_config.check_engines, config)
        yield "config", partial(of_config.check_start, config)
        if calls:
            yield "roles", partial(of_config.check_roles, config)


if __name__ == "__main__":
    run_cli(main)
