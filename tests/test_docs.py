"""What the documentation states that the code also holds."""

from __future__ import annotations

import dataclasses
import re

import reproduce
from cfs.baselines import METHODS
from cfs.data import tinyworld as world
from cfs.data.formats import FORMATS
from cfs.data.tinyworld_build import TEST_ITEMS
from cfs.sample.config import GenerateConfig
from cfs.train.config import TrainConfig
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
    methods = (REPOSITORY / "docs" / "methods.md").read_text()
    paths += re.findall(r"`((?:cfs|recipes)/[\w./-]*)", methods)
    paths += re.findall(r"(recipes/[\w./]+)", readme)
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


PARTS = ("Source", "Published setting", "Flags", "Differs here", "Cost", "When")


def test_every_method_has_its_section() -> None:
    """Catches a method that came without its page, a section that outlived its method, and one
    that says less than the others."""
    page = (REPOSITORY / "docs" / "methods.md").read_text()
    sections = dict(re.findall(r"^### `([\w-]+)`\n(.*?)(?=^##)", page, re.M | re.S))
    assert list(sections) == list(METHODS)
    for name, text in sections.items():
        assert text.startswith("\n    "), f"{name}: its formula comes first"
        for part in PARTS:
            assert f"\n- {part}: " in text, f"{name}: {part}"


def test_every_option_stands_in_its_section_with_its_default() -> None:
    """Catches a default that was changed in the code alone, or a flag that no page names."""
    page = (REPOSITORY / "docs" / "methods.md").read_text()
    sections = dict(re.findall(r"^### `([\w-]+)`\n(.*?)(?=^##)", page, re.M | re.S))
    for name, method in METHODS.items():
        flags = re.search(r"\n- Flags: (.*?)\n- ", sections[name], re.S)
        assert flags is not None
        shown = dict(re.findall(r"`--([\w-]+)(?: ([^`]+))?`", " ".join(flags[1].split())))
        for its in method.options():
            flag = its.name.replace("_", "-")
            assert flag in shown, f"{name}: --{flag}"
            for number in re.findall(r"^[\d.e-]+$", shown[flag]):
                default = re.search(r"\[([\d.e-]+)\]$", its.metadata["help"])
                expected = its.default if default is None else default[1]
                assert float(number) == float(expected), f"{name}: --{flag}"
        if method.mix is not None and method.mix.temperature is not None:
            assert float(shown["temperature"]) == method.mix.temperature
            assert float(shown["top-p"]) == method.mix.top_p


OTHER_PROGRAMS = {"help", "config", "standalone", "nproc-per-node", "nodes", "rounds"}
"""The first two are every entry point's own; torchrun's, sbatch's and a bench's flags."""


def test_flags_of_the_pages_exist() -> None:
    """Catches a page that names a flag which was renamed or never came."""
    configs = (TrainConfig, GenerateConfig, reproduce.ReproduceConfig)
    known = {f.name.replace("_", "-") for config in configs for f in dataclasses.fields(config)}
    for page in ("README.md", "docs/methods.md"):
        named = re.findall(r"(?<![\w-])--([a-z][a-z0-9-]*)", (REPOSITORY / page).read_text())
        assert len(named) > 20
        assert set(named) <= known | OTHER_PROGRAMS, set(named) - known - OTHER_PROGRAMS


def test_readme_names_every_method() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    for name in METHODS:
        assert f"`{name}`" in readme
