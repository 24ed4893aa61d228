"""The keys of a run's servers: in one private file, in no printed text, the right one for every call."""

from __future__ import annotations

import asyncio
import json
import os
import stat
from pathlib import Path

import pytest
import yaml
from aiohttp import web
from pydantic import ValidationError

from collab_megatron.config.sections import EngineSection
from collab_megatron.engine.client import EngineClient, open_session
from collab_megatron.engine.control import EngineControl
from collab_megatron.engine.keys import EngineKeys
from collab_megatron.engine.server_args import engine_command
from collab_megatron.errors import RunError
from collab_megatron.files import publish_secret


def test_the_file_is_private_and_yaml(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        keys = EngineKeys.new()
        publish_secret(tmp_path / "keys.yaml", keys.text)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "keys.yaml").stat().st_mode) == 0o600
    content = yaml.safe_load((tmp_path / "keys.yaml").read_text())
    assert content == {"api-key": keys.api, "admin-api-key": keys.admin}
    assert EngineKeys.read(tmp_path / "keys.yaml") == keys
    assert keys.api != keys.admin
    assert EngineKeys.new() != keys  # each run makes its own
    assert keys.api not in repr(keys) + str(keys)


@pytest.mark.parametrize("text", [None, "", "[]", "{}", "\x00", '{"api-key": "x"}'])
def test_a_broken_file_is_one_sentence_without_its_contents(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "keys.yaml").write_text(text)
    with pytest.raises(RunError, match=r"the engines' keys cannot be read from .*keys.yaml \([A-Za-z]+\)$"):
        EngineKeys.read(tmp_path / "keys.yaml")


def test_a_server_gets_its_keys_from_the_file(tmp_path: Path) -> None:
    keys = EngineKeys.new()
    publish_secret(tmp_path / "keys.yaml", keys.text)

    def command(device: str = "cuda", extra_args: tuple[str, ...] = ()) -> tuple[tuple[str, ...], dict[str, str]]:
        made = engine_command(
            EngineSection(extra_args=extra_args),
            model_path="m",
            dtype="float32",
            device=device,
            port=1,
            seed=1,
            keys_file=tmp_path / "keys.yaml",
            scratch=tmp_path,
        )
        return made.argv, dict(made.env)

    argv, env = command()
    assert argv[argv.index("--config") + 1] == str(tmp_path / "keys.yaml")
    assert keys.api not in str((argv, env))
    assert keys.admin not in str((argv, env))
    assert env["GLOO_SOCKET_IFNAME"] == env["NCCL_SOCKET_IFNAME"] == "lo"
    # the ranks of a server, and those of its next life, meet in different files
    meet = "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"
    assert env[meet].startswith(f"file://{tmp_path}/")
    assert env[meet] != command()[1][meet]
    assert meet not in command(extra_args=("--dist-init-addr", "10.0.0.1:5000"))[1]
    assert command("cpu")[1]["MASTER_PORT"] == "1"


@pytest.mark.parametrize("flag", ["--api-key", "--admin-api-key=x", "--config"])
def test_keys_of_the_users_own_are_refused(flag: str) -> None:
    with pytest.raises(ValidationError, match=f"{flag.partition('=')[0]} is set by every run"):
        EngineSection(extra_args=("--log-requests", flag, "x"))


async def test_every_call_carries_the_key_that_sglang_wants() -> None:
    """The expected keys are those of sglang/srt/utils/auth.py."""
    keys = EngineKeys("question", "admin")
    received = []

    async def answer(request: web.Request) -> web.Response:
        received.append((request.path, request.headers.get("Authorization")))
        return web.json_response({"weight_version": "7", "loads": [], "success": True, "ranks": []})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = "http://{}:{}".format(*runner.addresses[0])

    def control() -> None:
        engine = EngineControl(url, timeout_s=10, keys=keys)
        engine.answers(5)
        engine.weight_version()
        engine.pause()
        engine.flush_cache()
        engine.checksums()
        engine.close()

    async with open_session() as session:
        client = EngineClient(session, url, stop_token_ids=[], timeout_s=10, max_concurrency=1, keys=keys)
        await client.weight_version(timeout_s=10)
        await client.load(timeout_s=10)
    await asyncio.to_thread(control)
    await runner.cleanup()
    question, admin = "Bearer question", "Bearer admin"
    assert received == [
        ("/model_info", question),
        ("/v1/loads", question),
        ("/model_info", question),
        ("/model_info", question),
        ("/pause_generation", admin),
        ("/flush_cache", admin),
        ("/weights_checker", admin),
    ]


def test_no_key_is_sent_where_none_is_asked_for() -> None:
    control = EngineControl("http://127.0.0.1:9", timeout_s=1)
    assert control._header("pause_generation") is None
    control.close()
    assert json.dumps(dict(EngineKeys("a", "b").header("v1/loads?include=core"))) == '{"Authorization": "Bearer a"}'
