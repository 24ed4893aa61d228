"""What a driver process imports, once for all that are forked from the process that imports this (tests/forks.py)."""

from __future__ import annotations

import aiohttp.web
import uvloop
import zmq.asyncio
from transformers import AutoTokenizer

import collab_megatron.demo.tokenizer
import collab_megatron.rollout.batch_collector
from collab_megatron.rollout.llm.litellm_api import LiteLLMApi

LiteLLMApi()  # LiteLLM itself is imported here

__all__ = ["AutoTokenizer", "aiohttp", "collab_megatron", "uvloop", "zmq"]
