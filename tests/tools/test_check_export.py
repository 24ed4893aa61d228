"""tools/check_export.py: ties pass, in bf16 too; a tampered export does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from collab_megatron.demo.tiny_model import write_model
from collab_megatron.errors import RunError, UserError
from tools.check_export import TOLERANCES, Tolerance, check, compare

DTYPES = ("float32", "bfloat16")
PROMPTS = [[30 + i, 41, 52, 63 + i, 74] for i in range(4)]
NEW_TOKENS = 16


def load(folder: Path, dtype: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


def export(folder: Path, dtype: str) -> Path:
    write_model(folder / "demo", seed=1)
    load(folder / "demo", dtype).save_pretrained(folder / "hf")
    return folder / "hf"


def engine_probe(hf: Path, dtype: str, file: Path) -> Path:
    """As an engine would answer: token by token with a key-value cache, so that sums are in another order."""
    model = load(hf, dtype)
    rows = []
    for prompt in PROMPTS:
        ids: list[int] = []
        logprobs = []
        given, cache = torch.tensor([prompt]), None
        for _ in range(NEW_TOKENS):
            with torch.no_grad():
                out = model(given, past_key_values=cache, use_cache=True)
            scores = torch.log_softmax(out.logits[0, -1].float(), -1)
            top = scores.topk(2)
            # where two tokens are tied the engine is as free to take the other one
            tied = float(top.values[0] - top.values[1]) <= TOLERANCES[dtype].tie / 2
            ids.append(int(top.indices[1 if tied else 0]))
            logprobs.append(float(scores[ids[-1]]))
            given, cache = torch.tensor([[ids[-1]]]), out.past_key_values
        rows.append({"input_ids": prompt, "output_ids": ids, "logprobs": logprobs})
    file.write_text(json.dumps({"dtype": dtype, "rows": rows}))
    return file


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_weights_agree_and_one_changed_weight_does_not(dtype: str, tmp_path: Path) -> None:
    hf = export(tmp_path, dtype)
    probe = engine_probe(hf, dtype, tmp_path / "probe.json")
    agreed = check(hf, probe)
    assert (agreed.prompts, agreed.tokens) == (len(PROMPTS), len(PROMPTS) * NEW_TOKENS)
    if dtype == "bfloat16":
        assert agreed.ties > 0  # generating would have drifted off at the first of them

    model = load(hf, dtype)
    with torch.no_grad():
        model.model.norm.weight[7] += 8.0
    model.save_pretrained(tmp_path / "tampered")
    with pytest.raises(RunError, match=r"the export('s log-probs of| differs from the engine in) prompt"):
        check(tmp_path / "tampered", probe)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_changed_matrix_is_found_out(dtype: str, tmp_path: Path) -> None:
    hf = export(tmp_path, dtype)
    probe = engine_probe(hf, dtype, tmp_path / "probe.json")
    model = load(hf, dtype)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "tampered")
    with pytest.raises(RunError, match=r"the export('s log-probs of| differs from the engine in) prompt"):
        check(tmp_path / "tampered", probe)


def test_a_tie_is_a_tie_only_within_the_tolerance_and_excuses_nothing_after_it() -> None:
    logits = torch.tensor([[2.0, 1.8, 0.0], [0.0, 0.0, 9.0]])
    scores = torch.log_softmax(logits, -1)

    def row(*ids: int) -> dict[str, Any]:
        return {"output_ids": list(ids), "logprobs": [float(scores[t, token]) for t, token in enumerate(ids)]}

    bf16, fp32 = TOLERANCES["bfloat16"], TOLERANCES["float32"]
    ties, gap = compare(0, logits, row(1, 2), bf16)
    assert ties == 1
    assert gap == pytest.approx(0, abs=1e-6)
    with pytest.raises(RunError, match=r"at token 0: 0 instead of 1, which is 0\.2 nats less likely"):
        compare(0, logits, row(1, 2), fp32)
    with pytest.raises(RunError, match="prompt 3 at token 1"):
        compare(3, logits, row(1, 0), bf16)
    far = {"output_ids": [0, 2], "logprobs": [float(scores[0, 0]) - 1.0, 0.0]}
    with pytest.raises(RunError, match=r"differ from the engine's by 0\.5 nats"):
        compare(0, logits, far, bf16)
    with pytest.raises(RunError):
        compare(0, logits * float("nan"), row(0, 2), Tolerance(9, 9))


def test_probes_that_prove_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train_rl writes it"):
        check(tmp_path, tmp_path / "none.json")
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"rows": [{"input_ids": [1], "output_ids": [2]}]}))
    with pytest.raises(UserError, match="no log-probs"):
        check(tmp_path, old)
