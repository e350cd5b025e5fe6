"""A `tokenizer.json` and the two tokens that bound a text."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import tokenizers

from cfs.errors import UserError


class Tokenizer:
    """Text to ids without any special token added, and back.

    seed_id     starts every sequence: BOS, or end-of-text where the family has no BOS (OLMo)
    eos_id      ends every sequence; may equal `seed_id`
    num_tokens  ids below it are real; a model's vocabulary may be padded beyond it
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        file = self.directory / "tokenizer.json"
        if not file.is_file():
            raise UserError(f"{file}: not there; a model directory needs its tokenizer.json")
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the Rust side raises plain Exception
            raise UserError(f"{file}: not a tokenizers file ({error})") from error
        # A file may carry the settings of whoever saved it; they would cut and pad our texts.
        self.backend.no_truncation()
        self.backend.no_padding()
        self.num_tokens = max(self.backend.get_vocab(with_added_tokens=True).values()) + 1
        vocab_size = _read_json(self.directory / "config.json").get("vocab_size", self.num_tokens)
        if self.num_tokens > vocab_size:
            raise UserError(
                f"{file}: has {self.num_tokens} tokens, config.json a vocab_size of {vocab_size}; "
                "the tokenizer belongs to another model"
            )
        eos_id = self._special("eos")
        if eos_id is None:
            raise UserError(
                f"{self.directory}: no end-of-text token; name eos_token in tokenizer_config.json "
                "or eos_token_id in config.json"
            )
        bos_id = self._special("bos")
        self.eos_id = eos_id
        self.seed_id = eos_id if bos_id is None else bos_id

    def _special(self, kind: str) -> int | None:
        """Id of the BOS or EOS token: by name in tokenizer_config.json, else by id in the others.

        Where generation_config.json lists several end-of-text ids, the first counts.
        """
        token = _read_json(self.directory / "tokenizer_config.json").get(f"{kind}_token")
        if isinstance(token, dict):  # serialised AddedToken
            token = token.get("content")
        if token is not None:
            token_id = self.backend.token_to_id(token)
            if token_id is None:
                raise UserError(
                    f"{self.directory}/tokenizer_config.json: {kind}_token {token!r} is not in "
                    "tokenizer.json"
                )
            return token_id
        for file in ("config.json", "generation_config.json"):
            token_id = _read_json(self.directory / file).get(f"{kind}_token_id")
            if isinstance(token_id, list):
                token_id = token_id[0] if token_id else None
            if token_id is not None:
                if not 0 <= token_id < self.num_tokens:
                    raise UserError(
                        f"{self.directory}/{file}: {kind}_token_id {token_id} is not in "
                        f"tokenizer.json, which ends at {self.num_tokens - 1}"
                    )
                return token_id
        return None

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone; special tokens written out in the text are recognised."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text, in parallel."""
        return [e.ids for e in self.backend.encode_batch(texts, add_special_tokens=False)]

    def encode_continuations(
        self, prompts: list[str], continuations: list[str]
    ) -> list[tuple[list[int], list[int]]]:
        """Ids of each prompt, and of its continuation as it stands after the prompt.

        The whole is encoded where that leaves the prompt's ids as they are: a tokenizer that
        puts a space before every text would put one more into a continuation encoded alone.
        Where the whole merges tokens across the boundary, the two are encoded apart.
        """
        wholes = self.encode_batch([p + c for p, c in zip(prompts, continuations, strict=True)])
        heads = self.encode_batch(prompts)
        return [
            (head, whole[len(head) :] if whole[: len(head)] == head else self.encode(continuation))
            for head, continuation, whole in zip(heads, continuations, wholes, strict=True)
        ]

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, without special tokens."""
        return self.backend.decode(ids, skip_special_tokens=True)

    def fingerprint(self) -> str:
        """SHA-256 of tokenizer.json and the two special ids."""
        digest = hashlib.sha256((self.directory / "tokenizer.json").read_bytes())
        digest.update(f"{self.seed_id} {self.eos_id}".encode())
        return digest.hexdigest()


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error})") from error
