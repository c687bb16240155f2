"""The documents of a source in their order, whoever reads them."""

from __future__ import annotations

import numpy as np

from turbolm.data.prepare.blocks import Block, Offset
from turbolm.data.prepare.read_ahead import BlockReader
from turbolm.data.prepare.reader import BadDocuments
from turbolm.recipe.schema import Recipe


class Documents:
    """The documents of a source from an offset on: those of `block` from `first` on, and so forth.

    Bad ones are refused or skipped as they are passed. `ahead` as in `BlockReader.read`.
    """

    def __init__(self, recipe: Recipe, source: int, start: Offset, reader: BlockReader, *, ahead: bool):
        self.offset, self.first, self.ahead = start, 0, ahead
        self.share = 0.0  # of the file that the last document is in, read
        self.bad = BadDocuments(recipe.data.sources[source], start, recipe.data.on_bad_document)
        self._reader, self._blocks = reader, reader.read(source, start, ahead=ahead)
        self._block: Block | None = None

    def block(self, wanted_bytes: int) -> Block | None:
        """Return the block with the next document, or None at the end of the source.

        Unless it was read ahead, a new block is read with `wanted_bytes` of text, and nothing more. Raises UserError
        for a file that cannot be read, and for a source with only bad documents.
        """
        if self._block is None:
            self._reader.wanted_bytes = wanted_bytes
            self._block, self.first = next(self._blocks, None), 0
            if self._block is None:
                self.bad.end()
        return self._block

    def advance(self, stop: int) -> None:
        """Pass the documents of the block before `stop`. Raises UserError for a bad one that is refused."""
        block = self._block
        assert block is not None
        good = np.flatnonzero(block.lengths[self.first : stop] >= 0)
        first_good = self.first + int(good[0]) if len(good) else stop
        for document, bad in block.bad.items():
            if self.first <= document < stop:
                if document > first_good:
                    self.bad.good()
                self.bad.leave_out(bad)
        if len(good):
            self.bad.good()
        self.first = stop
        self.offset, self.share = block.end_of(stop - 1)
        if stop == len(block):
            block.file.drop()
            self._block = None
