"""SSR: rehearsal of instances that the model writes itself, shown a few of the old tasks.

Huang et al. 2024 (arXiv 2403.01244), step by step, and what is different here:

1. The base model continues a context of two demonstrations, drawn from about 1 % of the old tasks'
   data, with an instance of its own (temperature 0.9, top-p 0.6). Here a demonstration ends with
   end-of-text, as documents do in pretraining; and no repetition penalty is applied (theirs: 1.2).
   The input of an instance ends as the demonstrations' prompts do; without that ending it is none.
2. The latest model answers the inputs of these instances greedily. There it has been trained on the
   old tasks one after the other; one pretrained model is both, so here theta* answers.
3. Inputs are clustered (k-means, 20 clusters, on embeddings) and those nearest to the centroids are
   kept. Theirs are a sentence encoder's; here the mean of theta*'s own last hidden states.
4. The instances stand beside the task's examples, with the loss on the answers.

It needs demonstrations, so unlike `cfs` it is not data-oblivious, and it rehearses conditional
behaviour alone.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from cfs.baselines.method import Method, Mix
from cfs.cli import option
from cfs.errors import UserError

DEMONSTRATIONS = 2
"""In a context, as theirs."""
CLUSTERS = 20
OVERSAMPLING = 2
"""Instances drawn for each that is kept: some have no input, come twice, or lie far out."""


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


def endings(prompts: list[str]) -> set[str]:
    """How the demonstrations' prompts end: what tells an input from its answer.

    The longest text that all of them end with, such as ", Answer :"; where they share none, that
    of all the prompts with one last word, such as " =" and " next". Never all of a prompt; never
    begun within a word or a number, of which two prompts share the last letters by chance. Empty
    prompts, as those of raw text, count for nothing.

    Raises `UserError` where no two prompts end alike.
    """
    distinct = sorted({prompt for prompt in prompts if prompt.strip()})
    ending = _common_ending(distinct)
    if ending is not None:
        return {ending}
    groups: dict[str, list[str]] = {}
    for prompt in distinct:
        # With the space after it: "Answer:" and "Answer: " share no ending.
        last_word = re.search(r"\S+\s*\Z", prompt)
        assert last_word is not None, "the prompt is not empty"
        groups.setdefault(last_word[0], []).append(prompt)
    found = {ending for group in groups.values() if (ending := _common_ending(group)) is not None}
    if not found:
        raise UserError(
            "--demos: its prompts end in nothing common, so no input can be told from an answer; "
            'give prompts that end alike, such as "Answer:"'
        )
    return found


def _common_ending(prompts: list[str]) -> str | None:
    """The longest suffix of two or more prompts, from a word's beginning; `None` for none."""
    if len(prompts) < 2:
        return None
    from_the_end = zip(*(prompt[::-1] for prompt in prompts), strict=False)
    num_shared = sum(1 for _ in itertools.takewhile(lambda c: len(set(c)) == 1, from_the_end))
    suffix = prompts[0][len(prompts[0]) - num_shared :]
    if any(re.search(r"\w\Z", prompt.removesuffix(suffix)) for prompt in prompts):
        suffix = re.sub(r"^\w+", "", suffix)
    return suffix if suffix.strip() and suffix not in prompts else None


def instance_input(text: str, endings: set[str]) -> str | None:
    """The input of an instance: its text up to and with the first ending that follows anything.

    An ending that is part of a longer word or of a number such as 3.14 is none. Of two at one
    place the longer one counts. None where there is none: the instance is left out.
    """
    patterns = map(_ending_pattern, sorted(endings, key=len, reverse=True))
    first = len(text) - len(text.lstrip())
    found = re.compile("|".join(patterns)).search(text, first + 1) if endings else None
    return None if found is None else text[: found.end()]


def _ending_pattern(ending: str) -> str:
    begins = r"\b" if re.match(r"\w", ending) else ""
    stops = r"\b" if re.search(r"\w\Z", ending) else r"(?!(?<=\d[.,:])\d)"
    return begins + re.escape(ending) + stops


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
