"""Pictures for docs/images: the viewer, TensorBoard, the doctor and the live page, taken by a headless Chromium.

    python tools/pictures.py --run-dir runs/demo --output docs/images
    python tools/pictures.py ... --compare-dir runs/other --live runs/running/logs/rl/latest/live.json

The folders' names are in the pictures as they are given here: name them relative to where you are. The live page needs
a run that is running now: start one next to this command, whose picture is taken after its first batch.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from rich.console import Console
from rich.text import Text

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # run as a file, Python finds only tools/

from collab_megatron.errors import UserError, run_cli  # noqa: E402
from collab_megatron.view import __main__ as viewer  # noqa: E402
from tools.pictures_hostile import write_hostile_record  # noqa: E402

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, ViewportSize

SIZE: ViewportSize = {"width": 1366, "height": 768}  # a laptop
PROMPT_SIZE: ViewportSize = {"width": 1366, "height": 560}
TREE_SIZE: ViewportSize = {"width": 1366, "height": 900}
LIST_SIZE: ViewportSize = {"width": 880, "height": 1420}  # narrow: the list is as wide as the window
DASHBOARD_SIZE: ViewportSize = {"width": 1680, "height": 1180}
LIVE_SIZE: ViewportSize = {"width": 780, "height": 600}
DASHBOARD_MS = 60_000
LIVE_MS = 240_000  # until the first batch of a run that starts
SETTLED_MS = 300  # until columns and rows are drawn
DRAWN_MS = 100  # after a key
PROMPTS_TRIED = 300
CLEAR = 1.0  # difference of two MRs
COLORS = 256  # of a picture
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
KINDS = ("viewer", "compare", "hostile", "tensorboard", "live", "doctor")
DOCTOR = ("-m", "collab_megatron.doctor", "conf/demo_rl.yaml", "--no-calls")
DOCTOR_COLUMNS = 138
HOME = "~/collab_megatron"  # in the place of this checkout
TERMINAL = """<!doctype html><meta charset="utf-8"><style>
body {{ margin: 0; background: #16181b; }}
pre {{ display: inline-block; margin: 0; padding: 14px 18px; color: #e6e4df; font: 14px/1.4 monospace; }}
</style><pre>{lines}</pre>"""


class Studio:
    """A browser, and the folder of the pictures."""

    def __init__(self, browser: Browser, output: Path, work: Path) -> None:
        self._browser, self._output, self.work = browser, output.absolute(), work

    def page(self, size: ViewportSize, headers: dict[str, str] | None = None) -> Page:
        return self._browser.new_page(viewport=size, extra_http_headers=headers)

    def viewer(self, size: ViewportSize, *arguments: str) -> Page:
        """The viewer of these runs, in a new window."""
        file = self.work / "viewer.html"
        viewer.main([*arguments, "--no-open", "--output", str(file)])
        page = self.page(size)
        page.goto(file.as_uri())
        return page

    def keep(self, png: bytes, name: str) -> None:
        """Write a picture with few colors: such files are a third as large."""
        file = self._output / name
        with Image.open(io.BytesIO(png)) as image:
            few = image.convert("RGB").quantize(COLORS, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
        few.save(file, optimize=True)
        print(f"{name}: {file.stat().st_size / 1e3:.0f} kB", flush=True)


def take_viewer(studio: Studio, run_dir: Path) -> None:
    """viewer_list.png: a filtered list; viewer_tree.png: a tree of training; viewer_time.png: its time, dark."""
    page = studio.viewer(TREE_SIZE, str(run_dir))
    page.get_by_label("all trees").select_option("trained")
    page.get_by_label("asked or not").select_option("yes")
    page.get_by_label("sort by").select_option("spread")
    page.get_by_title("turn the order around").click()
    page.keyboard.press("j")
    page.wait_for_selector(".conversation")
    replies = page.locator(".bars tbody tr")
    rewards = [float(replies.nth(number).locator("td").first.inner_text()) for number in range(replies.count())]
    replies.nth(rewards.index(max(rewards))).click()
    page.locator(".bars .chosen").wait_for()
    studio.keep(page.screenshot(), "viewer_tree.png")
    page.keyboard.press("d")
    page.keyboard.press("l")
    page.wait_for_selector(".lanes")
    studio.keep(page.screenshot(), "viewer_time.png")
    page.keyboard.press("d")
    page.set_viewport_size(LIST_SIZE)
    page.get_by_label("words of the prompt or task").fill("table")
    page.get_by_label("steps").fill("5-20")
    page.get_by_label("all trees").select_option("ambiguous")
    page.keyboard.press("Escape")  # leaves the field
    page.wait_for_timeout(SETTLED_MS)
    studio.keep(page.locator("aside").screenshot(), "viewer_list.png")


def take_prompt(studio: Studio, run_dir: Path) -> None:
    """viewer_prompt.png: a held-out prompt at the first, a middle and the last evaluation."""
    steps = evaluated_steps(run_dir)
    chosen = sorted({steps[0], steps[len(steps) // 2], steps[-1]})
    page = studio.viewer(PROMPT_SIZE, str(run_dir), "--steps", ",".join(map(str, chosen)))
    open_prompt(page, lambda rewards: rewards[-1] - rewards[0] > CLEAR)
    studio.keep(page.screenshot(), "viewer_prompt.png")


def take_comparison(studio: Studio, run_dir: Path, other: Path) -> None:
    """viewer_compare.png: a held-out prompt of two runs after the last step that both evaluated."""
    both = set(evaluated_steps(run_dir)) & set(evaluated_steps(other))
    if not both:
        raise UserError(f"no step was evaluated by both runs: choose another --compare-dir than {other}")
    page = studio.viewer(PROMPT_SIZE, str(run_dir), "--compare", str(other), "--steps", str(max(both)))
    open_prompt(page, lambda rewards: abs(rewards[-1] - rewards[0]) > CLEAR)
    studio.keep(page.screenshot(), "viewer_compare.png")


def evaluated_steps(run_dir: Path) -> list[int]:
    """Steps with transcripts of held-out conversations. Raises UserError if there are none."""
    files = run_dir.glob("evaluations/*/step_*.jsonl")
    steps = {int(found[1]) for file in files if (found := re.fullmatch(r"step_(\d+)", file.stem))}
    if not steps:
        raise UserError(f"{run_dir} has no held-out conversations: name the run.dir of a finished demo")
    return sorted(steps)


def open_prompt(page: Page, good: Callable[[Sequence[float]], bool]) -> None:
    """Open the prompt that a viewer of a few steps or of two runs shows in all its trees, and whose MRs are `good`: the
    first one of the list by MR, or the last one that is tried."""
    page.get_by_label("asked or not").select_option("yes")
    page.get_by_label("sort by").select_option("mr")
    page.get_by_title("turn the order around").click()
    page.keyboard.press("Escape")  # leaves the button
    rewards = page.locator(".related h3")
    for _ in range(PROMPTS_TRIED):
        page.keyboard.press("j")
        page.wait_for_selector(".related .chosen")
        page.wait_for_timeout(DRAWN_MS)
        if good([float(text.split()[-1]) for text in rewards.all_inner_texts()]):
            break
    page.wait_for_timeout(SETTLED_MS)


def take_hostile(studio: Studio) -> None:
    """viewer_hostile.png: texts that would run, hide or turn around what stands near them, if they were not text."""
    write_hostile_record(studio.work / "runs" / "hostile")
    with contextlib.chdir(studio.work):  # the name of the folder is in the picture
        page = studio.viewer(SIZE, "runs/hostile")
    page.keyboard.press("j")
    page.get_by_text("characters more").wait_for()
    page.locator(".detail").evaluate("detail => detail.scrollTo(0, detail.scrollHeight)")
    studio.keep(page.screenshot(), "viewer_hostile.png")


def take_dashboard(studio: Studio, logs: Path) -> None:
    """tensorboard.png: the Custom Scalars tab of a run (collab_megatron/trainer/report/charts.py)."""
    from tensorboard import program  # only here: it takes seconds to import

    if not logs.is_dir():
        raise UserError(f"there is no folder {logs}: name the run's run.name with --name")
    server = program.TensorBoard()
    server.configure(argv=["", "--logdir", str(logs), "--host", "127.0.0.1", "--port", "0"])
    page = studio.page(DASHBOARD_SIZE)
    page.goto(server.launch() + "#custom_scalars")
    page.get_by_text("parts of the reward").wait_for(timeout=DASHBOARD_MS)
    page.wait_for_timeout(5000)  # the curves
    studio.keep(page.screenshot(), "tensorboard.png")


def take_live_page(studio: Studio, file: Path) -> None:
    """live_page.png: the live page of a run that is running now, after its first batch."""
    from playwright.sync_api import Error

    url, key = read_live(file)
    page = studio.page(LIVE_SIZE, {"Authorization": f"Bearer {key}"})
    try:
        page.goto(url)
        page.locator("pre").first.wait_for(timeout=LIVE_MS)  # the page loads itself again
        png = page.screenshot(full_page=True)
    except Error:
        raise UserError(
            f"the address in {file} shows no conversation: the live page is there while its run is, and has one "
            "after the first batch"
        ) from None
    studio.keep(png, "live_page.png")


def read_live(file: Path) -> tuple[str, str]:
    """Address and key of a live page. Raises UserError for a file that is no live.json."""
    try:
        live = json.loads(file.read_text())
        return str(live["url"]), str(live["key"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"--live {file} is not the live.json of a run: it is in the run's logs/NAME/latest") from None


def take_doctor(studio: Studio) -> None:
    """doctor.png: what the doctor prints about the demo's config."""
    done = subprocess.run([sys.executable, *DOCTOR], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise UserError(f"the doctor ended with code {done.returncode}: {done.stderr.strip()[-300:]}")
    console = Console(record=True, width=DOCTOR_COLUMNS, file=io.StringIO())
    console.print(Text(f"$ python {' '.join(DOCTOR)}", style="bold"))
    console.print(Text.from_ansi(done.stdout.replace(str(REPOSITORY), HOME)))
    lines = console.export_html(inline_styles=True, code_format="{code}").rstrip()
    page = studio.page(SIZE)
    page.set_content(TERMINAL.format(lines=lines))
    studio.keep(page.locator("pre").screenshot(), "doctor.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, required=True, help="of a finished RL run of the demo")
    parser.add_argument("--name", default="rl", help="its run.name (%(default)s)")
    parser.add_argument("--compare-dir", type=Path, help="of a second run, for viewer_compare.png")
    parser.add_argument("--live", type=Path, metavar="FILE", help="live.json of a run that runs now, for live_page.png")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS, help="default: all")
    parser.add_argument("--output", type=Path, required=True, help="folder of the pictures")
    args = parser.parse_args()
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        raise UserError("there is no Chromium: install it (Debian: tests/view/install_browser.sh)")
    from playwright.sync_api import sync_playwright  # only here: a development package

    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, chromium_sandbox=False)
        take(Studio(browser, args.output, Path(folder)), args)
        browser.close()


def take(studio: Studio, args: argparse.Namespace) -> None:
    """The pictures that were asked for. Those of a second or of a running run are left out where none is named."""
    if "viewer" in args.only:
        take_viewer(studio, args.run_dir)
        take_prompt(studio, args.run_dir)
    if "hostile" in args.only:
        take_hostile(studio)
    if "tensorboard" in args.only:
        take_dashboard(studio, args.run_dir / "tensorboard" / args.name)
    if "doctor" in args.only:
        take_doctor(studio)
    if "compare" in args.only:
        if args.compare_dir is None:
            print("viewer_compare.png is left out: name a second run with --compare-dir", flush=True)
        else:
            take_comparison(studio, args.run_dir, args.compare_dir)
    if "live" in args.only:
        if args.live is None:
            print("live_page.png is left out: name the live.json of a running run with --live", flush=True)
        else:
            take_live_page(studio, args.live)


if __name__ == "__main__":
    run_cli(main)
