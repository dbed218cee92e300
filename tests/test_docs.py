"""The generated reference is up to date, and links in the docs lead somewhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from docs.generate import PAGES, README, refreshed  # noqa: E402


@pytest.mark.parametrize("name", PAGES)
def test_the_reference_is_what_the_code_says(name: str) -> None:
    assert (ROOT / "docs/reference" / name).read_text() == PAGES[name](), "run `make docs`"


def test_readme_shows_what_its_commands_print() -> None:
    text = README.read_text()
    assert text.count("$ outlay") >= 2
    assert text == refreshed(README), "run `make docs`"


PAGES_OF_PROSE = [
    *list((ROOT / "docs").rglob("*.md")),
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
]


@pytest.mark.parametrize("path", PAGES_OF_PROSE, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", path.read_text()):
        assert (path.parent / target).exists(), target
