"""A headless Chromium for the viewer's tests, and the pages that it opens."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from collab_megatron.view import __main__ as command

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Dialog, Page

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
LAPTOP = {"width": 1366, "height": 768}
WAIT_MS = 30_000  # for anything on the page, on a machine that does other work


@contextmanager
def running_browser() -> Iterator[Browser]:
    """Chromium; skips where it or playwright is missing."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make install")
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip("no Chromium: bash tests/view/install_browser.sh installs Debian's package")
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox refuses root
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


def write_viewer(run: Path, *arguments: str) -> Path:
    """The file that the command writes for a run."""
    command.main([str(run), "--no-open", *arguments])
    return run / "viewer.html"


@contextmanager
def opened(
    browser: Browser, file: Path, address: str = "", *, silent: bool = True, dark: bool = False
) -> Iterator[Page]:
    """The file in a new window. At the end: no dialog, and if `silent` no message and no request for another file."""
    context = browser.new_context(viewport=LAPTOP, color_scheme="dark" if dark else "light")
    try:
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        noticed: list[str] = []
        asked = {file.as_uri()}
        if silent:
            page.on("request", lambda request: asked.add(request.url.partition("#")[0]))
            page.on("console", lambda message: noticed.append(f"{message.type}: {message.text}"))
            page.on("pageerror", lambda error: noticed.append(f"error: {error}"))

        def dismiss(dialog: Dialog) -> None:
            noticed.append(f"dialog: {dialog.message}")
            dialog.dismiss()

        page.on("dialog", dismiss)
        page.goto(file.as_uri() + address)
        page.wait_for_selector(".count")
        yield page
        assert noticed == []
        assert asked == {file.as_uri()}
    finally:
        context.close()


def wait_until(page: Page, expression: str, argument: str | None = None) -> None:
    """Waits until the expression is true. wait_for_function calls eval in the page: the policy forbids it."""
    deadline_s = time.monotonic() + WAIT_MS / 1000
    while not page.evaluate(expression, argument):
        assert time.monotonic() < deadline_s, f"never true: {expression}"
        page.wait_for_timeout(20)
