"""The words TinyWorld is made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Attribute:
    """One kind of fact: its values, and the ways to state it and to ask for it."""

    name: str
    values: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]


FIRST_NAMES = tuple(
    (
        "Ada Bram Cleo Dora Elin Finn Greta Hugo Iris Jonas Kira Leo Mara Nils Olga "
        "Pavel Quinn Rosa Sven Tilda Ugo Vera Wim Xenia Yara Zeno Anton Berta Carl "
        "Dina"
    ).split()
)
LAST_NAMES = tuple(
    (
        "Alder Birch Crane Dale Elm Frost Grove Heath Ivy Juniper Knoll Larch Marsh "
        "North Oak Pine Quill Reed Stone Thorn Umber Vale Wren Yarrow"
    ).split()
)

ATTRIBUTES = (
    Attribute(
        "town",
        tuple(
            (
                "Tolby Marne Askov Pelle Runa Drift Holm Sarn Vesper Lund Orrin Brack Tarn "
                "Ember Quay Fallow Gorse Inver Kelp Mossley Norrin Pike Selwyn Ulver"
            ).split()
        ),
        ("{name} lives in {value}.", "{value} is the home of {name}."),
        ("Where does {name} live?", "Which town is the home of {name}?"),
    ),
    Attribute(
        "job",
        tuple(
            (
                "baker miller tailor painter sailor farmer doctor teacher smith weaver hunter "
                "potter clerk judge driver singer mason cook nurse guard tanner cooper fisher "
                "printer"
            ).split()
        ),
        ("{name} works as a {value}.", "The job of {name} is {value}."),
        ("What is the job of {name}?", "What does {name} work as?"),
    ),
    Attribute(
        "pet",
        tuple(
            (
                "cat dog owl goat parrot rabbit pony turtle ferret goose hamster raven lizard "
                "mouse donkey spider"
            ).split()
        ),
        ("{name} keeps a {value}.", "The pet of {name} is a {value}."),
        ("Which pet does {name} keep?", "What is the pet of {name}?"),
    ),
    Attribute(
        "food",
        tuple(
            (
                "soup bread cheese rice plums stew honey fish beans cake salad pears noodles "
                "eggs berries corn"
            ).split()
        ),
        ("{name} likes to eat {value}.", "The favourite food of {name} is {value}."),
        ("What does {name} like to eat?", "What is the favourite food of {name}?"),
    ),
    Attribute(
        "instrument",
        tuple(("flute drum harp violin piano horn guitar cello banjo lute fiddle organ").split()),
        ("{name} plays the {value}.", "The {value} is what {name} plays."),
        ("What does {name} play?", "Which instrument does {name} play?"),
    ),
)

# What lists are made of; so few that a long list names some of them twice.
OBJECTS = tuple(
    (
        "lamp stone river chair window bottle ladder hammer pillow mirror candle basket button "
        "carpet feather garden island jacket kettle letter magnet needle orange paper"
    ).split()
)

# Things that appear in word problems only.
PROBLEM_OBJECTS = tuple(("apples coins books marbles shells cards stamps nuts").split())
