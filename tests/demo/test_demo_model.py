"""The model folder loads like any other; its tokenizer is exact, so sampled ids reappear unchanged in prompts."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from collab_megatron.demo import desk, task_files
from collab_megatron.errors import UserError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from collab_megatron.demo.tiny_model import write_model

    output = tmp_path_factory.mktemp("model") / "desk"
    assert 1.2e6 < write_model(output, seed=1) < 1.4e6
    assert [path.name for path in output.parent.iterdir()] == ["desk"]
    with pytest.raises(UserError, match="exists already"):
        write_model(output, seed=1)
    return output


@pytest.fixture(scope="module")
def tokenizer(folder: Path):
    return transformers.AutoTokenizer.from_pretrained(folder)


def chats(count: int) -> list[list[dict[str, str]]]:
    rng = random.Random(21)
    out = []
    for i in range(count):
        task = desk.sample_task(rng, desk.SPLITS[i % 2])
        asked = task.missing or tuple(rng.sample(desk.INTENT_SLOTS[task.intent], 2))
        turns = [("user", task.opening), ("assistant", desk.question_text(asked))]
        turns += [("user", desk.render_answer(rng, task.slots, asked)), ("assistant", task.command)]
        turns += [("user", "that is not right [TERMINATE]"), ("system", task.request)]
        out.append([{"role": role, "content": content} for role, content in turns])
    return out


def test_every_text_of_the_world_round_trips_without_unknown_words(tokenizer):
    assert len(tokenizer) == 384
    for chat in chats(2000):
        for message in chat:
            ids = tokenizer.encode(message["content"], add_special_tokens=False)
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == message["content"]


def test_chat_ids_are_the_concatenation_of_the_pieces(tokenizer):
    for chat in chats(200):
        pieces: list[int] = []
        for message in chat[:3]:
            pieces.append(tokenizer.convert_tokens_to_ids(f"<|{message['role']}|>"))
            pieces += tokenizer.encode(message["content"], add_special_tokens=False)
            pieces.append(tokenizer.eos_token_id)
        pieces.append(tokenizer.convert_tokens_to_ids("<|assistant|>"))
        ids = tokenizer.apply_chat_template(chat[:3], add_generation_prompt=True, tokenize=True, return_dict=False)
        assert ids == pieces


def test_the_model_loads_and_ends_its_turn_on_the_end_token(folder, tokenizer):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.tie_word_embeddings
    assert model.config.vocab_size == 384
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    ids = torch.tensor([tokenizer.encode(chats(1)[0][0]["content"])])
    assert model(ids).logits.shape == (1, ids.shape[1], 384)


def test_the_seed_decides_the_weights(folder, tmp_path):
    from collab_megatron.demo.tiny_model import write_model

    write_model(tmp_path / "same", seed=1)
    write_model(tmp_path / "other", seed=2)
    weights = [(path / "model.safetensors").read_bytes() for path in (folder, tmp_path / "same", tmp_path / "other")]
    assert weights[0] == weights[1] != weights[2]


def test_task_files_hold_the_columns_of_both_formats(tmp_path):
    task_files.write_tasks(tmp_path, train=50, heldout=30, seed=1)
    train = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    heldout = [json.loads(line) for line in (tmp_path / "heldout.jsonl").read_text().splitlines()]
    assert (len(train), len(heldout)) == (50, 30)
    problem = {"single_turn_prompt", "single_turn_completion", "single_turn_metadata", "prompt"}
    assert set(train[0]) == problem
    assert set(heldout[0]) == problem | {"completion", "conv_id", "score", "turn_id", "sessions", "rewards"}
    assert len({row["conv_id"] for row in heldout}) == 30
    for row in [*train, *heldout]:
        intent, slots = desk.read_request(row["single_turn_prompt"])
        assert row["single_turn_completion"] == desk.command_text(intent, slots)
        assert desk.is_heldout(intent, slots) == (row in heldout)
        missing = list(desk.find_missing(row["prompt"][0]["content"], intent))
        meta = row["single_turn_metadata"]
        assert meta == {"ambiguous": bool(missing), "missing": missing, "intent": intent}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heldout.jsonl", "train.jsonl"]
    with pytest.raises(UserError, match="0 tasks cannot be drawn"):
        task_files.write_tasks(tmp_path, train=0, heldout=1, seed=1)
