"""Read a page the way a browser does, without one."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from typing import Any


class _Page(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []  # (tag it is in, text)
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append((self.tags[-1][0] if self.tags else "", data))


def chart_data(page: str) -> dict[str, dict[str, Any]]:
    """The data of the page's charts by title."""
    found = re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    return {chart["title"]: chart for chart in map(json.loads, found)}


def assert_loads_nothing(page: str) -> None:
    """No element refers to anything outside, and the one script that may run is the one that the policy names."""
    parsed = _Page(page)
    assert {tag for tag, _ in parsed.tags}.isdisjoint({"link", "img", "iframe", "object", "embed", "a", "form", "base"})
    assert not {name for _, attributes in parsed.tags for name in attributes} & {"src", "href", "srcset", "onerror"}
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == 1
    assert {dict(attributes).get("type") for tag, attributes in parsed.tags if tag == "script"} == {
        None,
        "application/json",
    }
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    policies = [attributes["content"] for tag, attributes in parsed.tags if "http-equiv" in attributes]
    assert policies == [f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"]
    style = "".join(text for tag, text in parsed.texts if tag == "style")
    assert style and not re.search(r"@import|url\(", style)
