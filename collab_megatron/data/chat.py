"""Chat template to token ids, token-in token-out: what the policy sampled is never turned to text and back.

A conversation's context grows as ids:  prompt_ids + reply ids (as sampled) + turn_glue(user turn) + reply ids + ...
`turn_glue` is the stretch of the template between two sampled replies. check_exact() proves on probe conversations that
this equals tokenising the whole chat at once; it does where the end-of-turn token is a special token and the template
does not rewrite earlier turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from collab_megatron.errors import UserError
from collab_megatron.types import Message

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")

REPLY = "zqxreplyxqz"  # stands in for a reply; no template holds it
PROBES: tuple[tuple[Message, ...], ...] = (
    (Message("user", "hello"), Message("assistant", "which day?"), Message("user", "monday")),
    (
        Message("system", "Be brief."),
        Message("user", "I need a room."),
        Message("assistant", "For how many?\nAnd when?"),
        Message("user", "two, {tomorrow} – $5?"),
        Message("assistant", "Done: 2 × ✓"),
        Message("user", "thanks"),
    ),
)

INEXACT = (
    "this chat template cannot be grown turn by turn as token ids (it rewrites earlier turns, or words merge across a "
    "turn's edge): use a template that only appends"
)


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a Hugging Face folder or hub name. Raises UserError without one, or without a chat template."""
    folder = Path(path)
    if folder.is_dir() and not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise UserError(f"{path} holds no tokenizer (none of {', '.join(TOKENIZER_FILES)}): copy the model's there")
    from transformers import AutoTokenizer  # here because it takes seconds

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError, KeyError) as error:
        first_line = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise UserError(f"no tokenizer could be loaded from {path}: {first_line}") from None
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer of {path} has no chat template: use a chat model, or add chat_template.jinja")
    return tokenizer


class ChatTemplate:
    """A tokenizer's chat template as token ids. Raises UserError if it does not close assistant turns by one token."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        after = self._after_reply("x", generation_prompt=False)
        ids = self._encode(after)
        if not ids or ids[0] not in set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder):
            raise UserError("the chat template does not end an assistant turn with a special token: use another one")
        self.end_id: int = ids[0]
        eos = tokenizer.eos_token_id
        self.end_ids: tuple[int, ...] = tuple(dict.fromkeys(i for i in (self.end_id, eos) if i is not None))

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the chat so far, up to and including the generation prompt."""
        return self._encode(self._render(messages, generation_prompt=True))

    def turn_glue(self, user_text: str, *, cut: bool = False) -> list[int]:
        """Ids between a sampled reply and the next one: the user's turn and the generation prompt.

        The reply's own end-of-turn id is not among them, unless `cut`: then the reply ran into its token limit and
        brought none, and the glue begins with it.
        """
        ids = self._encode(self._after_reply(user_text, generation_prompt=True))
        return ids if cut else ids[1:]

    def reply_text(self, token_ids: Sequence[int]) -> str:
        """A sampled reply as text, without special tokens."""
        text: str = self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def ended(self, token_ids: Sequence[int]) -> bool:
        """Whether a sampled reply brought its end-of-turn id (if not it was cut)."""
        return bool(token_ids) and token_ids[-1] in self.end_ids

    def sft_ids_and_mask(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """(ids [T], mask [T]) of a conversation; True on assistant content and its end-of-turn id.

        Ends at the last trained token. Raises ValueError if the template rewrites earlier turns, or if a turn's
        ids do not read as its content.
        """
        full = self._encode(self._render(messages, generation_prompt=False))
        mask = [False] * len(full)
        last = 0
        for i, message in enumerate(messages):
            if message.role != "assistant":
                continue
            head = self.prompt_ids(messages[:i])
            if full[: len(head)] != head:
                raise ValueError(f"the chat template renders the first {i} turns differently inside a longer chat")
            try:
                end = full.index(self.end_id, len(head))
            except ValueError:
                raise ValueError(f"turn {i} is not closed by the end-of-turn token") from None
            # Both sides made of ids: tokenizers that normalise text or know not every word pass.
            content = self.reply_text(self._encode(message.content)).strip()
            if not self.reply_text(full[len(head) : end]).strip().endswith(content):
                raise ValueError(f"the ids of turn {i} do not read as its content")
            last = end + 1
            mask[len(head) : last] = [True] * (last - len(head))
        if not last:
            raise ValueError("the conversation has no assistant turn to learn from")
        return full[:last], mask[:last]

    def check_exact(self) -> None:
        """Raises UserError unless growing a chat by ids equals tokenising it whole, on the probe conversations."""
        for probe in PROBES:
            first = next(i for i, message in enumerate(probe) if message.role == "assistant")
            grown = self.prompt_ids(probe[:first])
            for i in range(first, len(probe), 2):
                closed = self._encode(self._render(probe[: i + 1], generation_prompt=False))
                if closed[: len(grown)] != grown or self.end_id not in closed[len(grown) :]:
                    raise UserError(INEXACT)
                grown = closed[: closed.index(self.end_id, len(grown)) + 1]
                grown += self.turn_glue(probe[i + 1].content)
                if grown != self.prompt_ids(probe[: i + 2]):
                    raise UserError(INEXACT)

    def _after_reply(self, user_text: str, *, generation_prompt: bool) -> str:
        """The rendered text behind an assistant turn's content: its end, and with `generation_prompt` a user turn."""
        messages = [Message("user", "x"), Message("assistant", REPLY)]
        if generation_prompt:
            messages.append(Message("user", user_text))
        _, found, after = self._render(messages, generation_prompt=generation_prompt).partition(REPLY)
        if not found:
            raise UserError("the chat template does not render assistant turns: use a chat model's template")
        return after

    def _render(self, messages: Sequence[Message], *, generation_prompt: bool) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text: str = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=generation_prompt
            )
        except Exception as error:
            raise UserError(f"the chat template refuses {[m.role for m in messages]}: {error}") from error
        return text

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids
