"""The viewer's file: hostile texts of a record change nothing in it, its policy allows its own script alone, and the
browser's modules never take text for markup and load nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import stat
import zlib
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from collab_megatron.errors import UserError
from collab_megatron.view import __main__ as command
from collab_megatron.view import page
from collab_megatron.view.payload import Payload
from collab_megatron.view.rows import TITLE_CHARACTERS
from tests.view.records import a_call, a_future, a_reply, a_tree, write_record

SCRIPT = "globalThis.ready = 1 < 2 && true;"
HOSTILE = (
    "</script><script>alert(1)</script>",
    "</SCRIPT\n><img src=x onerror=alert(1)>",
    "<!--<script>",
    "]]>&lt;/script&gt;",
    "\u202egnp.exe\u2066 hidden\u2069 \u200b",
    "line\u2028and\u2029paragraph",
    "half a pair \ud83d of an emoji",
    "javascript:alert(1)",
    "\0\x1b[31m",
)
BROWSER = Path(str(files("collab_megatron.view").joinpath("browser")))


class Elements(HTMLParser):
    """The elements of a page as an HTML parser finds them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open = False  # the last element is not closed yet
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), []))
        self._open = True

    def handle_endtag(self, tag: str) -> None:
        self._open = False

    def handle_data(self, data: str) -> None:
        if self._open:
            self.found[-1][2].append(data)

    def content(self, tag: str, **wanted: str) -> str:
        (text,) = ("".join(data) for name, given, data in self.found if name == tag and wanted.items() <= given.items())
        return text


def hostile_tree(text: str) -> dict[str, Any]:
    """A tree with the text wherever a model, a simulator or a dataset writes."""
    call = a_call(role=text, model=text, metric=text, thought=text, text=text, marks={text: text}, error=text)
    future = a_future(
        status=text,
        messages=[{"role": text, "content": text}],
        calls=[call],
        scores={text: 1.0},
        details={text: {text: [text]}},
        error=text,
    )
    reply = a_reply(text=text, thought=text, finish_reason=text, futures=[future])
    prompt = [{"role": "user", "content": text}]
    return a_tree(task_id=text, single_turn_prompt=text, ground_truth=text, prompt=prompt, error=text, replies=[reply])


def write_page(run: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    monkeypatch.setattr(command, "read_bundle", lambda: SCRIPT)
    command.main([str(run), "--no-open", *arguments])
    return (run / "viewer.html").read_text("utf-8")


@pytest.fixture(scope="module")
def plain_tags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The elements of the page of a harmless tree."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        run = write_record(tmp_path_factory.mktemp("plain") / "run", hostile_tree("hello"))
        return [tag for tag, _, _ in Elements(write_page(run, monkeypatch)).found]


@pytest.mark.parametrize("text", [*HOSTILE, "x</script>" * 200_000], ids=[*map(repr, range(len(HOSTILE))), "2 MB"])
@pytest.mark.slow
def test_a_hostile_text_adds_no_element_and_arrives_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain_tags: list[str], text: str
) -> None:
    written = write_page(write_record(tmp_path / "run", hostile_tree(text)), monkeypatch)
    elements = Elements(written)
    assert [tag for tag, _, _ in elements.found] == plain_tags
    data = written.partition('id="index">')[2]
    assert data.isascii()
    block = json.loads(zlib.decompress(base64.b64decode(elements.content("script", id="block-0"))))
    future = block[0]["r"][0]["f"][0]
    assert block[0]["r"][0]["x"] == text
    assert (future["m"], future["c"][0]["th"], future["d"]) == ([[text, text]], text, {text: {text: [text]}})
    index = json.loads(elements.content("script", id="index"))
    assert index["columns"]["task"] == [text[:TITLE_CHARACTERS]]
    assert index["metrics"] == [text]


def test_the_title_is_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_record(tmp_path / "<b onclick=x>", a_tree())
    elements = Elements(write_page(run, monkeypatch))
    assert "b" not in [tag for tag, _, _ in elements.found]
    assert "<b onclick=x>" in elements.content("title")


def test_the_policy_allows_this_script_and_style_and_no_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elements = Elements(write_page(write_record(tmp_path / "run", a_tree()), monkeypatch))
    (given,) = (attributes for tag, attributes, _ in elements.found if "http-equiv" in attributes)
    rules = dict(rule.split(" ", 1) for rule in str(given["content"]).split("; "))
    (code,) = ("".join(data) for tag, attributes, data in elements.found if tag == "script" and not attributes)
    assert SCRIPT in code
    assert rules == {
        "default-src": "'none'",
        "script-src": f"'{sha256(code)}'",
        "style-src": f"'{sha256(elements.content('style'))}'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    # the policy is there before anything that it governs
    assert [tag for tag, _, _ in elements.found].index("meta") < [tag for tag, _, _ in elements.found].index("style")


def sha256(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@pytest.mark.parametrize("code", ["x = '</script>'", "x = '<!-- '", "x = '<SCRIPT '"])
def test_a_script_that_would_end_its_element_is_refused(code: str) -> None:
    with pytest.raises(ValueError, match="the script of the viewer contains"):
        page.render_page(Payload("{}", (), (), 0, 0), title="", script=code, style="")


def test_a_checkout_without_the_built_script_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "BUNDLE", "bundle/missing.js")
    with pytest.raises(UserError, match=r"was not built .* npm"):
        page.read_bundle()


def test_the_file_is_the_owners_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_record(tmp_path / "run", a_tree())
    write_page(run, monkeypatch)
    assert stat.S_IMODE((run / "viewer.html").stat().st_mode) == 0o600


def test_two_runs_are_in_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (write_record(tmp_path / name, a_tree()) for name in "ab")
    elements = Elements(write_page(first, monkeypatch, "--compare", str(second), "--max-trees", "1"))
    assert json.loads(elements.content("script", id="index"))["runs"] == [str(first), str(second)]
    assert "left out: 1 trees" in capsys.readouterr().out


# What would take text for markup, run text as code, or load something. The page's policy forbids all of it too.
FORBIDDEN = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|createContextualFragment|\beval\b"
    r"|new Function|\bfetch\(|XMLHttpRequest|WebSocket|import\(|https?:|url\(|@import|setAttribute\("
    r"|\bsrcdoc\b|\bhref\b"
)


def forbidden_in(folder: Path) -> list[str]:
    found = []
    for file in sorted(folder.iterdir()):
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if FORBIDDEN.search(line) and not line.lstrip().startswith(("//", "/*")):
                found.append(f"{file.name}:{number}: {line.strip()}")
    return found


def test_the_browsers_modules_take_no_text_for_markup_and_load_nothing() -> None:
    assert len(list(BROWSER.glob("*.js"))) > 5
    assert forbidden_in(BROWSER) == []


def test_markup_and_requests_are_found(tmp_path: Path) -> None:
    (tmp_path / "x.js").write_text("a.innerHTML = text;\nfetch(text);\n")
    (tmp_path / "x.css").write_text("a { background: url(x.png) }\n")
    assert [found.partition(": ")[0] for found in forbidden_in(tmp_path)] == ["x.css:1", "x.js:1", "x.js:2"]


def test_modules_import_modules_that_exist_and_named_libraries() -> None:
    libraries = json.loads((Path(__file__).parents[2] / "tools" / "viewer" / "package.json").read_text())[
        "dependencies"
    ]
    for file in BROWSER.glob("*.js"):
        for name, source in re.findall(r"^import \{([^}]+)\} from \"([^\"]+)\"", file.read_text(), re.MULTILINE):
            if source.startswith("./"):
                code = (BROWSER / source).read_text()
                for each in name.split(","):
                    assert re.search(rf"^export (async )?(function|const) {each.strip()}\b", code, re.MULTILINE), (
                        file,
                        each,
                    )
            else:
                assert any(source == library or source.startswith(library + "/") for library in libraries), source
