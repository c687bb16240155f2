"""Cut the text of the sources into shards, and find those that an earlier run wrote.

A shard is consecutive documents of one source. Its record (`.json`) says which part of the source it holds, so a later
run does not read that part again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from turbolm.data.prepare.blocks import Offset
from turbolm.data.prepare.digests import DIGEST_BYTES, DigestSet
from turbolm.data.prepare.documents import Documents
from turbolm.data.prepare.read_ahead import BlockReader
from turbolm.data.prepare.reader import LeftOut, SourceSizes, check_left_out
from turbolm.data.prepare.shards import Shard, shard_name
from turbolm.data.prepare.texts import Texts
from turbolm.data.store.token_store import SPLITS, check_file
from turbolm.files import load_json
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


def held_out(digests: np.ndarray, share: float) -> np.ndarray:
    """Return `is_validation` of each digest, uint8 [count, 32]; exact, since dividing by a power of two is."""
    return np.ascontiguousarray(digests[:, :8]).view(">u8")[:, 0].astype(np.float64) / 2**64 < share


def cut_shards(
    recipe: Recipe, folder: Path, shard_text_bytes: int, sizes: SourceSizes, dropped: Dropped, num_readers: int = 1
) -> Generator[Shard, None, None]:
    """Yield the shards in order; `dropped` counts skipped documents. The number of readers makes no other difference.

    Shards that an earlier run finished are not read from the source again; only the hashes of their files are checked.
    Their text is the same because the folder's name covers size and time of every source file. A data set from the hub
    has no such files, so its text is read and compared.
    """
    seen = DigestSet() if recipe.data.deduplicate == "exact" else None
    last_written = _last_written(folder)
    number, share = 0, 0.0
    with closing(BlockReader(recipe.data.sources, folder, num_readers, sizes.num_bytes)) as blocks:
        for source, settings in enumerate(recipe.data.sources):
            known = bool(settings.files())
            start: Offset = (0, 0)
            documents: Documents | None = None
            while True:
                expected = {"source": source, "start": list(start)}
                part = _find(folder, number, expected, seen) if known else None
                if part is not None:
                    documents = None
                else:
                    ahead = number > last_written  # before are gaps, and this process reads only what they lack
                    if documents is None or (known and ahead > documents.ahead):
                        documents = Documents(recipe, source, start, blocks, ahead=ahead)
                    part = Shard(number, expected, {split: Texts() for split in SPLITS})
                    part.min_tokens = settings.min_tokens or 0
                    _fill(part, documents, seen, recipe.data.validation, _limit(number, shard_text_bytes))
                    found = _find(folder, number, part.record, None) if not known and part.num_documents else None
                    if found:
                        part.drop_texts()
                        part = found
                record = part.record
                check_left_out(record, recipe.data.on_bad_document)  # a run that skipped them may have written the part
                dropped.empty += record["empty"]
                dropped.duplicates += record["duplicates"]
                dropped.bad.extend(record)
                if part.texts and not part.num_documents:
                    part.drop_texts()
                    break
                start = (record["end"][0], record["end"][1])
                before, share = share, max(share, sizes.share(source, start, documents.share if documents else 0.0))
                part.share = share - before
                yield part
                number += 1


def _last_written(folder: Path) -> int:
    """Return the number of the last shard that an earlier run finished, or -1."""
    numbers = (path.stem.removeprefix("shard-") for path in folder.glob("shard-*.json"))
    return max((int(number) for number in numbers if number.isdecimal()), default=-1)


def _limit(number: int, shard_text_bytes: int) -> int:
    """Return the next shard's size: it grows from a sixteenth, so that a small corpus occupies several processes."""
    return shard_text_bytes >> max(0, 4 - number // 8)


def _fill(shard: Shard, documents: Documents, seen: DigestSet | None, validation: float, limit: int) -> None:
    """Move documents to the shard until it holds `limit` bytes of text."""
    left, empty, duplicates, digest_of_all = limit, 0, 0, hashlib.sha256()
    while left > 0 and (block := documents.block(left)) is not None:
        first, sizes = documents.first, np.maximum(block.lengths[documents.first :], 0)
        # No document is left unread before these fill the shard, whichever of them turn out to be duplicates.
        stop = first + min(int(np.searchsorted(np.cumsum(sizes), left)) + 1, len(sizes))
        lengths, digests = block.lengths[first:stop], block.digests[first:stop]
        kept = np.flatnonzero(lengths > 0)
        empty += int(np.count_nonzero(lengths == 0))
        if seen is not None:
            new = seen.add(digests[kept])
            duplicates += len(kept) - int(np.count_nonzero(new))
            kept = kept[new]
            shard.digests += digests[kept, :DIGEST_BYTES].tobytes()
        lengths, digests, starts = lengths[kept], digests[kept], block.starts[first:stop][kept]
        in_validation = held_out(digests, validation)
        for split, rows in zip(SPLITS, (~in_validation, in_validation), strict=True):
            shard.texts[split].add(block.file.path, starts[rows], lengths[rows])
        shard.files.append(block.file.use())
        left -= int(lengths.sum())
        digest_of_all.update(digests.tobytes())
        documents.advance(stop)
    shard.record |= {
        "end": list(documents.offset),  # behind bad documents at the end of the source
        "empty": empty,
        "duplicates": duplicates,
        "text_sha256": digest_of_all.hexdigest(),
        **documents.bad.take_record(),
    }


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
            digests = np.fromfile(folder / record["digests"]["file"], np.uint8)
            seen.add(digests.reshape(-1, DIGEST_BYTES))
        return Shard(number, dict(record))
    except (OSError, ValueError, KeyError, TypeError):
        return None
