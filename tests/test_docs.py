"""What the documentation states that the code also holds."""

from __future__ import annotations

import re

from cfs.data import tinyworld as world
from cfs.data.formats import FORMATS
from cfs.data.tinyworld_build import TEST_ITEMS
from tests.conftest import REPOSITORY

NUMBER_WORDS = {5: "five", 6: "six", 7: "seven", 8: "eight"}


def test_paths_in_the_readme_exist() -> None:
    """Catches a file map that outlived a file."""
    readme = (REPOSITORY / "README.md").read_text()
    paths = re.findall(r"`((?:cfs|docs|bench|tests)/[\w./-]*|\w+\.(?:py|txt))`", readme)
    paths += re.findall(r"\]\((docs/[^)]+)\)", readme)
    assert len(paths) > 10
    folders = (REPOSITORY / "cfs", REPOSITORY / "bench")
    modules = {file.name for folder in folders for file in folder.rglob("*.py")}
    for path in paths:
        known = (REPOSITORY / path).exists() or path in modules
        assert known, path


def test_tinyworld_page_has_the_worlds_numbers() -> None:
    """Catches prose that a change of the world made false."""
    page = (REPOSITORY / "docs" / "tinyworld.md").read_text()
    flat = " ".join(page.split())
    assert f"{world.NUM_PEOPLE} people with {NUMBER_WORDS[len(world.ATTRIBUTES)]} facts" in flat
    assert f"items of the {NUMBER_WORDS[len(world.OLD_SKILLS)]} old skills" in flat
    assert f"One key in {NUMBER_WORDS[world.HELD_OUT_SHARE]} is held out" in flat
    assert f"their {TEST_ITEMS} test items" in flat
    for skill in [*world.OLD_SKILLS, *(f"{name} (new)" for name in world.NEW_SKILLS)]:
        assert f"| {skill} |" in page


def test_readme_names_every_format() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    for name in FORMATS:
        assert f"`{name}`" in readme
