"""Rows of the table of bad inputs: engines and LLM services."""

from __future__ import annotations

from pathlib import Path

from tests.config.table import Row, World

LONG_HOST = "a" * 300


def rl(override: str | tuple[str, ...], *says: str, name: str = "") -> Row:
    overrides = (override,) if isinstance(override, str) else override
    key = overrides[0].split("=")[0]
    return Row(name or overrides[0].replace("/", "|"), "train_rl", overrides, (key, *says))


def _not_executable(own: Path, world: World) -> None:
    (own / "python").write_text("")


ENGINES = [
    rl("engine.host=203.0.113.7", "not an address of this machine", name="host-of-another"),
    rl(
        ("engine.host=203.0.113.7", "engine.port=30000"),
        "not an address of this machine",
        name="host-and-port-of-another",
    ),
    rl("engine.host=no-such-host.invalid", "address of this machine", name="host-unknown"),
    rl(f"engine.host={LONG_HOST}", "too long", name="host-over-long"),
    rl((f"engine.host={LONG_HOST}", "engine.port=30000"), "too long", name="host-over-long-and-port"),
    rl('engine.host=""', "address", name="host-empty"),
    rl("engine.host=http://127.0.0.1", "address", name="host-is-a-url"),
    rl('engine.host="127.0.0.1 "', "address", name="host-with-a-space"),
    rl('engine.host="a\\0b"', "NUL", name="host-nul"),
    rl("engine.host=127.0.0.1:30000", "engine.port", name="host-with-a-port"),
    rl("engine.python=no/python", "executable"),
    Row(
        "engine-python-not-executable",
        "train_rl",
        ("engine.python=DIR/python",),
        ("engine.python", "executable"),
        prepare=_not_executable,
    ),
    rl("engine.extra_args=[--no-such-flag]", "--no-such-flag", "SGLang", name="sglang-unknown-flag"),
    rl("engine.extra_args=[--port, '1']", "--port", "engine.port", name="sglang-own-flag"),
    rl("engine.extra_args=[--tp=2]", "--tp", "engine.tensor", name="sglang-own-flag-with-value"),
    rl("engine.extra_args=[--model-path, m]", "--model-path", "model.path", name="sglang-model"),
    rl("engine.extra_args=[--config, a.yaml]", "--config", "engine", name="sglang-config"),
    rl("engine.urls=[localhost:1]", "http://HOST:PORT"),
    rl("engine.urls=['http://a:99999']", "http://HOST:PORT", name="engine-url-port"),
    rl("engine.urls=['http://a:x']", "http://HOST:PORT", name="engine-url-port-text"),
    rl("engine.urls=['http://[::1']", "http://HOST:PORT", name="engine-url-bracket"),
    rl("engine.urls=['']", "http://HOST:PORT", name="engine-url-empty"),
    rl(f"engine.urls=['http://{LONG_HOST}:1']", "http://HOST:PORT", name="engine-url-over-long"),
    rl("engine.urls=['http://a:1', 'http://a:1/']", "twice", name="engine-url-twice"),
    rl(("engine.urls=['http://a:1']", "engine.count=2"), "engine.count", name="engine-urls-and-count"),
]

SERVICES = [
    rl('simulators.user.model=""', "name", name="llm-model-empty"),
    rl("simulators.user.model=no-such-model", "provider", name="llm-model-without-provider"),
    rl("simulators.judge.model=nobody/model", "provider", name="llm-provider-unknown"),
    rl("simulators.user.api_base=nonsense", "http://host:port/v1"),
    rl("simulators.user.api_base=http://127.0.0.1:99999/v1", "URL", name="api-base-port"),
    rl("simulators.user.api_base=http://[::1/v1", "URL", name="api-base-bracket"),
    rl(f"simulators.user.api_base=http://{LONG_HOST}:1/v1", "URL", name="api-base-over-long"),
    rl("simulators.user.api_base=ftp://127.0.0.1/v1", "http://host:port/v1", name="api-base-ftp"),
    rl("simulators.user.api_base=http://127.0.0.1:1/v1", "nothing answers", "start", name="api-base-silent"),
    rl("simulators.user.api_base=http://no-such-host.invalid/v1", "nothing answers", name="api-base-unknown"),
    rl('simulators.user.api_base="http://a\\0b:1/v1"', "NUL", name="api-base-nul"),
    rl("simulators.user.api_key_env=NO_SUCH_KEY_IS_SET", "NO_SUCH_KEY_IS_SET", "set", name="api-key-not-set"),
    rl('simulators.user.api_key_env=""', "empty", name="api-key-env-empty"),
    rl(
        "simulators.judge.deployments=[{model: m, api_key_env: NO_SUCH_KEY_IS_SET}]",
        "NO_SUCH_KEY_IS_SET",
        name="api-key-of-a-deployment",
    ),
    rl("simulators.user.extra={api_key: abc}", "secret", "api_key_env", name="extra-secret"),
    rl("simulators.user.extra={temperature: 1}", "temperature", name="extra-own"),
    rl("simulators.user.extra={top_p: .nan}", "JSON", name="extra-nan"),
    rl("simulators.user.extra=5", "mapping", name="extra-number"),
    rl('simulators.user.termination_signal=""', "empty", name="signal-empty"),
    rl('simulators.user.termination_signal="  "', "termination_signal", name="signal-blank"),
    rl("simulators.health.warn={no_such_check: 0.1}", "no_such_check", "known", name="health-unknown-check"),
    rl(
        ("budget.hard_usd=3", "simulators.user.input_usd_per_mtoken=null"),
        "input_usd_per_mtoken",
        name="budget-without-price",
    ),
]

ROWS = (*ENGINES, *SERVICES)
