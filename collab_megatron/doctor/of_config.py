"""Checks of a config on this machine: keys, chat template, all checks of the start, and one token through every role.

The checks of the start are those of `--dry-run` (launch/preflight.py). They end at the first mistake, so keys, template
and roles are looked at on their own first.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

from collab_megatron.config import (
    BuildDatasetConfig,
    DPOConfig,
    EvaluateConfig,
    RLConfig,
    SFTConfig,
    SupervisedConfig,
    load_config,
)
from collab_megatron.config.roles import llm_roles, role_place
from collab_megatron.config.sections import LLMSection, UserSection
from collab_megatron.data.chat import ChatTemplate, load_tokenizer
from collab_megatron.doctor.findings import Finding, Level, from_error, split_sentence
from collab_megatron.errors import RunError, UserError
from collab_megatron.launch.preflight import check_build, check_evaluate, check_rl, check_supervised
from collab_megatron.model.folder import is_hub_name, resolve_model_folder
from collab_megatron.rollout.llm import Gateway
from collab_megatron.types import LLMRequest, Message

AnyConfig = RLConfig | EvaluateConfig | SFTConfig | DPOConfig | BuildDatasetConfig
KINDS: dict[str, type[AnyConfig]] = {
    "rl": RLConfig,
    "evaluate": EvaluateConfig,
    "sft": SFTConfig,
    "dpo": DPOConfig,
    "data": BuildDatasetConfig,
}
ROLE_DEADLINE_S = 30.0
ENGINE_TIMEOUT_S = 5.0
QUESTION = "Answer with one word: ready?"
WARNING = "warning: "  # begins the start's warnings


def load_any(path: Path, overrides: list[str], kind: str | None) -> AnyConfig:
    """The config as `kind`, or as the first kind whose keys it has; of a run's folder the config it ran with.

    Raises UserError."""
    path = config_of_run(path) if path.is_dir() else path
    if kind is not None:
        return load_config(KINDS[kind], path, overrides)
    errors = {}
    for name, each in KINDS.items():
        try:
            return load_config(each, path, overrides)
        except UserError as error:
            errors[name] = error
    if len({str(error) for error in errors.values()}) == 1:  # not a matter of the kind: no file, or no YAML
        raise errors["rl"]
    raise UserError(f"{path} is no config of an RL run ({errors['rl']}): fix that, or name its --kind")


def config_of_run(folder: Path) -> Path:
    """The config that the launcher wrote into a run's logs. Raises UserError if there is none or a choice."""
    found = sorted(folder.glob("logs/*/resolved.yaml"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(f"{folder} is a folder without logs/*/resolved.yaml: name a YAML file, see conf/")
    raise UserError(f"{folder} holds the configs of {len(found)} runs: name one of {', '.join(map(str, found))}")


def roles_of(config: AnyConfig) -> dict[str, LLMSection]:
    """All LLMs of the config by role."""
    if isinstance(config, SupervisedConfig):
        return {}
    roles = llm_roles(config.simulators, config.reward)
    if isinstance(config, BuildDatasetConfig):
        served = config.model is not None  # by an engine that the build starts
        return {role: section for role, section in roles.items() if not (served and role == "assistant")}
    return roles | config.extra_roles


def keys_of(config: AnyConfig) -> dict[str, str]:
    """Environment variable of a key -> the first place in the config that names it."""
    found: dict[str, str] = {}
    for role, section in roles_of(config).items():
        place = role_place(role)
        users = section.mixture if isinstance(section, UserSection) else ()
        parts = [(place, section), *((f"{place}.mixture.{n}", other) for n, other in enumerate(users))]
        for at, part in parts:
            for where, each in [(at, part), *((f"{at}.deployments.{n}", d) for n, d in enumerate(part.deployments))]:
                if each.api_key_env is not None:
                    found.setdefault(each.api_key_env, where)
    return found


def needs_hub(config: AnyConfig) -> bool:
    """Whether the model is a name on the hub."""
    return config.model is not None and is_hub_name(config.model.path)


def check_template(config: AnyConfig) -> Iterator[Finding]:
    """Whether the chat template extends a chat turn by turn as the token ids that were sampled. Raises UserError."""
    if config.model is None:
        return
    template = ChatTemplate(load_tokenizer(resolve_model_folder(config.model.path, weights=False)))
    difference = template.growth_difference()
    if difference is None:
        yield Finding("ok", "chat template", f"exact: {config.model.path} extends a chat turn by turn as token ids")
        return
    mode = config.rollout.inexact_template if isinstance(config, RLConfig | EvaluateConfig) else "as_sampled"
    way_out = "set rollout.inexact_template to as_sampled or rendered, or use a template that only appends"
    level: Level = "fail" if mode == "refuse" else "warn"
    yield Finding(level, "chat template", f"not exact ({mode}): {difference}", way_out)


def check_start(config: AnyConfig) -> Iterator[Finding]:
    """The checks of --dry-run; what they print as a warning is a finding. Raises UserError."""
    printed = io.StringIO()

    def report(text: str) -> None:  # the plan
        print(text)

    try:
        with contextlib.redirect_stdout(printed):
            if isinstance(config, RLConfig):
                check_rl(config, dry_run=True, report=report)
            elif isinstance(config, EvaluateConfig):
                check_evaluate(config, dry_run=True, report=report)
            elif isinstance(config, SupervisedConfig):
                check_supervised(config, dry_run=True, report=report)
            else:
                check_build(config, dry_run=True, report=report)
    finally:
        for line in printed.getvalue().splitlines():
            if line.startswith(WARNING):
                yield warning_finding(line.removeprefix(WARNING))
    kind = next(name for name, each in KINDS.items() if type(config) is each)
    yield Finding("ok", "config", f"all checks of the start pass, read as --kind {kind}; --dry-run prints the plan")


def warning_finding(sentence: str) -> Finding:
    what, to_do = split_sentence(sentence)
    return Finding("warn", "config", what, to_do or "see docs/operations.md")


def check_engines(config: AnyConfig) -> Iterator[Finding]:
    """Servers that already run (engine.urls); those that the run starts are checked when it starts them."""
    if isinstance(config, SupervisedConfig):
        return
    for url in config.engine.urls:
        try:
            answer = httpx.get(f"{url.rstrip('/')}/health", timeout=ENGINE_TIMEOUT_S)
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            text = f"{url} cannot be reached ({type(error).__name__}, deadline {ENGINE_TIMEOUT_S:g} s)"
            yield Finding("fail", "engines", text, "start that server, or take it out of engine.urls")
            continue
        if answer.status_code == 200:
            yield Finding("ok", "engines", f"{url} is healthy")
        else:
            yield Finding("fail", "engines", f"{url}/health answers {answer.status_code}", "see that server's log")


def check_roles(config: AnyConfig) -> Iterator[Finding]:
    """One token through every role, all at the same time, each within ROLE_DEADLINE_S. Costs a few tokens.

    Raises UserError where a key is missing."""
    roles = {role: _one_token(section) for role, section in roles_of(config).items()}
    if roles:
        gateway = Gateway(roles, seed=1)
        gateway.check_models()
        yield from asyncio.run(_ask_all(gateway, roles))


def _one_token(section: LLMSection) -> LLMSection:
    """The section for one attempt of one token."""
    few = {"max_tokens": 1, "max_attempts": 1, "answer_once": False}
    deadlines = {name: min(ROLE_DEADLINE_S, getattr(section, name)) for name in ("timeout_s", "deadline_s")}
    changed = section.model_copy(update=few | deadlines)
    if isinstance(changed, UserSection):
        mixture = tuple(other.model_copy(update=few | deadlines) for other in changed.mixture)
        return changed.model_copy(update={"mixture": mixture})
    return changed


async def _ask_all(gateway: Gateway, roles: dict[str, LLMSection]) -> list[Finding]:
    parts = [
        (role, part)
        for role, section in roles.items()
        for part in range(1 + (len(section.mixture) if isinstance(section, UserSection) else 0))
    ]
    try:
        return list(await asyncio.gather(*(_ask(gateway, role, part) for role, part in parts)))
    finally:
        await gateway.close()


async def _ask(gateway: Gateway, role: str, part: int) -> Finding:
    name = f"{role_place(role)}{f'.mixture.{part - 1}' if part else ''}"
    said: Callable[[str], str] = str  # any text will do: one token of an answer in JSON is no JSON
    request = LLMRequest([Message("user", QUESTION)], parse=said)
    try:
        async with asyncio.timeout(ROLE_DEADLINE_S):
            await gateway.role(role, part).complete(request)
    except TimeoutError:
        text = f"{name} gave no token within {ROLE_DEADLINE_S:g} s"
        return Finding("fail", "roles", text, "check the provider's status, the proxy and api_base")
    except UserError as error:
        return from_error("roles", error)
    except RunError as error:
        return Finding("fail", "roles", f"{name}: {error}", "check its model, api_base and key")
    return Finding("ok", "roles", f"{name} answered")
