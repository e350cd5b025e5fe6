"""Which examples form step k: a function of (seed, k) alone, on any number of ranks."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from cfs.data.formats import Example


@dataclass(frozen=True)
class Source:
    """Examples of one kind, and how many of them an epoch of the mixture draws."""

    name: str
    """What an example's number counts in: "train.jsonl row", "sample"."""
    examples: list[Example]
    synthetic: bool = False
    """True for what a method mixes in, such as samples of the base; False for task examples."""
    per_epoch: int | None = None
    """None for all of them, once each."""
    weights: np.ndarray | None = None
    """(len(examples),) float, what each counts in the loss; None for 1 each."""

    @property
    def num_draws(self) -> int:
        return len(self.examples) if self.per_epoch is None else self.per_epoch


@dataclass(frozen=True)
class Draw:
    """One example of a batch and the source it came from."""

    example: Example
    synthetic: bool
    """True for what a method mixes in, False for a task example."""
    source: str = "example"
    weight: float = 1.0
    """What each of its targets counts in the loss, times its source's weight."""

    @property
    def id(self) -> str:
        """What a person finds the example by."""
        return f"{self.source} {self.example.number}"


@dataclass(frozen=True)
class Mixture:
    """Sources shuffled together anew for each epoch.

    The N_S = r N_F samples of a corpus stand beside the N_F task examples, so a batch holds
    them in the ratio r : 1 on average (section 3, "1:1 mix"). A source with a `per_epoch` of its
    own is walked through in shuffled passes that run on from one epoch to the next.
    """

    sources: list[Source]
    batch_size: int
    seed: int

    def __len__(self) -> int:
        """Draws of one epoch."""
        return sum(source.num_draws for source in self.sources)

    def batch(self, step: int) -> list[Draw]:
        """The `batch_size` examples of step `step`, counted from 0; epochs run into each other."""
        first = step * self.batch_size
        return [self._draw(position) for position in range(first, first + self.batch_size)]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what decides every batch: the examples, their targets, shares and the seed.

        Not of weights: they are measured, and on another machine differ in their last digits.
        """
        digest = hashlib.sha256(f"{self.batch_size} {self.seed}".encode())
        for source in self.sources:
            digest.update(f"{source.num_draws} {source.synthetic} {len(source.examples)}".encode())
            for example in source.examples:
                digest.update(len(example.input_ids).to_bytes(8, "little"))
                digest.update(np.ascontiguousarray(example.input_ids, dtype="<i8").tobytes())
                digest.update(np.packbits(example.target_mask).tobytes())
        return digest.hexdigest()

    def _draw(self, position: int) -> Draw:
        epoch, offset = divmod(position, len(self))
        slot = int(_permutation((self.seed, epoch), len(self))[offset])
        for number, source in enumerate(self.sources):
            if slot < source.num_draws:
                place = self._place(number, source, epoch, slot)
                weight = 1.0 if source.weights is None else float(source.weights[place])
                return Draw(source.examples[place], source.synthetic, source.name, weight)
            slot -= source.num_draws
        raise AssertionError("a slot lies in one of the sources")

    def _place(self, number: int, source: Source, epoch: int, slot: int) -> int:
        """Which example the source's draw `slot` of an epoch is."""
        if source.num_draws == len(source.examples):
            return slot
        earlier_passes, offset = divmod(epoch * source.num_draws + slot, len(source.examples))
        shuffled = _permutation(
            # The last number keeps it apart from an epoch's: NumPy pads a seed with zeros.
            (self.seed, number, earlier_passes, 1),
            len(source.examples),
        )
        return int(shuffled[offset])


@lru_cache(maxsize=16)
def _permutation(key: tuple[int, ...], num_examples: int) -> np.ndarray:
    return np.random.default_rng(list(key)).permutation(num_examples)
