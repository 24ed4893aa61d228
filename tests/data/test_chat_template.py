"""Token-in, token-out chats over tokenizers and templates of several kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from collab_megatron.data.chat import ChatTemplate, load_tokenizer
from collab_megatron.demo.tokenizer import build_tokenizer
from collab_megatron.errors import UserError
from collab_megatron.types import Message

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe good.<|im_end|>\n' }}{% endif %}" + CHATML
)
HEADERS = (
    "{{ '<s>' }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|sep|>\n\n' }}"
    "{{ m['content'] | trim + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|sep|>\n\n' }}{% endif %}"
)
INSTRUCT = (
    "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] + '</s>' }}"
    "{% else %}{{ '[INST]' + m['content'] + '[/INST]' }}{% endif %}{% endfor %}"
)
REWRITES = (  # earlier assistant turns lose a mark that the last one has
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ 'mark ' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_END = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{{ 'assistant: ' }}"
MERGES = "{% for m in messages %}{{ m['content'] + ('<|im_end|>' if m['role'] == 'user' else 'x') }}{% endfor %}"
SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|sep|>", "[INST]", "[/INST]"]

CHAT = [
    Message("system", "Answer well."),
    Message("user", "hello {there} $5"),
    Message("assistant", "Which day?\n\nAnd – when?"),
    Message("user", "monday ✓ 你好"),
    Message("assistant", "done"),
]


NEWLINES_TOGETHER = r"[^\r\n\w]?\w+| ?[^\s\w]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_tokenizer(template: str, eos: str = "<|im_end|>", words: str | None = None) -> Any:
    """A small byte-level BPE with real merges, so that words could merge across an edge."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if words is not None:
        cut = pre_tokenizers.Split(Regex(words), "isolated")
        core.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(
        [m.content for m in CHAT] * 3 + ["system user assistant \n\n hello which day"] * 5, trainer
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, additional_special_tokens=SPECIALS)
    tokenizer.chat_template = template
    return tokenizer


GOOD = {
    "chatml": byte_tokenizer(CHATML),
    "chatml with a default system turn": byte_tokenizer(CHATML_DEFAULT_SYSTEM),
    "headers, bos, trim": byte_tokenizer(HEADERS, words=NEWLINES_TOGETHER),
    "inst": byte_tokenizer(INSTRUCT, eos="</s>"),
    "demo": build_tokenizer(),
}


@pytest.fixture(params=GOOD, ids=list(GOOD))
def chat(request: pytest.FixtureRequest) -> ChatTemplate:
    return ChatTemplate(GOOD[request.param])


def test_the_template_is_exact(chat: ChatTemplate) -> None:
    chat.check_exact()
    assert chat.end_id in chat.end_ids


def test_growing_by_ids_equals_tokenising_whole(chat: ChatTemplate) -> None:
    reply = [*chat.tokenizer.encode(CHAT[2].content, add_special_tokens=False), chat.end_id]
    grown = chat.prompt_ids(CHAT[:2]) + reply + chat.turn_glue(CHAT[3].content)
    assert grown == chat.prompt_ids(CHAT[:4])
    assert chat.ended(reply)
    assert not chat.ended(reply[:-1])
    assert not chat.ended([])


def test_a_cut_reply_gets_its_end_from_the_glue(chat: ChatTemplate) -> None:
    whole, cut = chat.turn_glue("monday"), chat.turn_glue("monday", cut=True)
    assert cut == [chat.end_id, *whole]


def test_reply_text_leaves_special_tokens_out(chat: ChatTemplate) -> None:
    ids = chat.tokenizer.encode("which time?", add_special_tokens=False)
    assert chat.reply_text([*ids, chat.end_id]) == "which time?" == chat.reply_text(ids)


def test_loss_stands_on_assistant_turns_and_their_ends_only(chat: ChatTemplate) -> None:
    ids, mask = chat.sft_ids_and_mask(CHAT)
    assert len(ids) == len(mask)
    assert mask[-1]
    assert ids[-1] == chat.end_id
    runs: list[list[int]] = []
    for i, trained in enumerate(mask):
        if trained:
            if i == 0 or not mask[i - 1]:
                runs.append([])
            runs[-1].append(ids[i])
    expected = [CHAT[2].content, CHAT[4].content]
    assert [run[-1] for run in runs] == [chat.end_id] * 2
    decoded = [chat.tokenizer.decode(run[:-1]) for run in runs]
    if "<|unk|>" not in "".join(decoded):  # the demo's vocabulary is its world
        assert decoded == expected
    assert chat.prompt_ids(CHAT[:2]) == ids[: mask.index(True)]


def test_a_conversation_without_an_assistant_is_refused(chat: ChatTemplate) -> None:
    with pytest.raises(ValueError, match="no assistant turn"):
        chat.sft_ids_and_mask(CHAT[:2])


def test_a_template_that_rewrites_is_refused() -> None:
    chat = ChatTemplate(byte_tokenizer(REWRITES))
    with pytest.raises(UserError, match="rewrites earlier turns"):
        chat.check_exact()


def test_a_turn_that_holds_the_end_token_is_refused(chat: ChatTemplate) -> None:
    end = chat.tokenizer.decode([chat.end_id])
    with pytest.raises(ValueError, match="do not read as its content"):
        chat.sft_ids_and_mask([*CHAT[:2], Message("assistant", f"which{end}day")])


def test_words_that_merge_across_an_edge_are_refused() -> None:
    # These word rules read two line breaks before a letter as one and one: the prompt's last id depends on the reply.
    with pytest.raises(UserError, match="merge across"):
        ChatTemplate(byte_tokenizer(HEADERS)).check_exact()


@pytest.mark.parametrize("template", [NO_END, MERGES])
def test_a_template_without_an_end_token_is_refused(template: str) -> None:
    with pytest.raises(UserError, match="special token"):
        ChatTemplate(byte_tokenizer(template))


def test_a_template_that_refuses_roles_says_so() -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    with pytest.raises(UserError, match=r"refuses.*system"):
        ChatTemplate(byte_tokenizer(template)).prompt_ids(CHAT)


def test_loading(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    GOOD["chatml"].save_pretrained(folder)
    assert ChatTemplate(load_tokenizer(folder)).prompt_ids(CHAT) == ChatTemplate(GOOD["chatml"]).prompt_ids(CHAT)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(empty)
    (empty / "tokenizer.json").write_text("{ broken")
    with pytest.raises(UserError, match="no tokenizer could be loaded"):
        load_tokenizer(empty)
    bare = byte_tokenizer(CHATML)
    bare.chat_template = None
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="no chat template"):
        load_tokenizer(tmp_path / "bare")
