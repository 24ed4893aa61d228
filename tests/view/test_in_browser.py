"""The viewer in a real browser: find, open and compare conversations, by mouse and keyboard; hostile texts; speed.

Every test fails too if the page logs anything, opens a dialog or asks for another file (browser.py).
"""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.view.browser import opened, running_browser, wait_until, write_viewer
from tests.view.records import a_call, a_future, a_reply, a_tree, write_record
from tests.view.test_page import HOSTILE, hostile_tree

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.slow
MANY = 5000
PAINT_S, FRAME_S = 1.0, 1 / 50
SCROLL = """async () => {
  const list = document.querySelector(".list"), begin = performance.now();
  for (let frame = 1; ; frame++) {
    list.scrollTop += 120;
    await new Promise(requestAnimationFrame);
    if (performance.now() - begin > 1500) return frame;
  }
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as found:
        yield found


def a_talk() -> list[dict[str, Any]]:
    """Three trees: two replies of two futures each, of which one failed; one tree without a question; one dropped."""
    failed = a_future(status="judge_failed", scores={}, reward=None, error="the judge is gone")
    later = a_future(messages=[{"role": "user", "content": "Saturday."}], reward=0.2)
    first = a_tree(replies=[a_reply(), a_reply(text="Done.", mr=0.1, advantage=-1.5, futures=[failed, later])])
    plain = a_tree(step=13, task_id="chair-1", replies=[a_reply(text="Booked.", mr=0.2)])
    plain["prompt"] = [{"role": "user", "content": "I need a chair."}]
    dropped = a_tree(step=14, task_id="lamp-1", kept=False, replies=[], error="the engine is gone")
    dropped["prompt"] = [{"role": "user", "content": "I need a lamp."}]
    return [first, plain, dropped]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_viewer(write_record(tmp_path_factory.mktemp("view") / "run", *a_talk()))


def titles(page: Page) -> list[str]:
    return page.locator(".row .title").all_inner_texts()


def wait_for_count(page: Page, text: str) -> None:
    wait_until(page, "text => document.querySelector('.count')?.textContent === text", text)


def test_filters_and_sorting_choose_the_rows(browser: Browser, file: Path) -> None:
    with opened(browser, file) as page:
        assert titles(page) == ["I need a table.", "I need a chair.", "I need a lamp."]
        page.get_by_label("words of the prompt or task").fill("CHAIR need")
        wait_for_count(page, "1 of 3 trees")
        assert titles(page) == ["I need a chair."]
        page.get_by_label("words of the prompt or task").fill("")
        page.get_by_label("steps").fill("13-")
        wait_for_count(page, "2 of 3 trees")
        page.get_by_label("steps").fill("")
        for label, choice, chosen in (
            ("asked or not", "yes", ["I need a table."]),
            ("failed or not", "judge_failed", ["I need a table."]),
            ("failed or not", "any", ["I need a table.", "I need a lamp."]),
            ("all trees", "dropped", ["I need a lamp."]),
        ):
            page.get_by_label(label).select_option(choice)
            wait_for_count(page, f"{len(chosen)} of 3 trees")
            assert titles(page) == chosen
            page.get_by_label(label).select_option("")
            wait_for_count(page, "3 of 3 trees")
        page.get_by_label("sort by").select_option("mr")
        assert titles(page) == ["I need a chair.", "I need a table.", "I need a lamp."]  # without a figure: at the end
        page.get_by_title("turn the order around").click()
        assert titles(page) == ["I need a table.", "I need a chair.", "I need a lamp."]
        page.get_by_label("sort by").select_option("metric:accuracy")
        assert titles(page)[-1] == "I need a lamp."


def test_an_open_tree_shows_replies_futures_scores_tokens_and_what_is_hidden(browser: Browser, file: Path) -> None:
    with opened(browser, file) as page:
        page.get_by_text("I need a table.").click()
        page.wait_for_selector(".conversation")
        assert page.locator(".tree .node").count() == 1 + 2 + 3
        assert page.locator(".tree .link").count() == 5
        assert (page.locator(".tree .failed").text_content() or "").startswith("– judge_failed")
        assert "Which day?" in page.locator(".conversation").inner_text()
        assert page.locator(".bars tbody tr").count() == 2
        # the second reply's first future failed: no score is shown for it, and its reason is
        page.locator(".bars tbody tr").nth(1).click()
        conversation = page.locator(".conversation").inner_text()
        assert "reward – judge_failed" in conversation
        assert "the judge is gone" in conversation
        # thoughts on demand
        assert not page.get_by_text("it asks for the day").first.is_visible()
        page.get_by_role("button", name="thoughts").click()
        page.get_by_text("it asks for the day").first.wait_for()
        assert page.get_by_text("understanding").first.is_visible()
        # tokens: shades by log-prob, and both versions that sampled them
        page.locator(".strip summary").first.click()
        strip = page.locator(".strip").first
        assert strip.locator(".token").count() == 3
        assert strip.locator(".version").all_inner_texts() == ["weights 10", "weights 11"]
        assert [strip.locator(".token").nth(n).get_attribute("title") for n in (0, 2)] == [
            "id 88, log-prob -0.21",
            "id 2, log-prob -0.001",
        ]


def test_lanes_of_time_show_each_turn_and_call(browser: Browser, file: Path) -> None:
    with opened(browser, file) as page:
        page.get_by_text("I need a table.").click()
        page.get_by_role("button", name="time").click()
        page.wait_for_selector(".lanes")
        assert [page.locator(f".lane.{name} rect").count() for name in ("engine", "user", "judge")] == [2, 3, 3]
        waits = page.locator(".lane.user .wait")
        assert waits.count() == 3  # 100 ms between the reply's end and the user's call
        assert "after 100 ms of waiting" in (page.locator(".lane.user title").first.text_content() or "")


def test_the_keyboard_does_everything(browser: Browser, file: Path) -> None:
    with opened(browser, file) as page:
        press = page.keyboard.press
        press("j")
        page.wait_for_selector(".conversation")
        assert page.locator(".row.selected .title").inner_text() == "I need a table."
        press("n")
        page.get_by_text("reply 2").wait_for()
        press("f")
        wait_until(page, "document.querySelector('.conversation')?.innerText.includes('Saturday.')")
        press("p")
        page.get_by_text("reply 1").wait_for()
        press("l")
        page.wait_for_selector(".lanes")
        press("c")
        page.get_by_text("no other tree has this prompt").wait_for()
        press("c")
        page.wait_for_selector(".tree")
        press("t")
        page.get_by_text("it asks for the day").first.wait_for()
        press("?")
        page.wait_for_selector("dialog[open]")
        press("Escape")
        page.wait_for_selector("dialog", state="detached")
        press("ArrowDown")
        assert page.locator(".row.selected .title").inner_text() == "I need a chair."
        press("k")
        assert page.locator(".row.selected .title").inner_text() == "I need a table."
        press("/")
        page.keyboard.type("jkt")  # into the field: no tree is opened by it
        wait_for_count(page, "0 of 3 trees")
        assert page.get_by_label("words of the prompt or task").input_value() == "jkt"


def test_an_address_opens_the_same_tree_reply_and_view(browser: Browser, file: Path) -> None:
    with opened(browser, file) as page:
        page.get_by_label("asked or not").select_option("yes")
        page.get_by_text("I need a table.").click()
        page.locator(".bars tbody tr").nth(1).click()
        page.keyboard.press("f")
        page.get_by_role("button", name="time").click()
        wait_until(page, "location.hash.includes('v=lanes')")
        address = "#" + page.url.partition("#")[2]
    with opened(browser, file, address) as page:
        page.wait_for_selector(".lanes")
        assert page.locator(".count").inner_text() == "1 of 3 trees"
        assert "Saturday." in page.locator(".conversation").inner_text()
    with opened(browser, file, "#t=no-such-tree&r=99999999&sort=<b>&v=x") as page:
        page.get_by_text("Open a tree").wait_for()


def test_two_runs_are_compared_on_the_same_prompt(browser: Browser, tmp_path: Path) -> None:
    other = a_tree(replies=[a_reply(text="Which evening?", mr=0.3)])
    first = write_record(tmp_path / "a", *a_talk())
    second = write_record(tmp_path / "b", other)
    with opened(browser, write_viewer(first, "--compare", str(second))) as page:
        wait_for_count(page, "2 of 4 trees")  # the prompts of both runs
        page.keyboard.press("j")
        page.get_by_text("Which evening?").wait_for()
        columns = page.locator(".related article").all_inner_texts()
        assert [("A, step 12" in columns[0], "Which day?" in columns[0]), "B, step 12" in columns[1]] == [
            (True, True),
            True,
        ]
        page.get_by_role("button", name="B, step 12").click()
        wait_until(page, "document.querySelector('.related article:nth-child(2)')?.className === 'chosen'")
        page.get_by_label("all trees").select_option("")
        wait_for_count(page, "4 of 4 trees")


def test_steps_show_one_prompt_growing_up(browser: Browser, tmp_path: Path) -> None:
    trees = [a_tree(step=step, replies=[a_reply(text=f"reply of {step}")]) for step in (0, 20, 30, 40)]
    with opened(browser, write_viewer(write_record(tmp_path / "run", *trees), "--steps", "0,20,40")) as page:
        wait_for_count(page, "3 of 3 trees")
        page.keyboard.press("j")
        page.get_by_text("reply of 40").wait_for()
        assert [re.findall(r"reply of \d+", text) for text in page.locator(".related article").all_inner_texts()] == [
            ["reply of 0"],
            ["reply of 20"],
            ["reply of 40"],
        ]


@pytest.mark.parametrize("text", [*HOSTILE, "x</script>" * 200_000], ids=[*map(repr, range(len(HOSTILE))), "2 MB"])
def test_a_hostile_text_is_shown_and_does_nothing(browser: Browser, tmp_path: Path, text: str) -> None:
    with opened(browser, write_viewer(write_record(tmp_path / "run", hostile_tree(text)))) as page:
        elements = "[...document.querySelectorAll('script, style, img, link, iframe, a, b')].length"
        before = page.evaluate(elements)
        page.keyboard.press("j")
        page.wait_for_selector(".conversation")
        page.keyboard.press("t")
        for name in ("tree", "time", "same prompt"):
            page.get_by_role("button", name=name).first.click()
        page.get_by_role("button", name="tree").first.click()
        page.wait_for_selector(".conversation .message.assistant")
        assert page.evaluate(elements) == before
        shown = page.locator(".conversation .message .text").first.evaluate("element => element.textContent")
        visible = re.sub(
            r"[\x00\x1b\u200b\u202e\u2066\u2069\u2028\u2029\ud83d]", lambda found: f"U+{ord(found[0]):04X}", text
        )
        if len(text) <= 6000:
            assert shown == visible
        else:
            assert shown == visible[:6000] + f"{len(text) - 6000:,} characters more"


REFUSED = """async (url) => {
  const found = [];
  document.addEventListener("securitypolicyviolation", (event) => found.push(event.effectiveDirective));
  const attempts = [
    () => { document.body.innerHTML = "<p>"; },
    () => { document.createElement("script").textContent = "window.ran = true"; },
    () => { new Image().src = `${url}x.png`; },
    () => { document.body.append(Object.assign(document.createElement("iframe"), { src: url })); },
    () => fetch(url),
  ];
  const later = (ms) => new Promise((done) => setTimeout(done, ms));
  for (const attempt of attempts) await Promise.race([(async () => attempt())().catch(() => null), later(1000)]);
  await later(300);
  return found.sort();
}"""


def test_the_policy_refuses_markup_scripts_and_requests(browser: Browser, file: Path) -> None:
    with opened(browser, file, silent=False) as page, socket.create_server(("127.0.0.1", 0)) as server:
        refused = page.evaluate(REFUSED, f"http://127.0.0.1:{server.getsockname()[1]}/")
        assert refused == [
            "connect-src",
            "frame-src",
            "img-src",
            "require-trusted-types-for",
            "require-trusted-types-for",
        ]
        assert received(server) == []


def received(server: socket.socket) -> list[bytes]:
    """What clients sent. Chromium connects ahead of time for a frame that the policy then refuses: nothing is sent."""
    found: list[bytes] = []
    server.settimeout(0.2)
    while True:
        try:
            connection, _ = server.accept()
        except TimeoutError:
            return found
        with connection, contextlib.suppress(TimeoutError):
            connection.settimeout(0.5)
            if data := connection.recv(1000):
                found.append(data)


def test_what_a_client_sends_is_found() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()),
        socket.create_connection(server.getsockname()) as client,
    ):
        client.sendall(b"GET")
        assert received(server) == [b"GET"]


def test_dark_and_light_follow_the_system_and_the_key(browser: Browser, file: Path) -> None:
    back = "getComputedStyle(document.body).backgroundColor"
    with opened(browser, file) as page, opened(browser, file, dark=True) as night:
        light, dark = page.evaluate(back), night.evaluate(back)
        assert light != dark
        page.keyboard.press("d")
        wait_until(page, f"{back} === '{dark}'")
        page.keyboard.press("d")
        wait_until(page, f"{back} === '{light}'")


@pytest.mark.parametrize("width", [1280, 1024, 700])
def test_nothing_is_wider_than_the_window(browser: Browser, file: Path, width: int) -> None:
    with opened(browser, file) as page:
        page.set_viewport_size({"width": width, "height": 720})
        page.keyboard.press("j")
        page.wait_for_selector(".conversation")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator(".detail").evaluate("e => e.scrollWidth - e.clientWidth") == 0


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a record of MANY trees of 8 replies."""
    replies = [a_reply(mr=n / 8, futures=[a_future(calls=[a_call()])]) for n in range(8)]
    trees = (a_tree(step=1 + n // 16, slot=n % 16, task_id=f"task {n}", replies=replies) for n in range(MANY))
    return write_viewer(write_record(tmp_path_factory.mktemp("many") / "run", *trees))


def test_many_trees_are_there_at_once_and_scroll(browser: Browser, many: Path) -> None:
    """Seconds are the main thread's own, so that what else the machine does is not counted."""
    with opened(browser, many) as page:
        session = page.context.new_cdp_session(page)
        session.send("Performance.enable", {"timeDomain": "threadTicks"})

        def busy_s() -> float:
            metrics = session.send("Performance.getMetrics")["metrics"]
            return float(next(each["value"] for each in metrics if each["name"] == "TaskDuration"))

        begin_s = busy_s()
        page.reload()
        page.wait_for_selector(".row")
        assert busy_s() - begin_s < PAINT_S
        wait_for_count(page, f"{MANY:,} of {MANY:,} trees")
        first = titles(page)
        assert len(first) < 100  # only rows in view exist
        begin_s = busy_s()
        frames = page.evaluate(SCROLL)
        assert (busy_s() - begin_s) / frames < FRAME_S
        assert page.locator(".list").evaluate("list => list.scrollTop") == 120 * frames
        page.get_by_label("words of the prompt or task").fill(f"task {MANY - 1}")
        wait_for_count(page, f"1 of {MANY:,} trees")
        page.keyboard.press("Escape")
        page.keyboard.press("j")
        page.wait_for_selector(".conversation")
        assert page.locator(".tree .node").count() == 1 + 8 + 8
