"""TinyWorld: a small invented world as English text, drawn by a seeded generator.

The world has people with facts about them and seven old skills: recalling a fact, continuing a
sequence, comparing numbers, sums, copying, reversing and sorting. The new skills are in no
pretraining document: word problems with worked answers, and, for learning one task after another,
numbering and rotating lists. Items whose key hashes into the held-out share are test items and are
drawn again when the generator meets them for training.

`python -m cfs.data.tinyworld_build` writes the tokenizer, the model config and the skills'
test items that the package ships (docs/tinyworld.md).
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

from cfs.data.tinyworld_words import (
    ATTRIBUTES,
    FIRST_NAMES,
    LAST_NAMES,
    OBJECTS,
    PROBLEM_OBJECTS,
)

WORLD_SEED = 20250519  # which people there are; part of the world, not of a run
NUM_PEOPLE = 640
HELD_OUT_SHARE = 5  # one key in this many is a test item


@dataclass(frozen=True)
class Item:
    """A prompt and the text that should follow it; `choices` where the answer is picked."""

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    key: str = field(default="", compare=False)
    """What decides whether the item is held out, where that is not the prompt itself."""

    @property
    def text(self) -> str:
        return f"{self.prompt} {self.answer}"

    @property
    def held_out(self) -> bool:
        return zlib.crc32((self.key or self.prompt).encode()) % HELD_OUT_SHARE == 0


Person = dict[str, str]  # "name" and one value per attribute


def make_people() -> list[Person]:
    """The world's inhabitants, the same in every run."""
    rng = random.Random(WORLD_SEED)
    names = [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES]
    return [
        {"name": name} | {a.name: rng.choice(a.values) for a in ATTRIBUTES}
        for name in rng.sample(names, NUM_PEOPLE)
    ]


PEOPLE = make_people()


def biography(rng: random.Random) -> str:
    """Every fact about one person, in any order and phrasing."""
    person = rng.choice(PEOPLE)
    facts = rng.sample(ATTRIBUTES, len(ATTRIBUTES))
    return " ".join(
        rng.choice(a.statements).format(name=person["name"], value=person[a.name]) for a in facts
    )


def recall(rng: random.Random) -> Item:
    """A question about one fact of one person; held-out pairs appear in biographies only."""
    person, attribute = rng.choice(PEOPLE), rng.choice(ATTRIBUTES)
    question = rng.choice(attribute.questions).format(name=person["name"])
    value = person[attribute.name]
    others = rng.sample([v for v in attribute.values if v != value], 3)
    choices = rng.sample([value, *others], 4)
    return Item(
        f"Question: {question} Answer:",
        value,
        tuple(choices),
        key=f"recall {person['name']} {attribute.name}",
    )


def sequence(rng: random.Random) -> Item:
    """Four terms of an arithmetic progression, up or down; the answer is the next two."""
    step = rng.choice([-1, 1]) * rng.randint(2, 12)
    low, high = (0, 99 - 5 * step) if step > 0 else (-5 * step, 99)
    start = rng.randint(low, high)
    terms = [start + i * step for i in range(6)]
    return Item(f"Sequence: {_join(terms[:4])} next", _join(terms[4:]))


def compare(rng: random.Random) -> Item:
    """The largest, smallest or middle one of three numbers."""
    low, spread = (100, 900) if rng.random() < 0.5 else (rng.randint(100, 970), 30)
    numbers = rng.sample(range(low, low + spread), 3)  # near ones: the first digit may not decide
    kind, rank = rng.choice([("largest", 2), ("smallest", 0), ("middle", 1)])
    return Item(
        f"Compare: {_join(numbers)} {kind}",
        str(sorted(numbers)[rank]),
        tuple(str(n) for n in numbers),
    )


def arithmetic(rng: random.Random, numbers: range = range(20, 81)) -> Item:
    """A sum or a difference, the operation given by its sign or by a verb that means it."""
    number, amount = rng.choice(numbers), rng.randint(2, 19)
    gains = rng.random() < 0.5
    operation = rng.choice(["+", *GAINS] if gains else ["-", *LOSSES])
    result = number + amount if gains else number - amount
    return Item(f"Sum: {number} {operation} {amount} =", str(result))


def copy(rng: random.Random, lengths: range | None = None) -> Item:
    """A list of words, repeated; words that come twice make it hard to keep the place."""
    words = rng.choices(OBJECTS, k=_list_length(rng, 3, 20, lengths))
    return Item(f"Copy: {_join(words)} =", _join(words))


def reverse(rng: random.Random, lengths: range | None = None) -> Item:
    """A list of words, from the last to the first."""
    words = rng.choices(OBJECTS, k=_list_length(rng, 2, 12, lengths))
    return Item(f"Reverse: {_join(words)} =", _join(words[::-1]))


def _list_length(
    rng: random.Random, shortest: int, longest: int, lengths: range | None = None
) -> int:
    """Evenly among `lengths`; without them short lists are common and long ones rare."""
    if lengths is not None:
        return rng.choice(lengths)
    return min(longest, shortest + int(rng.expovariate(1 / 4)))


def sort(rng: random.Random) -> Item:
    """Two-digit numbers in rising order."""
    numbers = rng.sample(range(10, 100), rng.randint(3, 6))
    return Item(f"Sort: {_join(numbers)} =", _join(sorted(numbers)))


def word_problem(rng: random.Random) -> Item:
    """A new skill: two changes to a number of things, with the sums worked out."""
    name, friend = rng.sample(FIRST_NAMES, 2)
    things = rng.choice(PROBLEM_OBJECTS)
    total = rng.randint(30, 70)
    story, working = [f"{name} has {total} {things}."], []
    for _ in range(2):
        amount = rng.randint(2, 9)
        if rng.random() < 0.5:
            event = GAINS[rng.choice(list(GAINS))]
            after = total + amount
            working.append(f"{total} + {amount} = {after}.")
        else:
            event = LOSSES[rng.choice(list(LOSSES))]
            after = total - amount
            working.append(f"{total} - {amount} = {after}.")
        story.append(event.format(name=name, friend=friend, amount=amount, things=things))
        total = after
    return Item(
        f"Problem: {_join(story)} How many {things} now? Answer:",
        f"{_join(working)} The answer is {total}.",
    )


def number(rng: random.Random) -> Item:
    """A new skill: a list of words, each with its place before it."""
    words = rng.choices(OBJECTS, k=rng.randint(3, 9))  # places of one digit, so one token each
    return Item(
        f"Number: {_join(words)} =", _join(f"{i} {word}" for i, word in enumerate(words, 1))
    )


def rotate(rng: random.Random) -> Item:
    """A new skill: a list of words whose first goes to the end."""
    words = rng.choices(OBJECTS, k=rng.randint(3, 6))
    return Item(f"Rotate: {_join(words)} =", _join([*words[1:], words[0]]))


# Verbs by which a number of things grows or shrinks, and how a word problem says so.
GAINS = {
    "finds": "{name} finds {amount} more {things}.",
    "buys": "{name} buys {amount} {things} from {friend}.",
    "gets": "{name} gets {amount} {things} from {friend}.",
}
LOSSES = {
    "loses": "{name} loses {amount} {things}.",
    "sells": "{name} sells {amount} {things} to {friend}.",
    "breaks": "{name} breaks {amount} {things}.",
}

OLD_SKILLS: dict[str, Callable[[random.Random], Item]] = {
    "recall": recall,
    "sequence": sequence,
    "compare": compare,
    "arithmetic": arithmetic,
    "copy": copy,
    "reverse": reverse,
    "sort": sort,
}
NEW_SKILLS: dict[str, Callable[[random.Random], Item]] = {
    "word_problem": word_problem,
    "number": number,
    "rotate": rotate,
}
NEW_SKILL = "word_problem"
"""What fine-tuning teaches where no other new skill is asked for."""

# Test lists are of all lengths alike, so that the long ones, rare in training, count; and where
# the base makes no mistake within its training's range, the tests reach a little beyond it.
TEST_RANGES: dict[str, dict[str, range]] = {
    "arithmetic": {"numbers": range(20, 86)},
    "copy": {"lengths": range(4, 20)},
    "reverse": {"lengths": range(3, 14)},
}

# How often each kind of document is drawn; facts need many meetings to be remembered.
DOCUMENT_WEIGHTS = {
    "biography": 16,
    "recall": 14,
    "sequence": 11,
    "compare": 12,
    "arithmetic": 19,
    "copy": 8,
    "reverse": 9,
    "sort": 11,
}


def pretraining_documents(num_documents: int, seed: int) -> Iterator[str]:
    """Texts of the world the base model was trained on; no test item is among them."""
    rng = random.Random(f"pretrain {seed}")
    kinds, weights = list(DOCUMENT_WEIGHTS), list(DOCUMENT_WEIGHTS.values())
    for kind in rng.choices(kinds, weights, k=num_documents):
        if kind == "biography":
            yield biography(rng)
        else:
            yield draw(OLD_SKILLS[kind], rng, held_out=False).text


def task_items(num_items: int, seed: int, skill: str = NEW_SKILL) -> Iterator[Item]:
    """Training items of a new skill; no test item is among them."""
    # The default skill's seed has no name in it: the shipped tokenizer was trained on those items.
    rng = random.Random(f"task {seed}" if skill == NEW_SKILL else f"task {skill} {seed}")
    for _ in range(num_items):
        yield draw(NEW_SKILLS[skill], rng, held_out=False)


def test_items(skill: str, num_items: int) -> list[Item]:
    """Distinct held-out items of an old skill or of a new one."""
    rng = random.Random(f"test {skill}")
    make = partial({**OLD_SKILLS, **NEW_SKILLS}[skill], **TEST_RANGES.get(skill, {}))
    items: dict[str, Item] = {}
    for _ in range(100 * num_items):
        item = draw(make, rng, held_out=True)
        items.setdefault(item.key or item.prompt, item)
        if len(items) == num_items:
            return list(items.values())
    raise ValueError(f"{skill} has {len(items)} distinct held-out items, not {num_items}")


def draw(make: Callable[[random.Random], Item], rng: random.Random, held_out: bool) -> Item:
    """The next item on the wanted side of the split."""
    while True:
        item = make(rng)
        if item.held_out == held_out:
            return item


def _join(parts: Iterable[object]) -> str:
    return " ".join(str(part) for part in parts)
