"""The doctor's lines: every problem has a way out, an error is a finding, and the exit code follows the failures."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from collab_megatron.doctor import __main__ as command
from collab_megatron.doctor import environment, machine
from collab_megatron.doctor.findings import Check, Finding, exit_code, findings_of, split_sentence, summary
from collab_megatron.errors import UserError
from collab_megatron.launch.engine_versions import Versions
from collab_megatron.launch.ports import free_port

OK = Finding("ok", "a", "fine")
WARN = Finding("warn", "a", "slow", "wait")
FAIL = Finding("fail", "a", "broken", "repair it")
SECRET = "sk-not-to-be-shown"


def test_warnings_do_not_fail_and_failures_do() -> None:
    assert (exit_code([OK, WARN]), exit_code([OK, WARN, FAIL])) == (0, 1)
    assert summary([OK, WARN, WARN]) == "1 ok, 2 warn, 0 fail"


def test_a_line_has_level_text_and_way_out_and_no_password() -> None:
    line = str(Finding("fail", "engines", "http://me:secret@host is\ngone", "start it"))
    assert line.startswith("fail  engines")
    assert "secret" not in line
    assert line.splitlines()[1].strip() == "-> start it"


def test_an_error_is_a_finding_and_what_was_found_before_it_stays() -> None:
    def mistake() -> Iterator[Finding]:
        yield OK
        raise UserError("port 1 is in use: end the process that listens there")

    def crash() -> Iterator[Finding]:
        yield OK
        raise ZeroDivisionError("no GPU")

    found = findings_of("ports", mistake)
    assert found == [OK, Finding("fail", "ports", "port 1 is in use", "end the process that listens there")]
    first, last = findings_of("gpu", crash)
    assert (first, last.level, "ZeroDivisionError: no GPU" in last.text) == (OK, "fail", True)


@pytest.mark.parametrize(
    "sentence, what, to_do",
    [
        ("port 1 is in use: set engine.port=0", "port 1 is in use", "set engine.port=0"),
        ("http://x:1/v1: nothing answers; start it", "http://x:1/v1: nothing answers", "start it"),
        ("a; b: do it", "a; b", "do it"),
        ("it broke", "it broke", ""),
    ],
)
def test_a_sentence_is_split_before_what_to_do(sentence: str, what: str, to_do: str) -> None:
    assert split_sentence(sentence) == (what, to_do)


@pytest.mark.parametrize("found, code", [([OK, WARN], 0), ([FAIL], 1)])
def test_the_exit_code_is_that_of_the_findings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], found: list[Finding], code: int
) -> None:
    def checks(config: object, *, calls: bool) -> Iterator[tuple[str, Check]]:
        yield "a", lambda: found

    monkeypatch.setattr(command, "checks", checks)
    with pytest.raises(SystemExit) as ended:
        command.main([])
    assert ended.value.code == code
    assert capsys.readouterr().out.splitlines()[-1] == summary(found)


def test_a_key_is_looked_for_and_never_shown() -> None:
    needed = {"A_KEY": "simulators.user", "B_KEY": "simulators.judge"}
    there, missing = machine.check_keys({"A_KEY": SECRET, "B_KEY": ""}, needed)
    assert (there.level, missing.level) == ("ok", "fail")
    assert "export B_KEY=" in missing.way_out
    (usual,) = machine.check_keys({"OPENAI_API_KEY": SECRET}, {})
    assert usual.text == "set: OPENAI_API_KEY"
    assert not any(SECRET[:4] in str(finding) for finding in (there, missing, usual))


def test_a_hub_that_does_not_answer_fails_only_where_it_is_needed() -> None:
    nobody = {"HF_ENDPOINT": f"http://127.0.0.1:{free_port()}"}
    for needed, level in ((True, "fail"), (False, "warn")):
        (found,) = machine.check_hub(nobody, needed=needed)
        assert (found.level, "cannot be reached" in found.text, bool(found.way_out)) == (level, True, True)
    (offline,) = machine.check_hub({**nobody, "HF_HUB_OFFLINE": "1"}, needed=True)
    assert offline.level == "ok"


def test_little_shared_memory_is_a_problem(tmp_path: Path) -> None:
    assert [machine.shared_level(free_mb) for free_mb in (10, 500, 5000)] == ["fail", "warn", "ok"]
    (missing,) = machine.check_shared_memory(tmp_path / "missing")
    assert (missing.level, "--shm-size" in missing.way_out) == ("fail", True)


def test_a_folder_that_does_not_exist_yet_has_the_space_of_its_parent(tmp_path: Path) -> None:
    (found,) = machine.check_disk(tmp_path / "runs" / "x")
    assert str(tmp_path) in found.text


def test_a_wrong_version_is_a_failure_unless_it_is_known_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.0.0", "openai": "1.0", "httpx": "0.28.1"}

    def version(name: str) -> str:
        if name not in versions:
            raise environment.importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(environment.importlib.metadata, "version", version)
    asked = ["torch>=2.11", "openai>=2", "httpx", "lacking", 'other; python_version < "3"', 'pytest; extra == "dev"']
    found = list(environment.conflicts(asked))
    assert [(finding.level, finding.text.split()[0]) for finding in found] == [
        ("fail", "torch"),
        ("warn", "openai"),
        ("fail", "lacking"),
    ]
    assert all(finding.way_out for finding in found)


def test_a_release_that_steals_credentials_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "packages", lambda: {"litellm": "1.82.8"})
    assert any(
        finding.level == "fail" and "steals credentials" in finding.text for finding in environment.check_packages()
    )


@pytest.mark.parametrize(
    "said, level",
    [
        ("NVIDIA H100, 580.65.06, 81559 MiB, 4 MiB, 1980 MHz", "ok"),
        ("NVIDIA H100, 580.65.06, 81559 MiB\nNVIDIA H100, 535.104.05, 81559 MiB", "fail"),
        ("Failed to initialize NVML: Driver/library version mismatch", "fail"),
        ("not installed", "fail"),
    ],
)
def test_the_driver_must_fit_cuda(said: str, level: str) -> None:
    (found,) = environment.driver_findings(said)
    assert (found.level, bool(found.way_out)) == (level, level != "ok")


@pytest.mark.parametrize(
    "code, output, errors, levels, part",
    [
        (0, '["cuda", "nccl", true, "transformer_engine"]', "", ["ok"], "transformer-engine's layers"),
        (0, '["cpu", "gloo", false, "torch"]', "", ["ok"], "cpu, gloo, megatron's local layers, Adam of torch"),
        (0, '["cuda", "nccl", false, "apex"]', "", ["ok", "warn"], "not installed"),
        (
            0,
            'noise\n["cuda", "nccl", false, "torch"]',
            "transformer-engine is installed but cannot be used, so its layers are not: OSError: undefined symbol",
            ["ok", "warn"],
            "undefined symbol",
        ),
        (1, "", "Traceback\nModuleNotFoundError: No module named 'megatron'\n", ["fail"], "No module named 'megatron'"),
    ],
)
def test_the_trainers_layers_are_named_or_why_not(
    code: int, output: str, errors: str, levels: list[str], part: str
) -> None:
    found = list(environment.backend_findings(code, output, errors))
    assert [finding.level for finding in found] == levels
    assert part in found[-1].text


@pytest.mark.parametrize(
    "versions, level",
    [
        (Versions("2.14.1", "13.0", "2.30.7"), "ok"),
        (Versions("2.13.0", None, ""), "ok"),
        (Versions("2.14.1", "13.0", ""), "fail"),
        (None, "warn"),
    ],
)
def test_torch_for_cuda_needs_nccl(monkeypatch: pytest.MonkeyPatch, versions: Versions | None, level: str) -> None:
    monkeypatch.setattr(environment, "ask", lambda python, elsewhere: versions)
    (found,) = environment.check_torch()
    assert found.level == level


def test_another_python_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [finding.level for finding in environment.check_python()] == ["ok"]
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    assert [finding.level for finding in environment.check_python()] == ["fail"]
