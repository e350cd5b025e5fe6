"""Which examples form step k: a function of (seed, k) alone, on any number of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from cfs.data.formats import Example


@dataclass(frozen=True)
class Draw:
    """One example of a batch and the source it came from."""

    example: Example
    synthetic: bool
    """True for an all-token sample of the base model, False for a task example."""


@dataclass(frozen=True)
class Mixture:
    """Task examples and synthetic samples, shuffled together anew for each epoch.

    The N_S = r N_F samples of the corpus stand beside the N_F task examples, so a batch holds
    them in the ratio r : 1 on average (section 3, "1:1 mix").
    """

    task: list[Example]
    synthetic: list[Example]
    batch_size: int
    seed: int

    def __len__(self) -> int:
        return len(self.task) + len(self.synthetic)

    def batch(self, step: int) -> list[Draw]:
        """The `batch_size` examples of step `step`, counted from 0; epochs run into each other."""
        first = step * self.batch_size
        return [self._draw(position) for position in range(first, first + self.batch_size)]

    def _draw(self, position: int) -> Draw:
        epoch, offset = divmod(position, len(self))
        index = int(_permutation(self.seed, epoch, len(self))[offset])
        if index < len(self.task):
            return Draw(self.task[index], synthetic=False)
        return Draw(self.synthetic[index - len(self.task)], synthetic=True)


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_examples)
