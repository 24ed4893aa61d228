"""The demo model's word-level tokenizer and chat template.

A token is a word with the space before it, so decoding is plain joining and `decode(encode(text)) == text` for every
text of the demo. A chat turn is one role token, the content and one end token. Role tokens split the text before words
do, so the ids of a chat are the concatenated ids of its pieces, and sampled ids reappear unchanged in later prompts.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from collab_megatron.demo import desk
from collab_megatron.types import TERMINATION_SIGNAL

VOCAB_SIZE = 384
TEXT_VOCAB_SIZE = 1024  # of a tokenizer that is trained on texts
PAD, UNK, END = "<|pad|>", "<|unk|>", "<|end|>"
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>")
WORD_PATTERN = r" ?[A-Za-z0-9]+| ?[^\sA-Za-z0-9]"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)
SAMPLED_TASKS = 6000


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, the same on every call. AssertionError if the demo's words do not fit into VOCAB_SIZE."""
    words = {word for text in demo_texts() for word in re.findall(WORD_PATTERN, text)}
    tokens = [PAD, UNK, END, *ROLE_TOKENS, *sorted(words)]
    assert len(tokens) <= VOCAB_SIZE, f"{len(tokens)} words do not fit into a vocabulary of {VOCAB_SIZE}"
    tokens += [f"<|spare{i}|>" for i in range(len(tokens), VOCAB_SIZE)]
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens([PAD, UNK, END, *ROLE_TOKENS])
    return _chat_tokenizer(core)


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `texts` with the same chat template: any text decodes to itself."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TEXT_VOCAB_SIZE,
        special_tokens=[PAD, UNK, END, *ROLE_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return _chat_tokenizer(core)


def _chat_tokenizer(core: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        unk_token=UNK,
        eos_token=END,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def demo_texts() -> Iterator[str]:
    """Texts with each word of the demo in all its positions; seeded, so the vocabulary never changes."""
    rng = random.Random(0)
    yield from (f"that is right {TERMINATION_SIGNAL}", f"that is not right {TERMINATION_SIGNAL}")
    yield from (f"never mind {TERMINATION_SIGNAL}", "i do not follow", "what do you mean")
    yield from (f"ok {TERMINATION_SIGNAL}", f"wrong {TERMINATION_SIGNAL}")
    for values in desk.SLOT_VALUES.values():
        for value in values:
            yield from (f"it is {value}", value, desk.render_correction(value))
    for slot in desk.SLOT_VALUES:
        yield desk.question_text([slot])
    for _ in range(SAMPLED_TASKS):
        task = desk.sample_task(rng, "train")
        yield from (task.opening, task.request, task.command)
        asked = task.missing or desk.INTENT_SLOTS[task.intent]
        yield desk.question_text(asked)
        yield desk.render_answer(rng, task.slots, asked)
