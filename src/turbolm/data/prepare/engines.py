"""Ways to tokenize the same text into the same ids, from the reference to the fastest.

`tokenizers` is the reference. Two faster engines are used only if they give the same ids: on a list of nasty strings
before anything is written, and on a sample of every shard's documents (`check_sample`).
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from turbolm.data.prepare.special_tokens import Finder, SpecialTokens, is_marker, load_text_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EngineName = Literal["tokenizers", "words", "gigatoken"]
Ids = tuple[np.ndarray, np.ndarray]  # ids of all texts, concatenated, uint32; number of ids of each text, int64

_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # the split of ByteLevel
_CACHE_BYTES = 32 * 10**6  # size of the words that Words remembers; more is no faster, half of it is a tenth slower
_RENEW_BYTES = 32 * 10**6  # gigatoken 0.10 remembers every word it has seen: forget them after this much text
_SAMPLE_EVERY = 500  # documents
_SAMPLE_CHARS = 10_000
_NASTY = (
    "", " ", "  ", " \n\n \t x", "\r\n\r\n  \r", "\n \n", "a\u0085b\u2028\u2029 \u00a0\u3000 c",
    "\x00\x01\x1c\x1d\x1f\x7f",
    "'s 'S 'LL don'T I'Ve '\u017f 'K '", "\uff11\uff12\uff13\uff14 12345678 \u2167\u00bd\u00b2",
    "\ufb01 \u01c5 \u0130\u0131",
    "e\u0301 \u00e9 \u0301\u0301 \u200d\ufeff", "\U0001f642\U0001f469\u200d\U0001f467\U0001f1e9\U0001f1ea\u263a\ufe0f",
    "\u732b\u304c\u597d\u304d \u4e2d\u6587\uff0c\u6807\u70b9\u3002 \ud55c\uad6d\uc5b4",
    "\u05e9\u05dc\u05d5\u05dd \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "\u0e44\u0e17\u0e22 \u0939\u093f\u0928\u094d\u0926\u0940",
    "\U0010ffff\ue000\ufffd\ufffe \U0001d49c \U00010348 \U00020000 \U00010940 \ua7cb\u0410", "ab" * 3000, " " * 3000,
    "\t" * 99 + "x", "a" * 3000 + "\u00e9", "....----====____    !!!???", "<s></s><pad>[INST]<|im_start|>",
    "def f(x):\n    return x**2  # y\n\n\n\tend", "https://a.b/c?d=e&f=%20#g", "_a __b \u2581c \u0120d \u010a",
    "$1,234.5e-10 0xFF",
)  # fmt: skip


class EngineMismatch(Exception):
    """An engine gave other ids than `tokenizers`."""


class Engine(Protocol):
    """Tokenizes without special tokens at the ends; `SpecialTokens` decides about those that a text spells out."""

    def encode(self, texts: Sequence[bytes]) -> Ids:
        """Return the ids of these UTF-8 texts."""


class Plain:
    """The reference."""

    def __init__(self, folder: Path, special_tokens: SpecialTokens = "split"):
        self.keeps_special = special_tokens == "keep"
        self._tokenizer = load_text_tokenizer(folder, special_tokens)

    def content(self) -> dict[str, Any]:
        """Return the content of tokenizer.json."""
        return dict(json.loads(self._tokenizer.to_str()))

    def added_tokens(self) -> list[str]:
        """Return the texts of the added tokens."""
        return [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]

    def decode(self, ids: list[int]) -> str:
        """Decode these ids; without a decoder, return the tokens as they are."""
        if self._tokenizer.decoder is None:
            return "".join(self._tokenizer.id_to_token(token) or "" for token in ids)
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))

    @cached_property
    def unknown_id(self) -> int | None:
        """Return the id of the unknown token."""
        model = self.content()["model"]
        token = model.get("unk_token")
        unknown = model.get("unk_id") if token is None else self._tokenizer.token_to_id(token)
        return None if unknown is None else int(unknown)

    def encode(self, texts: Sequence[bytes]) -> Ids:
        encodings = self._tokenizer.encode_batch_fast([text.decode() for text in texts], add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        return np.array([token for row in ids for token in row], np.uint32), np.array([len(row) for row in ids], int)


class Words:
    """`tokenizers`, called only once for each distinct word, as its pre-tokenizer splits text.

    Raises EngineMismatch if the tokenizer's kind of splitting is not supported here, or a word's tokens depend on its
    context.
    """

    def __init__(self, plain: Plain):
        import regex
        from tokenizers import Tokenizer

        self._plain, content = plain, plain.content()
        pattern = _split_pattern(content)
        content |= {"post_processor": None, "pre_tokenizer": _byte_level(use_regex=False)}
        self._words: Tokenizer = Tokenizer.from_str(json.dumps(content))
        self._words.encode_special_tokens = True
        compiled = regex.compile(pattern)
        if compiled.groups:
            raise EngineMismatch("its pattern has groups")
        self._split: Callable[[str], list[str]] = compiled.findall
        self._classes = _classes(pattern)
        self._sure: set[str] = set()  # characters that `regex` and `tokenizers` split alike, and those they do not
        self._unsure: set[str] = set()
        self._known: dict[str, bytes] = {}
        self._known_bytes = 0
        self._finder = Finder(plain.added_tokens() if plain.keeps_special else ())

    def encode(self, texts: Sequence[bytes]) -> Ids:
        rows = [None if self._finder.find(text) else self._split_text(text.decode()) for text in texts]
        missing = list(set().union(*(row for row in rows if row)).difference(self._known))
        for word, encoding in zip(missing, self._words.encode_batch_fast(missing), strict=True):
            ids = array("I", encoding.ids).tobytes()
            self._known[word] = ids
            self._known_bytes += len(word) + len(ids) + 150  # Python's overhead of two such objects
        find = self._known.__getitem__
        parts = [
            b"".join(map(find, row)) if row is not None else self._plain.encode([text])[0].tobytes()
            for row, text in zip(rows, texts, strict=True)
        ]
        if self._known_bytes > _CACHE_BYTES:
            self._known, self._known_bytes = {}, 0
        lengths = np.array([len(part) // 4 for part in parts], np.int64)
        return np.frombuffer(b"".join(parts), np.uint32), lengths

    def _split_text(self, text: str) -> list[str] | None:
        """Return the words, or None if only the tokenizer itself can split this text."""
        if not text.isascii() and not self._sure.issuperset(text):
            # Only the characters that occur: comparing all of Unicode takes 1.6 seconds and 200 MB.
            if new := set(text) - self._sure - self._unsure:
                other = _classed_differently(self._classes, new)
                self._sure |= new - other
                self._unsure |= other
            if not self._sure.issuperset(text):
                return None
        words = self._split(text)
        return words if sum(map(len, words)) == len(text) else None


class Gigatoken:
    """The `gigatoken` library. Raises ImportError without it, and EngineMismatch for a tokenizer it cannot read."""

    def __init__(self, plain: Plain):
        import gigatoken

        content = plain.content()
        if not plain.keeps_special:  # it would find them in a text
            content["added_tokens"] = [token for token in content["added_tokens"] if not token["special"]]
        self._content = json.dumps(content)
        self._build: Callable[[str], Any] = gigatoken.Tokenizer.from_json
        self._encoded_bytes = 0
        try:
            self._tokenizer = self._build(self._content)
        except Exception as error:  # plain exceptions of several kinds
            raise EngineMismatch(f"it cannot read this tokenizer: {error}") from None

    def encode(self, texts: Sequence[bytes]) -> Ids:
        if self._encoded_bytes > _RENEW_BYTES:
            self._tokenizer = None  # free the old one before making the new one
            self._tokenizer, self._encoded_bytes = self._build(self._content), 0
        self._encoded_bytes += sum(map(len, texts))
        # One by one is as fast, and encode_batch imports awkward: half a second and 42 MB in each process.
        rows = [self._tokenizer.encode(text) for text in texts]
        return np.concatenate([*rows, np.empty(0, np.uint32)]), np.array([len(row) for row in rows], np.int64)


_ENGINES: dict[str, Callable[[Plain], Engine]] = {"words": Words, "gigatoken": Gigatoken}


def load_engine(name: EngineName, plain: Plain) -> Engine:
    """Return an engine for the tokenizer of `plain`."""
    return plain if name == "tokenizers" else _ENGINES[name](plain)


def choose_engine(
    wanted: Literal["auto", "tokenizers", "gigatoken"],
    folder: Path,
    warn: Callable[[str], None],
    special_tokens: SpecialTokens = "split",
) -> EngineName:
    """Return the fastest engine that matches `tokenizers` on the nasty strings; `warn` gets mismatches."""
    plain = Plain(folder, special_tokens)
    candidates: list[EngineName] = ["words"] if wanted == "tokenizers" else ["gigatoken", "words"]
    for name in candidates:
        try:
            check_sample(load_engine(name, plain), plain, _nasty_texts(plain), every=1)
            return name
        except ImportError:
            if wanted == "gigatoken":
                warn("gigatoken is not installed (pip install 'turbolm[gigatoken]'); tokenizing with tokenizers")
        except EngineMismatch as problem:
            if name == "gigatoken":
                warn(f"gigatoken is not used: {problem}; tokenizing with tokenizers")
    return "tokenizers"


class Texts(Protocol):
    """A sequence of UTF-8 texts."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int, /) -> bytes: ...


def check_sample(engine: Engine, plain: Engine, texts: Texts, every: int = _SAMPLE_EVERY) -> None:
    """Raise EngineMismatch unless `engine` gives the ids of `plain` on a prefix of every n-th text."""
    for number in range(0, len(texts), every):
        beginning = texts[number][: 4 * _SAMPLE_CHARS].decode(errors="ignore")[:_SAMPLE_CHARS].encode()
        expected, found = plain.encode([beginning])[0], engine.encode([beginning])[0]
        if not np.array_equal(expected, found):
            where = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), len(expected))
            raise EngineMismatch(
                f"it gives other ids than tokenizers for {beginning[:40].decode(errors='ignore')!r} "
                f"(from token {where} on)"
            )


def _nasty_texts(plain: Plain) -> list[bytes]:
    texts = [*_NASTY, *(f"a{token}b {token} {token}{token}\n{token}" for token in plain.added_tokens()[:50])]
    return [text.encode() for text in texts]


def _split_pattern(tokenizer: dict[str, Any]) -> str:
    """Return the pattern that splits text, if a word's tokens depend only on the word. Raises EngineMismatch."""
    splitter = tokenizer["pre_tokenizer"] or {}
    steps = splitter.get("pretokenizers", [splitter])
    added = tokenizer["added_tokens"]
    if tokenizer["normalizer"] or not all(token["special"] or is_marker(token["content"]) for token in added):
        raise EngineMismatch("it normalizes text, or looks for tokens before it splits")
    if tokenizer["model"].get("dropout"):
        raise EngineMismatch("it drops merges at random")
    if len(steps) == 1 and _same(steps[0], _byte_level(use_regex=True)):
        return _GPT2_SPLIT
    if (
        len(steps) == 2
        and _same(steps[0], {"type": "Split", "behavior": "Isolated", "invert": False})
        and _same(steps[1], _byte_level(use_regex=False))
        and "Regex" in steps[0]["pattern"]
    ):
        return str(steps[0]["pattern"]["Regex"])
    raise EngineMismatch("its splitting is of another kind")


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _same(step: dict[str, Any], expected: dict[str, Any]) -> bool:
    return all(step.get(name) == value for name, value in expected.items() if name != "trim_offsets")


def _classes(pattern: str) -> list[str]:
    r"""Return the character classes in a pattern, such as \p{L} and \s."""
    import regex

    return sorted(set(regex.findall(r"\\[pP]\{\^?\w+\}|\\[sdw]", pattern.replace(r"\S", r"\s"))))


def _classed_differently(classes: Sequence[str], characters: set[str]) -> set[str]:
    """Return the characters on which `regex` and `tokenizers` disagree about a class: their Unicode versions differ."""
    import regex
    from tokenizers import PreTokenizedString, Regex, pre_tokenizers

    text, different = "".join(sorted(characters)), set()
    for name in classes:
        pieces = PreTokenizedString(text)
        pre_tokenizers.Split(Regex(f"{name}+"), behavior="removed").pre_tokenize(pieces)
        theirs = "".join(piece for piece, *_ in pieces.get_splits("original", "byte"))
        different |= set(theirs) ^ set(regex.sub(f"{name}+", "", text))
    return different
