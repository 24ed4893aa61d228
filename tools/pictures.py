"""Pictures for docs/images: the viewer and TensorBoard's first page of a demo's run, taken by a headless Chromium.

python tools/pictures.py --run-dir runs/demo --output docs/images
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from collab_megatron.errors import UserError, run_cli
from collab_megatron.view import __main__ as viewer

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

SIZE = {"width": 1366, "height": 768}  # a laptop
DASHBOARD_SIZE = {"width": 1680, "height": 1180}
DASHBOARD_MS = 60_000
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def take(page: Page, address: str, output: Path) -> None:
    """viewer_tree.png: a tree of training; viewer_time.png: its lanes of time, dark; viewer_prompt.png: a held-out
    prompt at every evaluation."""
    page.goto(address)
    page.get_by_label("all trees").select_option("trained")
    page.get_by_label("asked or not").select_option("yes")
    page.get_by_label("sort by").select_option("spread")
    page.get_by_title("turn the order around").click()
    page.keyboard.press("j")
    page.wait_for_selector(".conversation")
    page.screenshot(path=output / "viewer_tree.png")
    page.keyboard.press("d")
    page.keyboard.press("l")
    page.wait_for_selector(".lanes")
    page.screenshot(path=output / "viewer_time.png")
    page.keyboard.press("d")
    page.get_by_label("all trees").select_option("again")
    page.get_by_label("sort by").select_option("asked")
    page.keyboard.press("c")
    page.keyboard.press("j")
    page.wait_for_selector(".related .chosen")
    page.wait_for_timeout(300)  # the other columns
    page.screenshot(path=output / "viewer_prompt.png")


def take_dashboard(browser: Browser, logs: Path, output: Path) -> None:
    """tensorboard.png: the Custom Scalars tab of a run (collab_megatron/trainer/report/charts.py)."""
    from tensorboard import program  # only here: it takes seconds to import

    server = program.TensorBoard()
    server.configure(argv=["", "--logdir", str(logs), "--host", "127.0.0.1", "--port", "0"])
    page = browser.new_page(viewport=DASHBOARD_SIZE)
    page.goto(server.launch() + "#custom_scalars")
    page.get_by_text("parts of the reward").wait_for(timeout=DASHBOARD_MS)
    page.wait_for_timeout(5000)  # the curves
    page.screenshot(path=output / "tensorboard.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, required=True, help="of a finished demo")
    parser.add_argument("--output", type=Path, required=True, help="folder of the pictures")
    args = parser.parse_args()
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        raise UserError("there is no Chromium: install it (Debian: tests/view/install_browser.sh)")
    from playwright.sync_api import sync_playwright  # only here: a development package

    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        file = Path(folder, "viewer.html")
        viewer.main([str(args.run_dir), "--no-open", "--output", str(file)])
        browser = playwright.chromium.launch(executable_path=program, chromium_sandbox=False)
        take(browser.new_page(viewport=SIZE), file.as_uri(), args.output)
        take_dashboard(browser, args.run_dir / "tensorboard" / "rl", args.output)
        browser.close()


if __name__ == "__main__":
    run_cli(main)
