"""What samples continue, as token ids: a seed, or the prompts of the fine-tuning data."""

from __future__ import annotations

from pathlib import Path

from cfs.data.formats import read_records
from cfs.data.tokenizer import Tokenizer
from cfs.errors import UserError
from cfs.sample.prompts import Prompts

SEED_CHARACTERS = {"newline": "\n", "space": " "}
TOKENIZER_BATCH = 4096  # records; their texts and ids as Python objects are held this long


def seed_prompt(seed_text: str | None, tokenizer: Tokenizer) -> list[int]:
    """Ids of the seed. It takes the place of the seed token, as in the paper (section 3): its
    prompt is the BOS token, and those it tried beside it are the newline token and the space
    token.

    Newline and space are one token each, the last of their encoding: some tokenizers put a
    space before every text.
    """
    if seed_text in (None, "bos"):
        return [tokenizer.seed_id]
    ids = tokenizer.encode(SEED_CHARACTERS.get(seed_text, seed_text))
    if not ids:
        raise UserError(
            f"--seed-text {seed_text!r}: the tokenizer makes no token of it; give bos, newline, "
            "space or another text"
        )
    return ids[-1:] if seed_text in SEED_CHARACTERS else ids


def context_prompts(file: str, format_name: str | None, tokenizer: Tokenizer) -> Prompts:
    """The seed token and the prompt of every record, as training puts them before a response."""
    if not Path(file).is_file():
        raise UserError(f"--contexts {file}: no such file")
    texts = [prompt for prompt, _ in read_records(file, format_name)]
    if not any(texts):
        raise UserError(
            f"--contexts {file}: --format {format_name} has no prompts, only texts; leave "
            "--contexts out to draw context-free samples"
        )
    batches = (texts[i : i + TOKENIZER_BATCH] for i in range(0, len(texts), TOKENIZER_BATCH))
    return Prompts(
        [tokenizer.seed_id, *ids] for batch in batches for ids in tokenizer.encode_batch(batch)
    )
