"""The code blocks of the pages: where they are, what they are, and which of them tests run.

Above a fence, `<!-- not run: REASON -->` keeps a block from being run; under the title of a page,
`<!-- no block of this page is run: REASON -->` keeps all of its blocks from it. All of them are checked all the same.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.test_pages import ROOT, pages

LANGUAGES = ("sh", "yaml", "python", "json", "text")
_OTHER_NAMES = {"": "text", "bash": "sh", "yml": "yaml", "console": "text"}
_BLOCK = re.compile(
    r"^(?:<!-- (?P<note>[^\n]*?) -->\n)?(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$", re.M | re.S
)
_WHOLE_PAGE = re.compile(r"^<!-- no block of this page is run: (.+) -->$", re.M)
_INLINE = re.compile(r"`((?:turbolm|make) [^`]+)`")
_SEPARATORS = ("&&", "||", "|", ";")


@dataclass(frozen=True)
class Block:
    """A fenced block. `why_not`: the reason given for not running it."""

    page: str
    line: int
    language: str
    text: str
    why_not: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def read_blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    whole = _WHOLE_PAGE.search(text)
    blocks = []
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("language")) + 1
        note = match["note"] or ""
        assert not note or note.startswith("not run: "), f"{page}:{line}: what does the comment `{note}` mean?"
        why_not = note.removeprefix("not run: ") or (whole and whole[1]) or None
        content = re.sub(rf"^{match['indent']}", "", match["text"], flags=re.M)
        language = _OTHER_NAMES.get(match["language"], match["language"])
        blocks.append(Block(str(page.relative_to(ROOT)), line, language, content, why_not))
    assert len(blocks) == len(re.findall(r"^ *```", text, re.M)) / 2, f"{page}: a fence is not closed"
    return blocks


def all_blocks(*languages: str) -> list[Block]:
    """The blocks of all pages in these languages."""
    return [block for page in pages() for block in read_blocks(page) if not languages or block.language in languages]


def shell_lines(block: Block) -> Iterator[str]:
    """The commands of a shell block, and those after a `$ ` in a block of text: continued lines are joined."""
    text = block.text.replace("\\\n", " ")
    for line in text.splitlines():
        if block.language == "text":
            if line.startswith("$ "):
                yield line[2:]
        elif line.strip() and not line.lstrip().startswith("#"):
            yield line


def commands(line: str) -> list[list[str]]:
    """The words of each command of a shell line, without comments, redirections and what it sets before a command."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split, lexer.commenters = True, "#"
    found: list[list[str]] = [[]]
    skip = False
    for word in lexer:
        if skip:
            skip = False
        elif word in _SEPARATORS:
            found.append([])
        elif set(word) <= set("<>&"):
            skip = True  # where to or from
        elif found[-1] or not re.match(r"[A-Z_]+=", word):
            found[-1].append(word)
    return [words for words in found if words]


def running_text(page: Path) -> str:
    """The text of a page without its blocks."""
    return _BLOCK.sub("", page.read_text(encoding="utf-8"))


def inline_commands(page: Path) -> list[str]:
    """The commands in the running text of a page, such as `turbolm plan RECIPE --search`."""
    return [match.replace("\\|", "|") for match in _INLINE.findall(running_text(page))]
