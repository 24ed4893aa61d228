"""A live page alone in its process, for what strangers do to it. python -m tests.rollout.lone_page FOLDER IDLE_S"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from collab_megatron.log import set_up_logging
from collab_megatron.rollout import live_page
from tests.rollout.test_live_page import STATUS


async def main() -> None:
    live_page.IDLE_S = float(sys.argv[2])
    await live_page.LivePage(lambda: STATUS).start(0, Path(sys.argv[1]) / "live.json")
    await asyncio.Event().wait()


if __name__ == "__main__":
    set_up_logging("driver-0")
    asyncio.run(main())
