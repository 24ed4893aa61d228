"""Chat templates as token ids, token-in token-out: sampled ids are never converted to text and back.

A conversation's context grows as ids:  prompt_ids + reply ids (as sampled) + turn_glue(user turn) + reply ids + ...
Text of others is encoded as plain text, even where it spells a control token (control_tokens.py).
`turn_glue` is the part of the template between two sampled replies. growth_difference() compares this with tokenizing
the whole chat at once, on probe conversations. The two differ if a template rewrites earlier turns (removes their
thoughts, trims their white space) or if words merge across the border of a turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from collab_megatron.data.control_tokens import MARK, ControlTokens
from collab_megatron.data.thought_tags import THOUGHT_TAGS, split_thoughts
from collab_megatron.errors import UserError
from collab_megatron.types import Generation, Message, PolicyTurn

InexactTemplate = Literal["refuse", "as_sampled", "rendered"]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")

REPLY = "zqxreplyxqz"  # placeholder for a reply; no template contains it
USER = "zqyuseryqz"  # placeholder for a user turn

# Roles alternate after the system turn. Plain chats come first, because the first difference is reported.
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
    (
        Message("user", "hello"),
        Message("assistant", "<think>\nno day yet\n</think>\n\nwhich day?"),
        Message("user", "monday"),
        Message("assistant", "<think>\nsettled\n</think>\n\ndone"),
        Message("user", "thanks"),
    ),
    # No line break at the front: tokenizers join it to the template's own, with every template.
    (Message("user", " hello\n"), Message("assistant", " which day? \n"), Message("user", "\n  monday ")),
)

# What templates do with a user's text, and texts that show which.
TEXT_RULES: tuple[Callable[[str], str], ...] = (str, str.strip)
RULE_PROBES = ("\n two, {{ tomorrow }} – $5? \n", "<think>\nno\n</think>\n\nyes", "line\r\n\n\tline ✓ <b>&amp;</b>")

SHOWN_TOKENS = 12


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a Hugging Face folder or hub name. Raises UserError without a tokenizer or chat template."""
    folder = Path(path)
    if folder.is_dir() and not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise UserError(
            f"{path} holds no tokenizer (none of {', '.join(TOKENIZER_FILES)}): copy the model's tokenizer files there"
        )
    from transformers import AutoTokenizer  # here because it takes seconds

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path))
    except Exception as error:  # noqa: BLE001 - a broken tokenizer file raises anything
        first_line = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise UserError(
            f"the tokenizer of {path} cannot be loaded: {first_line}; copy the model's tokenizer files there again"
        ) from None
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer of {path} has no chat template: use a chat model, or add chat_template.jinja")
    return tokenizer


class ChatTemplate:
    """A tokenizer's chat template as token ids. Raises UserError if assistant turns do not end with one token."""

    def __init__(self, tokenizer: Any, *, thought_tags: tuple[str, str] = THOUGHT_TAGS) -> None:
        self.tokenizer = tokenizer
        self.thought_tags = thought_tags
        tokenizer.encode("", add_special_tokens=False)  # switches padding and truncation off, also in the core below
        self._core = getattr(tokenizer, "backend_tokenizer", None)  # the same ids and texts in half the time
        self._control = ControlTokens(tokenizer, self._core, thought_tags=thought_tags)
        self._rendered = False
        ids = self._encode(self._after_reply())
        if not ids or ids[0] not in set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder):
            raise UserError("the chat template does not end assistant turns with a special token: use another template")
        self.end_id: int = ids[0]
        eos = tokenizer.eos_token_id
        self.end_ids: tuple[int, ...] = tuple(dict.fromkeys(i for i in (self.end_id, eos) if i is not None))
        tags = [self._encode(tag) for tag in thought_tags]
        # decoded alone, because the tokenizer may hide them; an unknown word is not a tag
        self._tags = {ids[0] for ids, tag in zip(tags, thought_tags, strict=True) if self._decode(ids[:1]) == tag}

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the chat so far, up to and including the generation prompt."""
        return self._encode(self._render(messages, generation_prompt=True))

    def turn_glue(self, user_text: str, *, cut: bool = False) -> list[int]:
        """Ids between a sampled reply and the next one: the user's turn and the generation prompt.

        They do not include the reply's end-of-turn id, unless `cut`: a reply that ran into its token limit has none, so
        the glue begins with it.
        """
        if self._glue is None:
            text = self._after_reply(user_text)
        else:
            head, rule, tail = self._glue
            text = f"{head}{rule(self._control.marked(user_text, 'user'))}{tail}"
        ids = self._encode(text)
        return ids if cut else ids[1:]

    def grow(self, context_ids: Sequence[int], messages: Sequence[Message], user_text: str) -> list[int]:
        """The context ids of the next policy turn, after a user turn.

        `context_ids` end with the policy's last turn as sampled, `messages` with the same turn as text
        (PolicyTurn.sampled). The user's new turn is in neither. Rendered again if check_growth() chose so, else
        context + glue. Raises ValueError if `messages` do not end with an assistant turn.
        """
        if not messages or messages[-1].role != "assistant":
            raise ValueError("`messages` must end with an assistant turn: leave the new user turn out")
        if self._rendered:
            return self.prompt_ids([*messages, Message("user", user_text)])
        return [*context_ids, *self.turn_glue(user_text, cut=not self.ended(context_ids))]

    def turn_ids(self, text: str) -> list[int]:
        """Ids of a whole assistant turn that no engine of ours sampled, its end included; for counting."""
        return [*self._encode(text), self.end_id]

    def reply_text(self, token_ids: Sequence[int]) -> str:
        """A sampled reply as text, without special tokens."""
        return self._decode(token_ids, skip_special_tokens=True)

    def policy_turn(
        self, context_ids: Sequence[int], generation: Generation, *, begin_s: float = 0.0, end_s: float = 0.0
    ) -> PolicyTurn:
        """The turn sampled from `context_ids`, split into thought and reply. The times are those of PolicyTurn."""
        opening = self._opening(context_ids)
        text = self._with_tags(generation.token_ids_T)
        split = split_thoughts(text, self.thought_tags, opened=bool(opening))
        return PolicyTurn(
            thought=split.thought,
            reply=split.reply,
            sampled=opening + text,
            cut=not (split.closed and self.ended(generation.token_ids_T)),
            generation=generation,
            begin_s=begin_s,
            end_s=end_s,
        )

    def _opening(self, context_ids: Sequence[int]) -> str:
        """The opening tag and the white space after it, if the context ends with one; else empty."""
        start, _ = self.thought_tags
        tail = self._decode(context_ids[-2 * len(start) :])
        return tail[tail.rindex(start) :] if tail.rstrip().endswith(start) else ""

    def _with_tags(self, token_ids: Sequence[int]) -> str:
        """A sampled reply as text, without special tokens other than the thought tags."""
        if self._tags.isdisjoint(token_ids):
            return self.reply_text(token_ids)
        return "".join(
            self._decode(list(run), skip_special_tokens=not kept)
            for kept, run in groupby(token_ids, key=self._tags.__contains__)
        )

    def ended(self, token_ids: Sequence[int]) -> bool:
        """Whether a sampled reply ends with an end-of-turn id. If not, it was cut."""
        return bool(token_ids) and token_ids[-1] in self.end_ids

    def sft_ids_and_mask(self, messages: Sequence[Message], *, context: int = 0) -> tuple[list[int], list[bool]]:
        """(ids [T], mask [T]) of a conversation; True on assistant content and its end-of-turn id.

        The first `context` messages are not trained. Ends at the last trained token. Raises ValueError if the template
        rewrites turns before a trained one, or if the ids of a trained turn do not decode to its content.
        """
        full = self._encode(self._render(messages, generation_prompt=False))
        mask = [False] * len(full)
        last = 0
        for i, message in enumerate(messages):
            if message.role != "assistant" or i < context:
                continue
            head = self.prompt_ids(messages[:i])
            if full[: len(head)] != head:
                raise ValueError(f"the chat template renders the first {i} turns differently inside a longer chat")
            try:
                end = full.index(self.end_id, len(head))
            except ValueError:
                raise ValueError(f"turn {i} is not closed by the end-of-turn token") from None
            # Both sides are decoded ids, so tokenizers that normalize text or have unknown words pass.
            content = self.reply_text(self._encode(self._control.marked(message.content, message.role))).strip()
            if not self.reply_text(full[len(head) : end]).strip().endswith(content):
                raise ValueError(f"the ids of turn {i} do not decode to its content")
            last = end + 1
            mask[len(head) : last] = [True] * (last - len(head))
        if not last:
            raise ValueError("the conversation has no assistant turn to train on")
        return full[:last], mask[:last]

    def check_growth(self, mode: InexactTemplate) -> str | None:
        """The difference between growing and rendering, if there is one. From now on grow() follows `mode`.

        Raises UserError for a difference with `refuse`. Without a difference every mode grows by ids.
        """
        difference = self.growth_difference()
        if difference is not None and mode == "refuse":
            raise UserError(
                f"the model's chat template does not extend a chat turn by turn as token ids: {difference}; set "
                "rollout.inexact_template to as_sampled (the policy keeps seeing its turns as it sampled them) or to "
                "rendered (after the trained reply it sees them as the template renders them), or use a template that "
                "only appends"
            )
        self._rendered = difference is not None and mode == "rendered"
        return difference

    def growth_difference(self) -> str | None:
        """The first difference between growing the probe chats by ids and tokenizing them whole; None if exact."""
        for probe in PROBES:
            for i, message in enumerate(probe):
                if message.role != "assistant":
                    continue
                grown = self.prompt_ids(probe[:i])
                closed = self._encode(self._closed(probe[: i + 1]))
                if closed[: len(grown)] != grown or self.end_id not in closed[len(grown) :]:
                    return self._describe_difference(grown, closed)
                sampled = closed[: closed.index(self.end_id, len(grown)) + 1]
                grown = sampled + self.turn_glue(probe[i + 1].content)
                whole = self.prompt_ids(probe[: i + 2])
                if grown != whole:
                    return self._describe_difference(grown, whole)
        return None

    def _closed(self, messages: Sequence[Message]) -> str:
        """The prompt and the last turn with its end, with verbatim content, as the policy would sample it."""
        text = self._render([*messages[:-1], Message("assistant", REPLY)], generation_prompt=False)
        return text.replace(REPLY, messages[-1].content)

    def _describe_difference(self, grown: Sequence[int], whole: Sequence[int]) -> str:
        """The first difference of two id sequences, in words."""
        at = next((i for i, pair in enumerate(zip(grown, whole, strict=False)) if pair[0] != pair[1]), len(grown))
        same_text = self._decode(whole).startswith(self._decode(grown))
        grown_text, text = (repr(self._decode(ids[max(at - 1, 0) : at + SHOWN_TOKENS])) for ids in (grown, whole))
        if same_text and at < len(grown):
            return f"words merge across the border of a turn in {text}"
        return f"the template rewrites earlier turns: {grown_text} when grown, {text} when rendered"

    @cached_property
    def _glue(self) -> tuple[str, Callable[[str], str], str] | None:
        """The glue before and after the user's text, and the template's change of the text; None: render each time."""
        head, found, tail = self._after_reply(USER).partition(USER)
        for rule in TEXT_RULES:
            marked = [(text, self._control.marked(text, "user")) for text in RULE_PROBES]
            if found and all(self._after_reply(text) == f"{head}{rule(safe)}{tail}" for text, safe in marked):
                return head, rule, tail
        return None

    def _after_reply(self, user_text: str | None = None) -> str:
        """The rendered text after an assistant turn's content: its end, the user turn and the generation prompt."""
        messages = [Message("user", "x"), Message("assistant", REPLY)]
        if user_text is not None:
            messages.append(Message("user", user_text))
        _, found, after = self._render(messages, generation_prompt=user_text is not None).partition(REPLY)
        if not found:
            raise UserError("the chat template does not render assistant turns: use a chat model's template")
        return after

    def _render(self, messages: Sequence[Message], *, generation_prompt: bool) -> str:
        marked = self._control.marked
        turns = [{"role": message.role, "content": marked(message.content, message.role)} for message in messages]
        try:
            text: str = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=generation_prompt
            )
        except Exception as error:
            roles = ", ".join(message.role for message in messages)
            raise UserError(f"the chat template fails on the roles {roles}: {error}; use another template") from error
        return text

    def _encode(self, text: str) -> list[int]:
        ids: list[int]
        if MARK in text:
            ids = self._control.encode(text)
        elif self._core is None:
            ids = self.tokenizer.encode(text, add_special_tokens=False)
        else:
            ids = self._core.encode(text, add_special_tokens=False).ids
        return ids

    def _decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        ids, text = list(token_ids), ""
        if self._core is None:
            text = self.tokenizer.decode(
                ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        else:
            text = self._core.decode(ids, skip_special_tokens=skip_special_tokens)
        return text
