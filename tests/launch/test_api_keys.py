"""Keys of LLM APIs stay with the processes that call them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from collab_megatron.config import RLConfig, load_config
from collab_megatron.launch.api_keys import key_variables
from tests.conftest import REPOSITORY

ABORT = "import os, resource; resource.setrlimit(resource.RLIMIT_CORE, ({soft}, -1)); {more}; os.abort()"
GUARDED = "from collab_megatron.errors import no_core_dumps; no_core_dumps()"


def test_named_variables_and_those_that_look_like_keys() -> None:
    config = load_config(RLConfig, REPOSITORY / "conf" / "demo_rl.yaml", ["simulators.user.api_key_env=MY_KEY"])
    found = key_variables(config, {"OPENAI_API_KEY": "x", "some_api_key": "y", "PATH": "z", "HF_TOKEN": "t"})
    assert found == ("DESK_API_KEY", "MY_KEY", "OPENAI_API_KEY", "some_api_key")


@pytest.mark.skipif(
    Path("/proc/sys/kernel/core_pattern").read_text().strip().startswith(("|", "/")),
    reason="crashes go to a handler of the system here, not to a file in the folder",
)
def test_a_crash_leaves_no_memory_on_disk(tmp_path: Path) -> None:
    def left_by(name: str, code: str) -> list[Path]:
        folder = tmp_path / name
        folder.mkdir()
        env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, check=False)
        assert done.returncode == -6, done.stderr
        return list(folder.iterdir())

    try:
        assert left_by("unguarded", ABORT.format(soft=-1, more="0"))
    except ValueError:
        pytest.skip("no process may leave a core file here")
    assert left_by("guarded", ABORT.format(soft=-1, more=GUARDED)) == []
    # with a higher limit again, or for a handler that does not heed it: the file has none of the memory
    again = f"secret = 'marked' + 'secret' * 9; {GUARDED}; resource.setrlimit(resource.RLIMIT_CORE, (-1, -1))"
    for file in left_by("raised", ABORT.format(soft=-1, more=again)):
        assert b"secretsecret" not in file.read_bytes()
