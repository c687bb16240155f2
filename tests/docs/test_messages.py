"""The messages that the page about operating a run explains are those that turbolm prints."""

from __future__ import annotations

import ast
import re

from tests.test_pages import ROOT
from turbolm.launch.status import RunStatus
from turbolm.reliability import outcome

PAGE = ROOT / "src/turbolm/train/README.md"
_ROW = re.compile(r"^\| `([^`]+)` \|", re.M)


def texts_of_source() -> list[str]:
    """Every string of the sources; a place that is filled in is a null character, so that no word spans it."""
    texts = []
    for path in sorted((ROOT / "src/turbolm").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def is_printed(message: str, texts: list[str]) -> bool:
    """Whether one string of the sources has the parts of a message in their order; `...` is what is filled in."""
    pattern = re.compile(".*".join(re.escape(part) for part in message.split("...")), re.S)
    return any(pattern.search(text) for text in texts)


def test_every_message_is_printed_somewhere() -> None:
    texts, tables = texts_of_source(), PAGE.read_text(encoding="utf-8").split("## Before the first step")[1]
    messages = _ROW.findall(tables)
    assert len(messages) > 30
    assert not [message for message in messages if not is_printed(message, texts)]
    assert not is_printed("the checkpoint of step ... was not saved", texts)


def test_every_state_is_explained() -> None:
    states = set(_ROW.findall(PAGE.read_text(encoding="utf-8").split("## Before the first step")[0]))
    words = {value for name, value in vars(outcome).items() if name in ("STOPPED", "HUNG", "LOST", "REFUSED", "FAILED")}
    told = set(re.findall(r"[a-z]+", str(RunStatus.__doc__)))
    assert states == words | {"new", "running", "finished", "killed", "silent"} and states <= told
