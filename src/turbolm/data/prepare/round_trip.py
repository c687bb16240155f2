"""Measure how well a tokenizer reproduces its text: how many bytes of a sample are lost or changed."""

from __future__ import annotations

from turbolm.data.prepare.engines import Plain, Texts

_DOCUMENTS = 32  # of a shard, evenly spaced
_CHARS = (2_000, 500)  # bytes of each document's start, in the first shard, which may be the only one, and in others


def measure_loss(plain: Plain, texts: Texts, shard: int) -> tuple[int, int]:
    """Return the UTF-8 bytes of a sample of the texts, and how many of them encoding and decoding loses or changes."""
    sampled = lost = 0
    num_chars = _CHARS[min(shard, 1)]
    for number in range(0, len(texts), -(-len(texts) // _DOCUMENTS) or 1):
        text = texts[number][: 4 * num_chars].decode(errors="ignore")[:num_chars]
        sampled += len(text.encode())
        lost += lost_bytes(plain, text)
    return sampled, lost


def lost_bytes(plain: Plain, text: str) -> int:
    """Count the bytes of a text that its tokens do not reproduce; one space more or less before it does not count.

    The decoded text is aligned with the original by their longest common subsequence. An unknown token decodes to
    nothing.
    """
    ids = plain.encode([text.encode()])[0].tolist()
    if plain.decode(ids) in (text, f" {text}", text.removeprefix(" ")):
        return 0
    known = [token for token in ids if token != plain.unknown_id]
    before, after = text.encode(), plain.decode(known).encode()
    return min(len(before), max(len(before), len(after)) - _common_length(before, after))


def _common_length(one: bytes, other: bytes) -> int:
    """Length of the longest common subsequence; each row of the table is the bits of an integer (Hyyrö 2004)."""
    masks: dict[int, int] = {}
    for at, byte in enumerate(one):
        masks[byte] = masks.get(byte, 0) | 1 << at
    row = full = (1 << len(one)) - 1
    for byte in other:
        match = row & masks.get(byte, 0)
        row = (row + match | row - match) & full
    return len(one) - row.bit_count()
