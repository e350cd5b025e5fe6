"""What samples continue: many prompts in one array of ids, so that their number costs little."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence

import numpy as np


class Prompts:
    """Prompts of which sample i continues number i mod their count, however many are drawn.

    A context-free corpus has one, the seed; a contextual one has those of the fine-tuning data.
    """

    def __init__(self, prompts: Iterable[Sequence[int]]) -> None:
        ids, ends = array("i"), array("q", [0])
        for prompt in prompts:
            assert len(prompt) > 0, "a prompt has its seed token at least"
            ids.extend(prompt)
            ends.append(len(ids))
        assert ids, "there is at least one prompt"
        self.ids = np.array(ids, dtype=np.int32)
        self.ends = np.array(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def of_sample(self, index: int) -> list[int]:
        """The prompt that sample `index` continues."""
        number = index % len(self)
        return self.ids[self.ends[number] : self.ends[number + 1]].tolist()

    @property
    def lengths(self) -> np.ndarray:
        """(len(self),) int64, tokens of each prompt."""
        return np.diff(self.ends)

    def fingerprint(self) -> str:
        """SHA-256 of all ids and of where each prompt ends."""
        digest = hashlib.sha256(self.ends.astype("<i8").tobytes())
        digest.update(self.ids.astype("<i4").tobytes())
        return digest.hexdigest()
