"""SSR: rehearsal of instances that the model writes itself, shown a few of the old tasks.

Huang et al. 2024 (arXiv 2403.01244), step by step, and what is different here:

1. The base model continues a context of two demonstrations, drawn from about 1 % of the old tasks'
   data, with an instance of its own (temperature 0.9, top-p 0.6). Here a demonstration ends with
   end-of-text, as documents do in pretraining; and no repetition penalty is applied (theirs: 1.2).
2. The latest model answers the inputs of these instances greedily. There it has been trained on the
   old tasks one after the other; one pretrained model is both, so here theta* answers.
3. Inputs are clustered (k-means, 20 clusters, on embeddings) and those nearest to the centroids are
   kept. Theirs are a sentence encoder's; here the mean of theta*'s own last hidden states.
4. The instances stand beside the task's examples, with the loss on the answers.

It needs demonstrations, so unlike `cfs` it is not data-oblivious, and it rehearses conditional
behaviour alone.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from cfs.baselines.method import Method, Mix
from cfs.cli import option

DEMONSTRATIONS = 2
"""In a context, as theirs."""
CLUSTERS = 20
OVERSAMPLING = 2
"""Instances drawn for each that is kept: some have no input, come twice, or lie far out."""
INSTANCE_TOKENS = 64
"""Tokens that an instance may take; theirs: 2,048."""


def contexts(
    demonstrations: list[list[int]], seed_id: int, eos_id: int, count: int, seed: int
) -> Iterator[list[int]]:
    """`count` contexts of token ids: the seed token, then different demonstrations, each ended.

    demonstrations  token ids of each, prompt and response
    """
    rng = random.Random(f"ssr {seed}")
    for _ in range(count):
        shown = rng.sample(demonstrations, min(DEMONSTRATIONS, len(demonstrations)))
        yield [seed_id, *(token for ids in shown for token in [*ids, eos_id])]


def closing_words(prompts: list[str]) -> set[str]:
    """The words that the demonstrations' prompts end with, such as "Answer:" or "="."""
    return {prompt.split()[-1] for prompt in prompts if prompt.split()}


def instance_input(text: str, closing: set[str]) -> str | None:
    """The input of an instance: its text up to the first word that ends some prompt.

    None where no such word comes, or nothing before it: the instance is left out.
    """
    for word in re.finditer(r"\S+", text):
        if word[0] in closing:
            return text[: word.end()] if text[: word.start()].strip() else None
    return None


@dataclass
class SSR(Method):
    """Self-synthesized rehearsal, adapted to one pretrained model."""

    name = "ssr"
    summary = (
        "adds loss on instances that the base writes and answers, shown a few of the old tasks"
    )
    source = "Huang et al. 2024, arXiv 2403.01244"
    mix: ClassVar[Mix | None] = Mix("rehearsal", "instance", temperature=0.9, top_p=0.6)
    demos: str | None = option(
        None, "demonstrations of the old tasks; default: 70 of TinyWorld's skills"
    )
    demos_format: str = option("prompt-response", "of --demos")
