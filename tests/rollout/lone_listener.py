"""A driver's listener alone in its process: answers every admitted request with what it has dropped.

python -m tests.rollout.lone_listener ADDRESS READY_FILE TOKEN
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import zmq.asyncio

from collab_megatron.files import publish_text
from collab_megatron.rollout.listener import Listener
from collab_megatron.wire.protocol import Answer


async def main() -> None:
    address, ready, token = sys.argv[1:]
    context = zmq.asyncio.Context()
    listener = Listener(context, address, token.encode())
    publish_text(Path(ready), listener.address)
    running = True
    while running:
        received = await listener.next()
        await listener.answer(received, Answer(notes=(json.dumps(listener.dropped),)))
        running = received.request.op != "stop"
    listener.close()
    context.term()


if __name__ == "__main__":
    asyncio.run(main())
