"""Build a site of the pages, in build/site (`make docs`): they stay beside what they describe, and are copied.

The navigation is the table "Pages" of README.md; pages that it does not link come after it. A link to a file that is
no page leads to a copy of it; one to a folder leads to the folder's page, or becomes text where it has none.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.test_pages import ROOT, pages

BUILD = ROOT / "build"
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
_FENCE = re.compile(r"(^ *```.*?^ *```$)", re.M | re.S)
_LEFT_OUT = {".github"}
SETTINGS: dict[str, Any] = {
    "site_name": "turbolm",
    "use_directory_urls": False,  # so that the site can be read from a disk; only its search needs a server
    "theme": {
        "name": "material",
        "font": False,  # nothing from other sites
        "features": ["navigation.sections", "navigation.top", "content.code.copy"],
        "palette": [
            {"media": "(prefers-color-scheme: light)", "scheme": "default"},
            {"media": "(prefers-color-scheme: dark)", "scheme": "slate"},
        ],
    },
    "plugins": ["search"],  # `offline` would search on a disk too, with a script from another site
    "extra_css": ["wide.css"],
    "markdown_extensions": [
        "tables",
        "sane_lists",
        "pymdownx.superfences",
        "pymdownx.highlight",
        {"toc": {"toc_depth": 3}},
    ],
    "validation": {"links": {"anchors": "warn"}},
}


def site_pages() -> list[Path]:
    """The pages of the site."""
    return [page for page in pages() if not _LEFT_OUT & set(page.relative_to(ROOT).parts)]


def copy_pages(folder: Path) -> None:
    """Copy the pages, and the files that they link, below `folder`, with links that lead somewhere there."""
    inside = set(site_pages())
    for page in inside:
        copy = folder / page.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        parts = _FENCE.split(page.read_text(encoding="utf-8"))
        parts[::2] = [_LINK.sub(lambda link, page=page: _link(link, page, folder, inside), part) for part in parts[::2]]
        copy.write_text("".join(parts), encoding="utf-8")


def _link(link: re.Match[str], page: Path, folder: Path, inside: set[Path]) -> str:
    mark, text, target = link.groups()
    if re.match(r"\w+:|#", target):
        return link[0]
    name, _, anchor = target.partition("#")
    path = Path(os.path.normpath(page.parent / name))
    if path.is_dir():
        path = path / "README.md"
    if not path.is_file() or not path.is_relative_to(ROOT):
        return text
    if path not in inside:
        copy = folder / path.relative_to(ROOT)
        copy = copy if path.suffix != ".md" else copy.with_suffix(".txt")  # of a page that is not in the site
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
        path = ROOT / copy.relative_to(folder)
    return f"{mark}[{text}]({os.path.relpath(path, page.parent)}{'#' if anchor else ''}{anchor})"


def navigation() -> list[dict[str, Any]]:
    """Sections of pages, from the rows of the table in README.md; then what is left, by path."""
    left = {str(page.relative_to(ROOT)) for page in site_pages()}
    sections: list[dict[str, Any]] = [{"turbolm": "README.md"}]
    left.discard("README.md")
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("## Pages")[1]
    for label, cells in re.findall(r"^\| ([^|]+) \| (.+) \|$", table, re.M)[1:]:
        entries = [{_title(text): path} for _, text, path in _LINK.findall(cells) if path in left]
        left -= {path for _, _, path in _LINK.findall(cells)}
        heading = label.partition(":")[0]
        sections += [{heading[0].upper() + heading[1:]: entries}] if entries else []
    return [*sections, {"More": [{_heading(path): path} for path in sorted(left)]}] if left else sections


def _title(text: str) -> str:
    text = text.replace("`", "").partition(":")[0]
    return text[0].upper() + text[1:]


def _heading(path: str) -> str:
    return re.search(r"^# (.+)$", (ROOT / path).read_text(encoding="utf-8"), re.M)[1]  # type: ignore[index]


def build(folder: Path = BUILD) -> int:
    """Build the site in `folder`/site; returns the exit code of mkdocs, which is not 0 for any broken link."""
    for name in ("pages", "site"):
        shutil.rmtree(folder / name, ignore_errors=True)
    copy_pages(folder / "pages")
    (folder / "pages/wide.css").write_text(".md-grid { max-width: 80rem; }\n", encoding="utf-8")  # for the tables
    settings = {**SETTINGS, "docs_dir": "pages", "site_dir": "site", "nav": navigation()}
    (folder / "mkdocs.yml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--config-file", folder / "mkdocs.yml"]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # about mkdocs 2, which mkdocs-material does not allow
    return subprocess.run(command, env=quiet, check=False).returncode


if __name__ == "__main__":
    code = build()
    print(f"{BUILD / 'site' / 'index.html'}" if code == 0 else "the site was not built", file=sys.stderr)
    sys.exit(code)
