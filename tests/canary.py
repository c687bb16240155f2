"""Files that leave a sign when they are unpickled or imported."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import torch


class Canary:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.mkdir, (str(self.path),)


def pickles(canary: Path) -> dict[str, bytes]:
    """Pickles of every look; each makes `canary` when it is let to."""
    saved = io.BytesIO()
    torch.save({"weight": Canary(canary)}, saved)
    plain = pickle.dumps(Canary(canary))
    return {"pickle": plain, "torch.save": saved.getvalue(), "text": pickle.dumps(Canary(canary), protocol=0)}


def assert_it_sings(canary: Path) -> None:
    """The canary was silent so far, and not for being broken."""
    assert not canary.exists()
    pickle.loads(pickles(canary)["pickle"])  # noqa: S301
    assert canary.exists()
