from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.checkpoint.toy import one_process
from tests.memory_folder import tmp_path

__all__ = ["process_group", "tmp_path"]


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    with one_process():
        yield
