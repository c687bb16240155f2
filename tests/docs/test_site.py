"""The site has every page once, and its links lead somewhere."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.docs.site import build, copy_pages, navigation, site_pages
from tests.test_pages import ROOT


def paths_in(entries: list[dict[str, Any]]) -> list[str]:
    found = []
    for entry in entries:
        for value in entry.values():
            found += [value] if isinstance(value, str) else paths_in(value)
    return found


def test_every_page_is_in_the_navigation_once() -> None:
    paths = paths_in(navigation())
    assert sorted(paths) == sorted(str(page.relative_to(ROOT)) for page in site_pages())
    assert paths[0] == "README.md"
    assert {entry for section in navigation() for entry in section} >= {"turbolm", "Speed", "More"}


def test_links_of_the_copies_lead_to_copies(tmp_path: Path) -> None:
    copy_pages(tmp_path)
    for page in site_pages():
        copy = tmp_path / page.relative_to(ROOT)
        text = re.sub(r"^ *```.*?^ *```$", "", copy.read_text(encoding="utf-8"), flags=re.M | re.S)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if not re.match(r"\w+:|#", link):
                target = Path(os.path.normpath(copy.parent / link.partition("#")[0]))
                assert target.is_file() and target.is_relative_to(tmp_path), f"{page}: {link}"
    assert (tmp_path / "recipes/quickstart/loss.svg").is_file()


@pytest.mark.slow
def test_the_site_is_built(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="the extra `docs` is not installed")
    assert build(tmp_path) == 0
    index = (tmp_path / "site/index.html").read_text(encoding="utf-8")
    assert 'href="recipes/quickstart/index.html"' in index
    assert not re.findall(r'(?:src|href)="https?://(?:cdn|fonts|unpkg)', index), "the site asks other sites for nothing"
    assert "<table>" in (tmp_path / "site/src/turbolm/train/index.html").read_text(encoding="utf-8")
