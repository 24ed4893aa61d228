"""Checks before the start that this machine can start the configured engines."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import socket

from collab_megatron.config.sections import EngineSection
from collab_megatron.engine.server_args import EngineCommand, check_own_flags
from collab_megatron.errors import UserError
from collab_megatron.launch.interpreter import ask_interpreter
from collab_megatron.model.spec import ModelSpec

logger = logging.getLogger(__name__)

PARSE_TIMEOUT_S = 120.0  # SGLang's import takes some 6 s on an idle core
LONGER_CONTEXT = "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"  # environment variable of SGLang
# parses a command line as SGLang's launcher does, and stops there
PARSER = """
import argparse, sys
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser(prog="sglang")
ServerArgs.add_cli_args(parser)
parser.parse_args(sys.argv[1:])
"""


def check_engine(engine: EngineSection) -> None:
    """Check interpreter, address, ports and our own flags of servers that we start. Raises UserError."""
    if engine.urls:
        return
    check_own_flags(engine.extra_args)
    if engine.python is not None and shutil.which(engine.python) is None:
        raise UserError(
            f"engine.python={engine.python} is not an executable file: name the bin/python of the engines' "
            "environment, or leave it out to use this one"
        )
    if reason := _refused(engine.host, 0):
        raise UserError(
            f"engine.host={engine.host} is not an address of this machine ({reason}): name one that is, such as "
            "127.0.0.1"
        )
    for port in range(engine.port, engine.port + engine.count) if engine.port else ():
        if reason := _refused(engine.host, port):
            raise UserError(
                f"engine.port: port {port} on {engine.host} {reason}: end the process that listens there, or set "
                "engine.port=0 for free ports"
            )


def check_context_length(engine: EngineSection, spec: ModelSpec) -> None:
    """Raise UserError for a context longer than the model's, which SGLang refuses."""
    most = spec.max_positions * (spec.rope.factor if spec.rope.kind == "linear" else 1)
    asked = engine.context_length
    if asked is not None and asked > most and not engine.urls and LONGER_CONTEXT not in os.environ:
        raise UserError(
            f"engine.context_length={asked} is more than the {most:g} tokens of the model (max_position_embeddings in "
            "its config.json): lower it, or leave it out"
        )


def check_flags(command: EngineCommand) -> None:
    """Parse the command line with SGLang's parser, in the interpreter that will run it. Raises UserError."""
    python, _, _, *flags = command.argv
    env = {key: value for key, value in os.environ.items() if key not in command.unset} | dict(command.env)
    answer = ask_interpreter(python, PARSER, *flags, env=env, timeout_s=PARSE_TIMEOUT_S)
    if answer is None:
        logger.warning("engine.extra_args were not checked: the import of SGLang took over %g s", PARSE_TIMEOUT_S)
        return
    if answer.code == 0:
        return
    if "error: " in answer.reason:  # argparse's
        raise UserError(
            f"engine.extra_args: SGLang refuses them ({answer.reason.partition('error: ')[2]}): see python -m "
            "sglang.launch_server --help"
        )
    raise UserError(f"SGLang cannot be imported by {python} ({answer.reason}): install it there, or set engine.python")


def _refused(host: str, port: int) -> str:
    """Why no server can listen there; empty if it can."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except UnicodeError:
            return "is not a host name"
        except OSError as error:
            return "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror or error}"
    return ""
