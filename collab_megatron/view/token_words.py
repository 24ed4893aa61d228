"""The text of token ids, for the strip of log-probs: the record holds ids only."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer

from collab_megatron.errors import UserError

TOKENIZER = "tokenizer.json"
BROKEN = "\ufffd"  # a token that is part of a character


def find_tokenizer(run: Path) -> Path | None:
    """The tokenizer.json of the run's newest checkpoint; None if it has none."""
    found = sorted(run.glob(f"checkpoints/*/step_*/hf/{TOKENIZER}"), key=lambda path: path.parent.parent.name)
    return found[-1] if found else None


def token_words(path: Path, ids: Iterable[int]) -> dict[int, str]:
    """The text of each id; ids that the tokenizer does not know are left out. `path`: a tokenizer.json or its folder.

    Raises UserError if there is no tokenizer."""
    file = path / TOKENIZER if path.is_dir() else path
    try:
        tokenizer = Tokenizer.from_str(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--tokenizer {path} cannot be read ({reason}): name a {TOKENIZER} or its folder") from None
    except Exception as error:  # noqa: BLE001  (tokenizers raises plain Exception for a file that it cannot parse)
        raise UserError(f"{file} is no tokenizer ({error}): name a {TOKENIZER} or its folder") from None
    words = {}
    for token in sorted(ids):
        name = tokenizer.id_to_token(token) if 0 <= token < 2**32 else None
        if name is not None:
            said = tokenizer.decode([token], skip_special_tokens=False)
            words[token] = name if not said or BROKEN in said else said
    return words
