"""Special and added tokens that documents spell out: read as text or as those tokens (`special_tokens_in_text`)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from turbolm.data.prepare.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SpecialTokens = Literal["split", "keep"]
_PREFIX_BYTES = 4  # there may be hundreds of tokens, most of them alike at first


def is_marker(token: str) -> bool:
    """Return whether a text can spell the token out by mistake.

    Runs of spaces and line ends, which tokenizers for code add, are a part of how text is split: they always count.
    """
    return bool(token.strip(" \t\r\n\u2581"))


def load_text_tokenizer(path: str | Path, special_tokens: SpecialTokens) -> Tokenizer:
    """Return the tokenizer for document text. With `split`, special and added tokens in it are ordinary text.

    `tokenizers` can ignore special tokens, but always finds other added tokens: so here those become special.
    """
    from tokenizers import Tokenizer

    tokenizer = load_tokenizer(path)
    if special_tokens == "keep":
        tokenizer.encode_special_tokens = False
        return tokenizer
    added = tokenizer.get_added_tokens_decoder().values()
    if any(is_marker(token.content) and not token.special for token in added):
        content = json.loads(tokenizer.to_str())
        for token in content["added_tokens"]:
            token["special"] = token["special"] or is_marker(token["content"])
        tokenizer = Tokenizer.from_str(json.dumps(content))
        tokenizer.encode_special_tokens = True
    return tokenizer


class Finder:
    """Finds the special and added tokens that a text spells out, as fast as a search for their first characters."""

    def __init__(self, tokens: Iterable[str]):
        markers = sorted({token.encode() for token in tokens if is_marker(token)}, key=len, reverse=True)
        self._begin = re.compile(b"|".join(sorted({re.escape(one[:_PREFIX_BYTES]) for one in markers})) or b"(?!)")
        self._whole = re.compile(b"|".join(map(re.escape, markers)) or b"(?!)")

    def find(self, text: bytes) -> str | None:
        """Return the first such token in a UTF-8 text."""
        place = self._begin.search(text)
        while place:
            if found := self._whole.match(text, place.start()):
                return found[0].decode()
            place = self._begin.search(text, place.start() + 1)
        return None
