"""Cut the text of the sources into shards, and find those that an earlier run wrote.

A shard is consecutive documents of one source. Its record (`.json`) says which part of the source it holds, so a later
run does not read that part again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from turbolm.data.prepare.digests import DIGEST_BYTES, DigestSet
from turbolm.data.prepare.reader import LeftOut, Offset, Reader, SourceSizes, check_left_out
from turbolm.data.prepare.shards import Shard, Texts, shard_name
from turbolm.data.store.token_store import SPLITS, check_file
from turbolm.files import load_json, temporary
from turbolm.recipe.schema import Recipe


@dataclass
class Dropped:
    """Documents that are not in any shard."""

    empty: int = 0
    duplicates: int = 0
    bad: LeftOut = field(default_factory=LeftOut)


def is_validation(text_digest: bytes, share: float) -> bool:
    """Return whether the document whose text has this SHA-256 is held out: equal texts are always in the same split."""
    return int.from_bytes(text_digest[:8], "big") / 2**64 < share


def cut_shards(
    recipe: Recipe, folder: Path, shard_text_bytes: int, sizes: SourceSizes, dropped: Dropped
) -> Iterator[Shard]:
    """Yield the shards in order; `dropped` counts skipped documents.

    Shards that an earlier run finished are not read from the source again; only the hashes of their files are checked.
    Their text is the same because the folder's name covers size and time of every source file. A data set from the hub
    has no such files, so its text is read and compared.
    """
    seen = DigestSet() if recipe.data.deduplicate == "exact" else None
    number, share = 0, 0.0
    for source, settings in enumerate(recipe.data.sources):
        known = bool(settings.files())
        start: Offset = (0, 0)
        reader = documents = None
        while True:
            part = _find(folder, number, {"source": source, "start": list(start)}, seen) if known else None
            if part is not None:
                reader = documents = None
            else:
                if reader is None or documents is None:
                    reader = Reader(settings, start, recipe.data.on_bad_document)
                    documents = iter(reader)
                texts: dict[str, Texts] = {
                    split: Texts(temporary(folder / f"{shard_name(number)}.{split}.text")) for split in SPLITS
                }
                part = Shard(number, {"source": source, "start": list(start)}, texts)
                _fill(part, reader, documents, seen, recipe.data.validation, _limit(number, shard_text_bytes))
                found = _find(folder, number, part.record, None) if not known and part.num_documents else None
                if found:
                    part.remove_texts()
                    part = found
            record = part.record
            check_left_out(record, recipe.data.on_bad_document)  # a run that skipped them may have written the part
            dropped.empty += record["empty"]
            dropped.duplicates += record["duplicates"]
            dropped.bad.extend(record)
            if part.texts and not part.num_documents:
                break
            start = (record["end"][0], record["end"][1])
            before, share = share, max(share, sizes.share(source, start, reader.share_of_file if reader else 0.0))
            part.share = share - before
            yield part
            number += 1


def _limit(number: int, shard_text_bytes: int) -> int:
    """Return the next shard's size: it grows from a sixteenth, so that a small corpus occupies several processes."""
    return shard_text_bytes >> max(0, 4 - number // 8)


def _fill(
    shard: Shard, reader: Reader, documents: Iterator[str], seen: DigestSet | None, validation: float, limit: int
) -> None:
    """Move documents to the shard until it holds `limit` bytes of text."""
    text_bytes = empty = duplicates = 0
    digest_of_all = hashlib.sha256()
    for text in documents:
        if not text:
            empty += 1
            continue
        content = text.encode()
        digest = hashlib.sha256(content).digest()
        if seen is not None:
            if not seen.add(digest[:DIGEST_BYTES]):
                duplicates += 1
                continue
            shard.digests += digest[:DIGEST_BYTES]
        shard.texts["validation" if is_validation(digest, validation) else "train"].append(content)
        text_bytes += len(content)
        digest_of_all.update(digest)
        if text_bytes >= limit:
            break
    shard.record |= {
        "end": list(reader.offset),  # behind bad documents at the end of the source
        "empty": empty,
        "duplicates": duplicates,
        "text_sha256": digest_of_all.hexdigest(),
        **reader.left_out.record(),
    }
    reader.left_out = LeftOut()
    for texts in shard.texts.values():
        texts.close()


def _find(folder: Path, number: int, expected: dict[str, Any], seen: DigestSet | None) -> Shard | None:
    """Return a shard that was written before, is intact and holds what is expected; its digests are added to `seen`."""
    try:
        record = load_json(folder / f"{shard_name(number)}.json")
        parts = ["tokens", "index"] + ["digests"] * (seen is not None)
        if any(record[name] != value for name, value in expected.items()):
            return None
        if any(record[part]["file"] != f"{shard_name(number)}.{part}" for part in parts):
            return None
        if any(check_file(folder, record[part], full=True) for part in parts):
            return None
        if seen is not None:
            digests = (folder / record["digests"]["file"]).read_bytes()
            for at in range(0, len(digests), DIGEST_BYTES):
                seen.add(digests[at : at + DIGEST_BYTES])
        return Shard(number, dict(record))
    except (OSError, ValueError, KeyError, TypeError):
        return None
